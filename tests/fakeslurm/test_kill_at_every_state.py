"""Kills an agent, its task, the owner of the job, its batch step, and its node in every state of the owner, on the
simulated Slurm.

``tests/jobs/host/agents/test_kill_at_every_state.py`` does it with real processes, without Slurm.
"""

import pytest

from flip.runs.rundir import read_json
from tests.harness.simulated_scene import staged

PLAY = {"steps": 2200}
"""Almost two minutes, longer than ranks without an owner may live: these do not save."""
STATES = ["gather", "run", "kill", "decide", "between", "left"]
"""Before kill and decide a rank was killed. between: the next attempt is prepared, after the agents of all nodes but
the first were killed. left: the run is complete, and the agents end."""
EXPECTED = {
    "agent": (["complete"], ["node", "complete"], ["node", "complete"], ["crash", "complete"], ["node", "complete"]),
    "task": (
        ["complete"],
        ["node", "complete"],
        ["node", "complete"],
        ["crash", "complete"],
        ["node", "complete"],
    ),
    "first node": (["node", "complete"],) * 5,
    "owner": (
        ["node", "complete"],
        ["stopped", "complete"],
        ["stopped", "complete"],
        ["node", "complete"],
        ["node", "complete"],
    ),
    "batch step": (
        ["node", "complete"],
        ["stopped", "complete"],
        ["stopped", "complete"],
        ["node", "complete"],
        ["node", "complete"],
    ),
}
"""Process that is killed -> causes of the attempts, by state. When all have left, it is complete in any case."""
REQUEUES = {
    "agent": "000000",
    "task": "011110",
    "first node": "111110",
    "owner": "111110",
    "batch step": "111110",
}


def enter(scene, state):
    """Let the simulation run until the coordinator is in a state."""
    scene.until(lambda: life(scene) and life(scene).has_coordinator and life(scene).body, "the coordinator")
    if state == "gather":
        return
    coordinator = life(scene).listener.server.coordinator
    scene.ready()
    if state in ("kill", "decide"):
        scene.kill(rank=1)
    elif state == "between":
        for agent in life(scene).body.agents[1:]:
            agent.kill()
    name = {"between": "gather"}.get(state, state)
    scene.clock.run(scene.clock.now + 300.0, lambda: coordinator.state.value == name)
    assert coordinator.state.value == name


def life(scene):
    return scene._jobs()[0].life


CASES = [(state, victim) for state in STATES for victim in EXPECTED]
CASES.remove(("left", "first node"))
"""Without its first node and without tasks, a job of a complete run goes on until its wall limit."""
CASES.remove(("left", "batch step"))
"""The run is complete, but no process is left that could record the end of its attempt."""


@pytest.mark.parametrize("state, victim", CASES)
def test_run_goes_on_after_kill_in_state(state, victim, tmp_path):
    with staged("kill", tmp_path, kill_wait=5.0, node_timeout=30.0) as scene:
        scene.commands.latency = 0.05  # for which it decides
        scene.patience = 900.0
        scene.submit(PLAY, agents=True, peer_seconds=2, shape={"spares": int(victim == "first node")})
        enter(scene, state)
        first = life(scene)
        if victim == "owner":
            first.kill_owner()
        elif victim == "batch step":
            first.kill_batch_step()
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
        expected = (*EXPECTED[victim], ["complete"])[number]
        assert (ends, scene.record()["job"]["Restarts"]) == (expected, REQUEUES[victim][number])
