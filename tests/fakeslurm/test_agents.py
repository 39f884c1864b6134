"""Tests of runs with node agents on the simulated Slurm, beyond the recorded scenarios."""

from flip.runs.rundir import read_json
from tests.harness.simulated_scene import staged
from tests.slurm.scenarios import AGAIN, SHORT


def ends(scene):
    (run,) = scene.runs
    return [read_json(run.attempt(n) / "end.json")["cause"] for n in run.attempt_numbers()]


def restarts(scene):
    return scene.record()["job"]["Restarts"]


def life(scene):
    return scene._jobs()[0].life


def test_lost_node_without_spare_is_requeued(tmp_path):
    """The coordinator learns of it at once, Slurm later."""
    with staged("lost", tmp_path, kill_wait=5.0, node_timeout=30.0) as scene:
        scene.submit(AGAIN, agents=True, peer_seconds=2)
        scene.ready()
        scene.controller.lose(scene.facts(1)["node"])
        scene.over()
        assert (ends(scene), restarts(scene)) == (["node", "complete"], "1")


def test_killed_coordinator_leaves_ranks_to_srun(tmp_path):
    with staged("alone", tmp_path, kill_wait=5.0) as scene:
        scene.submit({"steps": SHORT}, agents=True, peer_seconds=2)
        scene.until(lambda: scene._jobs()[0].life and life(scene).body, "the agents")
        watcher = life(scene)._side_processes[0]
        assert life(scene).listener.server is not None
        watcher.kill()
        scene.over()
        assert (ends(scene), restarts(scene)) == (["complete"], "0")
        assert not (scene.runs[0].attempt(1) / "coordinator.json").exists()


def test_ranks_of_lost_coordinator_save_or_are_killed(tmp_path):
    """Its agents end with the code of a crash, and the exit trap requeues the job."""
    with staged("gone", tmp_path, kill_wait=5.0) as scene:
        scene.submit(AGAIN, agents=True, peer_seconds=2)
        scene.ready()
        life(scene)._side_processes[0].kill()
        scene.patience = 300.0
        scene.over()
        assert (ends(scene), restarts(scene)) == (["crash", "complete"], "1")
