"""The ranks of a job that srun starts without node agents: each attempt is a step, and each restart a requeue.

Slurm below 23.02, containers and sites that refuse agents work so. srun waits for ever if the slurmstepd of a node was
killed: Slurm does not notice this, also if a lost node is back before its timeout, and the job would hold its nodes
until its wall limit. So a step that outlives its ranks is killed. Standard library, Python >= 3.6.
"""

import os
import subprocess
import time
from typing import Any, Callable, Optional

from flip.runs.rundir import RunDir
from jobs.host import processes

LOOK_SECONDS = 30.0  # between two looks for ranks
MARGIN_SECONDS = 120.0  # more than Slurm takes to kill ranks (KillWait) and to report their end (UnkillableStepTimeout)


class RankStep:
    """The step of attempt ``n`` of a run. ``process``: of srun. ``peer_seconds``: for which srun lets the other ranks
    run after the end of the first (``--wait``)."""

    def __init__(self, run: RunDir, n: int, process: Any, peer_seconds: float, log: Callable[[object], None]) -> None:
        self._run = run
        self._n = n
        self._process = process
        self._longest = peer_seconds + MARGIN_SECONDS
        self._log = log
        self._look_at = time.monotonic() + LOOK_SECONDS
        self._had_ranks = False
        self._ended_at: Optional[float] = None
        """When the end of the ranks was first seen."""

    def poll(self, seconds: float) -> None:
        """Wait for the end of the step for ``seconds``; look for its ranks if that is due."""
        try:
            self._process.wait(seconds)  # looks every 50 ms: the end of the attempt is to be recorded at once
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_SECONDS
            self._end_if_lost()

    def code(self) -> Optional[int]:
        """The exit code of srun, as a shell shows it; None while it runs."""
        return exit_code(self._process.poll())

    def _end_if_lost(self) -> None:
        if not self._have_ended():
            self._ended_at = None
        elif self._ended_at is None:
            self._ended_at = time.monotonic()
        elif time.monotonic() - self._ended_at >= self._longest and self._process.poll() is None:
            self._log("srun was killed: its ranks have ended, and Slurm did not notice")
            self._process.kill()

    def _have_ended(self) -> bool:
        """Whether a rank has left its cause, the run is complete, or no rank is left on this host."""
        has_ranks = self._has_ranks()
        self._had_ranks = self._had_ranks or has_ranks
        try:
            causes = [name for name in os.listdir(str(self._run.attempt(self._n))) if name.startswith("cause.")]
            return bool(causes) or self._run.is_complete() or (self._had_ranks and not has_ranks)
        except OSError:  # the file system may be away: asked again
            return False

    def _has_ranks(self) -> bool:
        own = {"FLIP_RUN": str(self._run.path), "FLIP_ATTEMPT": str(self._n)}
        environments = processes.own_environments().values()
        return any("RANK" in environ and own.items() <= environ.items() for environ in environments)


def exit_code(code: Optional[int]) -> Optional[int]:
    """An exit code of subprocess as a shell shows it: 128 + n for a process that signal n has ended."""
    if code is None or code >= 0:
        return code
    return 128 - code
