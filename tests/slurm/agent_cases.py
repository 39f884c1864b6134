"""Faults of a run with node agents: one table, played on the simulated Slurm and on a real one.

``tests/fakeslurm/test_agents.py`` and ``tests/slurm/test_agents.py`` play every row. Two nodes with one rank each, if
``shape`` says nothing else. What one of both alone can cause or observe, silence of a node, stopped processes and
clocks, has tests of its own there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.slurm.scenarios import AGAIN, LONG, SHORT

TWICE = {"steps": LONG, "save": 1.0, "attempts": {"3": {"steps": SHORT}}}
"""Finishes in its third attempt."""
ONE_NODE = {"nodes": 1, "processes": 2}
SPARE = {"spares": 1}


@dataclass(frozen=True)
class AgentCase:
    """``act`` causes the faults when all ranks of the first attempt run."""

    act: Callable
    causes: tuple[str, ...]
    """Causes of the attempts."""
    restarts: int
    """Of the job by Slurm: 0 means that the run went on in its job."""
    state: str = "complete"
    play: dict = field(default_factory=lambda: AGAIN)
    shape: dict = field(default_factory=dict)
    hours: float = 0.5
    worlds: tuple[str, ...] = ()
    """Ranks of each attempt, if they change."""
    also: tuple[str, ...] = ()
    """Other causes of the first attempt: on a real Slurm it is a matter of milliseconds who notices the fault first."""
    options: dict = field(default_factory=lambda: {"peer_seconds": 2})
    """Fields of the profile."""
    node_timeout: float = 30.0
    """Seconds after which the simulated Slurm notices a lost node."""


def killed_rank_and_agent(scene):
    scene.kill(rank=1)
    scene.ready(2)
    scene.kill_agent(0, 2)


def killed_agent_and_rank(scene):
    scene.kill_agent(1)
    scene.ready(2)
    scene.kill(rank=0, n=2)


def killed_task(scene):
    """Slurm does not start a task again: its node has no agent any more."""
    scene.kill_task(1)


def preempted_after_restart(scene):
    scene.kill(rank=0)
    scene.ready(2)
    scene.preempt()


def owner_killed_after_restart(scene):
    scene.kill(rank=0)
    scene.ready(2)
    scene.kill_shell()


def warned(scene):
    scene.call("scancel", "--batch", "--signal=USR1", scene.id())


def cancelled_by_slurm(scene):
    scene.call("scancel", scene.id())


def cancelled_by_flip(scene):
    scene.cancel()


def killed_batch_step(scene):
    """Owner, guard and srun at once, as cgroups do: only the tasks of the agents can restart the job."""
    scene.kill_batch_step()


def lost_node(scene):
    scene.lose(1)


def lost_first_node(scene):
    """Slurm lets a job with a spare node go on without its owner, the guard and srun."""
    scene.lose(0)


def lost_node_is_back(scene):
    """It is back before Slurm has noticed. srun would wait for the task of that node for ever."""
    lost = scene.lose(1)
    scene.ready(2)
    scene.here.bring_back(lost)


NOTICED = ("crash", "stopped")
IN_CI = "killed_rank_then_agent"
"""The row that ``make test`` plays on a real Slurm; ``make test-all`` plays all."""
CASES = {  # the names are parts of paths
    "killed_rank_then_agent": AgentCase(killed_rank_and_agent, ("crash", "node", "complete"), 0, play=TWICE),
    "killed_agent_then_rank": AgentCase(killed_agent_and_rank, ("node", "crash", "complete"), 0, play=TWICE),
    "killed_task": AgentCase(killed_task, ("node", "complete"), 1, also=NOTICED),
    "preempted_after_restart": AgentCase(preempted_after_restart, ("crash", "stopped", "complete"), 1, play=TWICE),
    "killed_owner_after_restart": AgentCase(
        owner_killed_after_restart, ("crash", "stopped", "complete"), 1, play=TWICE
    ),
    "warned": AgentCase(warned, ("stopped", "complete"), 1),
    "cancelled_by_scancel": AgentCase(cancelled_by_slurm, ("cancelled",), 0, state="cancelled"),
    "cancelled_by_flip": AgentCase(cancelled_by_flip, ("cancelled",), 0, state="cancelled"),
    "killed_batch_step": AgentCase(killed_batch_step, ("stopped", "complete"), 1),
    "killed_batch_step_one_node": AgentCase(killed_batch_step, ("stopped", "complete"), 1, shape=ONE_NODE),
    "killed_batch_step_saves_outlast_KillWait": AgentCase(
        killed_batch_step, ("stopped", "complete"), 1, play={**AGAIN, "save": 30.0}, shape=ONE_NODE
    ),
    "lost_node": AgentCase(lost_node, ("node", "complete"), 1, also=NOTICED),
    "lost_node_a_spare": AgentCase(lost_node, ("node", "complete"), 0, shape=SPARE),
    "lost_node_is_back_a_spare": AgentCase(
        lost_node_is_back, ("node", "complete"), 0, shape=SPARE, node_timeout=3600.0
    ),
    "lost_node_a_range": AgentCase(
        # The wall limit is near enough to go on with fewer nodes, after a minute for the agent to come back.
        lost_node, ("node", "complete"), 0, shape={"least_nodes": 1, "usable": (1, 2)}, hours=0.25, worlds=("2", "1"),
        options={},
    ),
    "lost_first_node": AgentCase(lost_first_node, ("stopped", "complete"), 1, also=("node", "crash")),
    "lost_first_node_a_spare": AgentCase(
        lost_first_node, ("stopped", "complete"), 1, shape=SPARE, also=("node", "crash")
    ),
}  # fmt: skip
