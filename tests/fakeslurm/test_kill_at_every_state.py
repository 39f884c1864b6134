"""Kills an agent, its task, the coordinator, and its node in every state of the coordinator, on the simulated Slurm.

``tests/jobs/host/agents/test_kill_at_every_state.py`` does it with real processes, without Slurm.
"""

import pytest

from flip.runs.rundir import read_json
from jobs.host.agents.coordinator import State
from tests.harness.simulated_scene import staged

PLAY = {"steps": 2200}
"""Almost two minutes, longer than ranks without a coordinator may live: these do not save."""
STATES = [State.GATHER, State.RUN, State.KILL, State.DECIDE]
EXPECTED = {
    "agent": (["complete"], ["node", "complete"], ["node", "complete"], ["crash", "complete"]),
    "task": (["crash", "complete"], ["node", "complete"], ["node", "complete"], ["crash", "complete"]),
    "first node": (["node", "complete"],) * 4,
    "coordinator": (["complete"], ["crash", "complete"], ["crash", "complete"], ["crash", "complete"]),
}
"""Process that is killed -> causes of the attempts, by state. In the last two states a rank was killed before."""
REQUEUES = {"agent": "0000", "task": "1111", "first node": "1111", "coordinator": "0111"}


def enter(scene, state):
    """Let the simulation run until the coordinator is in a state."""
    scene.until(lambda: life(scene) and life(scene).has_coordinator and life(scene).body, "the coordinator")
    if state is State.GATHER:
        return
    coordinator = life(scene).listener.server.coordinator
    scene.ready()
    if state is not State.RUN:
        scene.kill(rank=1)
    scene.clock.run(scene.clock.now + 60.0, lambda: coordinator.state is state)
    assert coordinator.state is state


def life(scene):
    return scene._jobs()[0].life


@pytest.mark.parametrize("victim", EXPECTED)
@pytest.mark.parametrize("state", STATES)
def test_run_goes_on_after_kill_in_state(state, victim, tmp_path):
    with staged("kill", tmp_path, kill_wait=5.0, node_timeout=30.0) as scene:
        scene.commands.latency = 0.05  # for which it decides
        scene.patience = 900.0
        scene.submit(PLAY, agents=True, peer_seconds=2, shape={"spares": int(victim == "first node")})
        enter(scene, state)
        first = life(scene)
        if victim == "coordinator":
            first.kill_coordinator()
        elif victim == "first node":
            scene.controller.lose(first.host.name)
        elif victim == "task":
            first.body.agents[0].kill_task()
        else:
            first.body.agents[0].kill()
        scene.over()
        (run,) = scene.runs
        ends = [read_json(run.attempt(n) / "end.json")["cause"] for n in run.attempt_numbers()]
        number = STATES.index(state)
        assert (ends, scene.record()["job"]["Restarts"]) == (EXPECTED[victim][number], REQUEUES[victim][number])
