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
