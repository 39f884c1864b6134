"""What the owner of a job (``job.py``) looks at while it waits: the wall limit, and the jobs that wait for a canary.

Standard library, Python >= 3.6.
"""

import time
from typing import Any, Callable, List, Mapping, Optional

from flip.runs import canary
from flip.runs.restart_policy import UNKNOWN
from flip.runs.rundir import RunDir
from jobs.host import held_jobs, own_job, slurm_cli
from jobs.host.scheduler import Scheduler

CANARY_SECONDS = 10.0  # between two looks at a canary
FOREVER = float("inf")


class LimitWatch:
    """Notices that the scheduler ends the job for its wall limit, for a preemption, or for lost nodes.

    It asks seldom, but every second and with a short deadline near the limit: only KillWait remains between TERM and
    KILL. ``on_end``: called with one of ``own_job.ENDS_AROUND_RANKS``. ``on_limit``: called with the limit, in seconds.
    """

    def __init__(
        self, scheduler: Scheduler, on_end: Callable[[str], None], on_limit: Callable[[Optional[int]], None]
    ) -> None:
        self.due = 0.0
        """When ``look`` asks the scheduler next, by the monotonic clock."""
        self._limit_at = FOREVER
        """When the limit comes, or earlier, by the monotonic clock."""
        self._is_hurried = False
        """Whether ``hurry`` was called since the last question."""
        self._scheduler = scheduler
        self._on_end = on_end
        self._on_limit = on_limit

    def look_soon(self) -> None:
        self.due = 0.0

    def hurry(self) -> None:
        """The scheduler may be ending the job. Signal handlers call it, perhaps while ``look`` waits for an answer."""
        self.due = 0.0
        self._limit_at = 0.0
        self._is_hurried = True

    def look(self) -> None:
        """Ask the scheduler if that is due."""
        now = time.monotonic()
        if now < self.due:
            return
        near = self._limit_at - now <= own_job.NEAR_LIMIT_SECONDS
        self._is_hurried = False
        seen = self._scheduler.see(slurm_cli.SHORT_DEADLINE if near else slurm_cli.DEADLINE)
        now = time.monotonic()
        self.due = FOREVER
        if seen.state is None:
            self.due = now + (1.0 if near else own_job.UNANSWERED_POLL_SECONDS)
        elif seen.ending in own_job.ENDS_AROUND_RANKS:
            self._on_end(seen.ending)
            self._on_limit(seen.limit)  # it may have been lowered
        elif seen.state != UNKNOWN and not seen.ending and seen.seconds_left is not None:
            self._on_limit(seen.limit)
            left = max(1.0, seen.seconds_left)
            self._limit_at = now + left
            self.due = now + min(left, own_job.LIMIT_POLL_SECONDS)
        if self._is_hurried and seen.ending not in own_job.ENDS_AROUND_RANKS:  # the answer may be older than the signal
            self.due = now
            self._limit_at = now


class CanaryWatch:
    """Releases the jobs that wait for a canary as soon as it has passed."""

    def __init__(self, run: RunDir, log: Callable[[object], None]) -> None:
        self.due = FOREVER
        """When ``look`` does something next, by the monotonic clock."""
        self._run = run
        self._log = log
        self._record: Mapping[str, Any] = {}
        self._absent: List[float] = []

    def watch(self, record: Mapping[str, Any]) -> None:
        """``record``: of the canary (``canary.canary_of``); empty for any other run."""
        self._record = record
        if record.get("releases"):
            self.due = 0.0

    def look(self) -> None:
        """Release the jobs that wait if that is due."""
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + CANARY_SECONDS
        try:
            passed = canary.has_passed(self._run, self._record)
            if passed and held_jobs.release_passed(self._run, self._record, self._absent, self._log):
                self.due = FOREVER
        except (OSError, ValueError, slurm_cli.SlurmUnavailable) as error:
            self._log(error)
