"""Ends an srun that outlives its ranks: it waits for ever if the slurmstepd of a node was killed.

Slurm does not notice this, also if a lost node is back before its timeout: the job would hold its nodes until its wall
limit. The watcher of the batch script calls ``LostStep.check`` now and then. The coordinator of node agents knows that
all have left, and calls ``kill_srun``.
"""

import os
import re
import signal
import time
from typing import Dict, Iterable, List, Optional

from flip.runs.rundir import RunDir, exists
from jobs.host import processes

POLL_SECONDS = 30.0  # between two checks
MARGIN_SECONDS = 120.0  # more than Slurm takes to kill ranks (KillWait) and to report their end (UnkillableStepTimeout)
DEFAULT_WAIT = 120  # seconds, if srun has no --wait
AFTER_AGENTS_SECONDS = 20.0  # for srun to end after all node agents have ended their ranks and have left


class LostStep:
    """Looks for the end of the ranks of attempt ``n`` of a run, from the host of its batch script."""

    def __init__(self, run: RunDir, n: int) -> None:
        self.run = run
        self.n = n
        self.had_ranks = False  # whether ranks have run on this host
        self.ended_at: Optional[float] = None  # when their end was first seen, by the monotonic clock

    def check(self) -> List[int]:
        """Kill srun if ranks have ended and it has not, for longer than it lets the other ranks run (``--wait``).

        Returns the pids of the processes of srun that were killed; the exit trap then decides as after any other end.
        """
        own = _own_environments(self.run, self.n)
        if not self._have_ended(list(own.values())):
            self.ended_at = None
            return []
        sruns = _sruns(own)
        now = time.monotonic()
        if self.ended_at is None:
            self.ended_at = now
        if not sruns or now - self.ended_at < _wait(sruns[0]) + MARGIN_SECONDS:
            return []
        return _kill(sruns)

    def _have_ended(self, environments: List[Dict[str, str]]) -> bool:
        """Whether a rank has left its cause, the run is complete, or no rank is left on this host."""
        has_ranks = any("RANK" in environ for environ in environments)
        self.had_ranks = self.had_ranks or has_ranks
        try:
            causes = [name for name in os.listdir(str(self.run.attempt(self.n))) if name.startswith("cause.")]
            return bool(causes) or exists(self.run.result) or (self.had_ranks and not has_ranks)
        except OSError:  # the file system may be away: asked again
            return False


def kill_srun(run: RunDir, n: int) -> List[int]:
    """Kill the srun of attempt ``n`` on this host; returns the pids of its processes."""
    return _kill(_sruns(_own_environments(run, n)))


def _own_environments(run: RunDir, n: int) -> Dict[int, Dict[str, str]]:
    """Pid of each process of an attempt on this host -> its environment."""
    own = {"FLIP_RUN": str(run.path), "FLIP_ATTEMPT": str(n)}
    environments = processes.own_environments().items()
    return {pid: environ for pid, environ in environments if own.items() <= environ.items()}


def _sruns(pids: Iterable[int]) -> List[int]:
    return [pid for pid in pids if processes.is_srun(processes.arguments(pid))]


def _kill(pids: List[int]) -> List[int]:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return pids


def _wait(pid: int) -> int:
    """Seconds that an srun waits for other ranks after the first has ended."""
    waits = [re.match("--wait=([0-9]{1,9})$", word) for word in processes.arguments(pid)]
    return max([int(match.group(1)) for match in waits if match], default=DEFAULT_WAIT)
