"""Tests of the owner of a job after unusual ends, on the simulated Slurm."""

from flip.runs.rundir import read_json
from tests.fakeslurm.storage import trouble
from tests.harness.simulated_scene import staged
from tests.slurm.scenarios import AGAIN, SHORT


def end(scene, n=1):
    return read_json(scene.runs[0].attempt(n) / "end.json")


def test_owner_reports_storage_if_only_it_meets_full_disk(tmp_path):
    """The ranks exit with 70 and without causes, which they cannot write. Three such crashes would stop the run."""
    kind = [""]
    with staged("full", tmp_path, storage=lambda life: trouble(tmp_path, kind[0]), kill_wait=5.0) as scene:
        scene.submit({"steps": SHORT, "attempts": {"1": {"exit": 70}}})
        scene.until(lambda: scene.runs[0].newest_attempt() == 1, "the first attempt")
        kind[0] = "full"
        scene.clock.run(scene.clock.now + 40.0)
        assert end(scene) is None
        kind[0] = ""
        scene.over()
        assert (end(scene)["cause"], end(scene)["delay"], end(scene, 2)["cause"]) == ("storage", 30.0, "complete")


def test_guard_stops_polling_if_slurm_has_forgotten_job(tmp_path):
    """The controller loses its state, and the owner is killed."""
    with staged("gone", tmp_path, kill_wait=5.0) as scene:
        scene.submit(AGAIN)
        scene.ready()
        life = scene._jobs()[0].life
        scene.controller.forget()
        life.kill_owner()
        scene.clock.run(scene.clock.now + 60.0)
        calls = len(scene.commands.noted)
        scene.clock.run(scene.clock.now + 86400.0)
        assert not life.processes_of("guard")[0].alive and len(scene.commands.noted) == calls


def test_owner_resubmits_job_without_requeue_after_node_failure(tmp_path):
    """The owner on the surviving node reads NODE_FAIL, which no user requested, and submits the next job."""
    with staged("lost", tmp_path, kill_wait=5.0, node_timeout=5.0, requeue=False) as scene:
        scene.submit(AGAIN)
        scene.ready()
        scene.controller.lose(scene.facts(1)["node"])
        scene.until(lambda: end(scene), "the end of the attempt")
        assert (end(scene)["state"], end(scene)["action"]) == ("NODE_FAIL", "requeue")
        scene.until(lambda: scene.runs[0].result.exists(), "the second attempt")


def test_owner_that_waits_for_slurm_notices_its_wall_limit(tmp_path):
    """The controller is away when the attempt ends, and back when it ends the job: only KillWait is left then."""
    with staged("late", tmp_path, kill_wait=5.0) as scene:
        scene.submit({"steps": SHORT, "attempts": {"1": {"exit": 70}}}, hours=0.3)
        scene.until(lambda: scene.runs[0].newest_attempt() == 1, "the first attempt")
        scene.commands.trouble = lambda args: "refused"
        scene.patience = 1800.0
        scene.until(lambda: scene._jobs()[0].state == "TIMEOUT", "the wall limit")
        scene.commands.trouble = lambda args: ""
        scene.over()
        assert (end(scene)["cause"], end(scene, 2)["cause"]) == ("crash", "complete")
