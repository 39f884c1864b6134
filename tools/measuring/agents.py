"""``python -m tools.measuring.agents RUN``: kills the agent of a run on this node.

Standard library, Python >= 3.6: on a node it runs with the interpreter of batch scripts.
"""

import os
import signal
import sys
from typing import List

from jobs.host import processes

MODULE = "jobs.runtime.node_agent"


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


if __name__ == "__main__":
    end_agents(sys.argv[1])
