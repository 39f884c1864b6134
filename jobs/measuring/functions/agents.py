"""Kills the agent of a run on this node after its first checkpoint.

``python -m jobs.measuring.functions.agents RUN SECONDS``.
Standard library, Python >= 3.6: on a node it runs with the interpreter of batch scripts.
"""

import os
import signal
import sys
import time
from typing import List

from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir
from jobs.host import processes

MODULE = "jobs.runtime.node_agent"
POLL = 0.02
"""Seconds between two looks at the files of a run."""


def agents(run: str) -> List[int]:
    """Pids of the agents of a run on this machine, without the ranks that they have forked."""
    pids = [pid for pid in processes.own_environments() if {MODULE, run} <= set(processes.arguments(pid))]
    return [pid for pid in pids if int((processes.read_stat(pid)[1][1:2] or ["0"])[0]) not in pids]


def end_agents(run: str) -> None:
    """Kill the agents of a run on this machine. Raises SystemExit if none runs."""
    pids = agents(run)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    if not pids:
        raise SystemExit("no agent of the run runs on this node")


def end_agents_after_checkpoint(run: str, seconds: float) -> None:
    """Kill them as soon as the run has a checkpoint. Raises SystemExit if it has none in ``seconds``."""
    end = time.monotonic() + seconds
    while not checkpoint_folder.checkpoints(RunDir(run)):
        if time.monotonic() > end:
            raise SystemExit("no time was left for a first checkpoint")
        time.sleep(POLL)
    end_agents(run)


if __name__ == "__main__":
    end_agents_after_checkpoint(sys.argv[1], float(sys.argv[2]))
