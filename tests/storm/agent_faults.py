"""Faults of the site whose runs have node agents: what kills and stops the agents."""

import os
import signal

from jobs.host import processes
from tests.storm.faults import AGENTS, kind

SITE = (AGENTS,)


def _signal_agent(run, number):
    """Send a signal to the agent of a rank that is drawn."""
    row = run.rng.choice(run.ranks())
    os.kill(int(processes.read_stat(row["pid"])[1][1]), number)


@kind(20, sites=SITE)
def agent_killed(run):
    _signal_agent(run, signal.SIGKILL)
    run.wait_end()
    return "SIGKILL to a node agent"


@kind(20, sites=SITE)
def agent_stopped(run):
    _signal_agent(run, signal.SIGSTOP)
    run.wait_end()
    return "SIGSTOP to a node agent"


@kind(25, sites=SITE)
def agent_and_rank_killed(run):
    """A second fault while the run recovers from the first."""
    _signal_agent(run, signal.SIGKILL)
    run.wait_attempt(run.attempt + 1)
    rows = run.ranks()
    os.kill(run.rng.choice(rows)["pid"], signal.SIGKILL)
    run.wait(lambda: run.run.newest_attempt() > run.attempt + 1 or run.over(), "the attempt after the second fault")
    return "SIGKILL to a node agent, then to a rank of the next attempt while it starts"


@kind(30, sites=SITE)
def coordinator_killed(run):
    """The watcher of the batch script dies: the agents let the ranks save, and the exit trap requeues the run."""
    for pid, environ in processes.own_environments().items():
        if environ.get("FLIP_RUN") == str(run.run.path) and "watch" in processes.arguments(pid):
            os.kill(pid, signal.SIGKILL)
    run.wait_end()
    return "SIGKILL to the coordinator of the node agents"
