"""Tests of runs with node agents on the simulated Slurm, beyond the recorded scenarios."""

import pytest

from flip.runs import attempts
from flip.runs.rundir import read_json, write_json
from jobs.host.agents.orphaned_task import PATIENCE_SECONDS
from jobs.host.job import RETRY_SECONDS
from jobs.submitted_runs.clusters import states
from tests.fakeslurm.storage import trouble
from tests.harness.simulated_scene import staged
from tests.slurm.agent_cases import CASES, SPARE
from tests.slurm.scenarios import AGAIN, LONG, SHORT


def ends(scene):
    (run,) = scene.runs
    return [read_json(run.attempt(n) / "end.json")["cause"] for n in run.attempt_numbers()]


def restarts(scene):
    return scene.record()["job"]["Restarts"]


def life(scene):
    return scene._jobs()[0].life


@pytest.mark.parametrize("name", CASES)
def test_case_of_agents_ends_as_on_a_real_slurm(name, tmp_path):
    case = CASES[name]
    with staged("case", tmp_path, kill_wait=5.0, node_timeout=case.node_timeout) as scene:
        scene.submit(case.play, agents=True, hours=case.hours, shape=case.shape, **case.options)
        scene.ready()
        before = scene.nodes()
        case.act(scene)
        scene.patience = 300.0
        scene.over()
        (run,) = scene.runs
        assert (tuple(ends(scene)), restarts(scene)) == (case.causes, str(case.restarts))
        assert states(scene.runs)[run.path].state == case.state
        if case.shape == SPARE and not case.restarts:
            assert scene.facts(0, 2)["node"] == before[0]
            assert scene.facts(1, 2)["node"] not in before
        if case.worlds:
            worlds = [read_json(run.attempt(n) / "start.json")["world"] for n in run.attempt_numbers()]
            assert tuple(worlds) == case.worlds


@pytest.mark.parametrize("is_early", [True, False])
def test_guard_of_killed_owner_requeues_job(is_early, tmp_path):
    """The connections of the agents end, so that their ranks save."""
    with staged("gone", tmp_path, kill_wait=5.0) as scene:
        scene.submit(AGAIN, agents=True, peer_seconds=2)
        if is_early:
            scene.until(lambda: scene._jobs()[0].life and life(scene).body, "the agents")
            assert life(scene).has_coordinator
        else:
            scene.ready()
        life(scene).kill_owner()
        scene.patience = 300.0
        scene.over()
        cause = "node" if is_early else "stopped"
        assert (ends(scene), restarts(scene)) == ([cause, "complete"], "1")


def test_ranks_are_started_by_srun_if_agents_cannot_connect(tmp_path):
    with staged("alone", tmp_path, kill_wait=5.0) as scene:
        scene.submit({"steps": SHORT}, agents=True, peer_seconds=2)
        scene.until(lambda: scene._jobs()[0].life and life(scene).body, "the agents")
        life(scene).listener.server = None
        scene.patience = 300.0
        scene.over()
        assert (ends(scene), restarts(scene)) == (["complete"], "0")
        assert not (scene.runs[0].attempt(1) / "coordinator.json").exists()


def test_killed_guard_is_replaced(tmp_path):
    with staged("guard", tmp_path, kill_wait=5.0) as scene:
        scene.submit({"steps": LONG, "attempts": {"3": {"steps": SHORT}}}, agents=True, peer_seconds=2)
        scene.ready()
        life(scene).kill_guard()
        scene.kill(rank=1)
        scene.ready(2)
        life(scene).kill_owner()
        scene.patience = 300.0
        scene.over()
        assert (ends(scene), restarts(scene)) == (["crash", "stopped", "complete"], "1")


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("requeue", [True, False])
def test_job_whose_batch_step_was_killed_is_restarted_by_a_task(tmp_path, nodes, requeue):
    """Owner, guard and srun were killed at once. Slurm ends the job, and kills its tasks after KillWait."""
    with staged("step", tmp_path, kill_wait=15.0, requeue=requeue) as scene:
        scene.submit(AGAIN, agents=True, peer_seconds=2, shape={"nodes": nodes, "processes": 2 // nodes})
        scene.ready()
        life(scene).kill_batch_step()
        scene.patience = 300.0
        scene.until(lambda: scene.runs[0].result.exists(), "the result")
        assert ends(scene)[0] == "stopped" and len(ends(scene)) == 2
        assert len(scene.controller.jobs) == 2 - requeue, "no second successor"


def test_job_whose_batch_step_was_killed_is_restarted_before_its_ranks_are_killed(tmp_path):
    """They save for longer than KillWait."""
    with staged("slow", tmp_path, kill_wait=15.0) as scene:
        scene.submit({**AGAIN, "save": 60.0}, agents=True, peer_seconds=2)
        scene.ready()
        life(scene).kill_batch_step()
        scene.patience = 300.0
        scene.over()
        assert (ends(scene), restarts(scene)) == (["stopped", "complete"], "1")


@pytest.mark.parametrize("how", ["complete", "cancelled", "scancel"])
def test_job_whose_batch_step_was_killed_is_left_alone_if_its_run_is_over(tmp_path, how):
    with staged("over", tmp_path, kill_wait=15.0) as scene:
        scene.submit(AGAIN, agents=True, peer_seconds=2)
        scene.ready()
        (run,) = scene.runs
        if how == "complete":
            run.result.write_text("{}")
        elif how == "cancelled":
            write_json(run.cancel, {"who": "ann", "why": "test", "time": 0})
        else:
            scene.call("scancel", scene.id())
        life(scene).kill_batch_step()
        scene.patience = 300.0
        scene.over()
        assert (run.attempt_numbers(), restarts(scene)) == ([1], "0")


def test_spare_node_replaces_silent_one_when_slurm_has_noticed(tmp_path):
    """No connection ends. The coordinator's own patience is 120 s."""
    with staged("silent", tmp_path, node_timeout=20.0) as scene:
        scene.submit(AGAIN, agents=True, shape={"spares": 1})
        scene.ready()
        life(scene).loss_seconds = lambda: 3600.0
        start = scene.clock.now
        scene.controller.lose(scene.facts(1)["node"])
        scene.ready(2)
        assert 20.0 < scene.clock.now - start < 2.5 * 20.0 + 15.0
        scene.over()
        assert (ends(scene), restarts(scene)) == (["node", "complete"], "0")


def test_job_that_has_lost_its_first_node_is_requeued_by_another(tmp_path):
    """Also if Slurm does not answer for long."""
    with staged("first", tmp_path, kill_wait=5.0, node_timeout=30.0) as scene:
        scene.submit(AGAIN, agents=True, hours=2.0, shape={"spares": 1})
        scene.ready()
        scene.commands.trouble = lambda args: "silent"
        scene.controller.lose(scene.facts(0)["node"])
        scene.clock.run(scene.clock.now + 3 * PATIENCE_SECONDS)
        assert "could not restart job" in read_json(scene.runs[0].attempt(1) / "end.json")["remedy"]
        scene.commands.trouble = lambda args: ""
        scene.patience = 300.0
        scene.over()
        assert (ends(scene), restarts(scene)) == (["node", "complete"], "1")


def test_job_is_requeued_although_slurm_notices_the_loss_of_its_first_node_late(tmp_path):
    with staged("late", tmp_path, kill_wait=5.0, node_timeout=3 * PATIENCE_SECONDS) as scene:
        scene.submit(AGAIN, agents=True, hours=6.0, shape={"spares": 1})
        scene.ready()
        scene.controller.lose(scene.facts(0)["node"])
        scene.patience = 6 * PATIENCE_SECONDS
        scene.over()
        assert (ends(scene), restarts(scene)) == (["node", "complete"], "1")


def test_job_is_requeued_at_its_limit_if_slurm_has_not_noticed_the_loss_of_its_first_node(tmp_path):
    with staged("limit", tmp_path, kill_wait=15.0, node_timeout=10 * PATIENCE_SECONDS) as scene:
        scene.submit(AGAIN, agents=True, hours=0.5, shape={"spares": 1})
        scene.ready()
        scene.controller.lose(scene.facts(0)["node"])
        scene.patience = 20 * PATIENCE_SECONDS
        scene.over()
        assert (len(ends(scene)), ends(scene)[-1], restarts(scene)) == (2, "complete", "1")


def test_job_that_slurm_ends_for_its_lost_first_node_gets_a_successor(tmp_path):
    """Slurm does not requeue it, and no spare node lets it go on. TERM wakes the task on the other node."""
    with staged("fail", tmp_path, kill_wait=5.0, node_timeout=300.0, requeue=False) as scene:
        scene.submit(AGAIN, agents=True)
        scene.ready()
        scene.controller.lose(scene.facts(0)["node"])
        scene.patience = 1200.0
        scene.until(lambda: scene.runs[0].result.exists(), "the result")
        assert len(scene.runs[0].attempt_numbers()) == 2 and len(scene.controller.jobs) == 2


@pytest.mark.parametrize("is_node", [False, True])
def test_loss_while_ranks_save_is_no_crash(tmp_path, is_node):
    """The exit trap decides, because the run was asked to stop."""
    with staged("saving", tmp_path, node_timeout=30.0) as scene:
        scene.submit({**AGAIN, "save": 20.0}, agents=True, shape={"spares": 1})
        scene.ready()
        scene.call("scancel", "--batch", "--signal=USR1", scene.id())
        scene.clock.run(scene.clock.now + 3.0)
        if is_node:
            scene.controller.lose(scene.facts(1)["node"])
        else:
            life(scene).body.agents[1].kill()
        scene.patience = 300.0
        scene.over()
        assert (ends(scene), restarts(scene)) == (["node", "complete"], "1")


@pytest.mark.parametrize("how", ["flip", "scancel"])
def test_run_that_is_cancelled_between_two_attempts_of_its_job_ends(tmp_path, how):
    """Its end was recorded with a restart. The next agent imports the trainer."""
    with staged("between", tmp_path) as scene:
        scene.submit({"steps": LONG, "save": 1.0}, agents=True)
        scene.ready()
        life(scene).body.agents[1].kill()
        (run,) = scene.runs
        scene.until(lambda: attempts.last_end(run), "the end of the first attempt")
        assert attempts.last_end(run)["action"] == "requeue" and run.newest_attempt() == 1
        if how == "flip":
            scene.cancel()
        else:
            scene.call("scancel", scene.id())
        scene.patience = 300.0
        scene.over()
        assert (ends(scene)[-1], restarts(scene)) == ("cancelled", "0")
        assert states([run])[run.path].state == "cancelled"


def test_successor_continues_run_whose_last_attempt_could_not_be_read(tmp_path):
    """Slurm does not requeue the job. The exit trap knows the number of its first attempt alone."""
    storage = [""]
    with staged("follow", tmp_path, storage=lambda life: trouble(tmp_path, storage[0]), requeue=False) as scene:
        play = {"steps": LONG, "save": 1.0, "attempts": {"3": {"steps": SHORT}}}
        scene.submit(play, agents=True, hours=6.0)
        scene.ready()
        scene.kill(rank=1)
        scene.ready(2)
        storage[0] = "away"
        scene.kill(rank=1)
        scene.clock.run(scene.clock.now + RETRY_SECONDS + 300.0)
        storage[0] = ""
        scene.patience = 7200.0
        scene.until(lambda: scene.runs[0].result.exists(), "the result")
        assert ends(scene) == ["crash", "storage", "complete"]
