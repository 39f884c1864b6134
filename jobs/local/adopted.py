"""Attempts whose ranks this process did not start, or whose agent has died: pids.json names them, and they end by
their lifeline. They are watched, asked to stop, and killed at a deadline."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Sequence

from flip.runs import temporary_folders
from flip.runs.rundir import RunDir, read_record
from jobs.host import processes
from jobs.host.sessions import HAS_PROC, is_rank, kill_session

TERM_INTERVAL = 3.0  # seconds between two SIGTERMs: one that comes while a rank starts may be lost


class AdoptedRank:
    """A rank whose exit code is lost, and whose pid only a record names."""

    def __init__(self, pid: int, start: str, run: RunDir, n: int) -> None:
        self.pid = pid
        self.start = start
        self.run = run
        self.n = n

    def is_alive(self) -> bool:
        return is_rank(self.pid, self.start, self.run, self.n)

    def kill(self) -> None:
        """SIGKILL those processes of the session that belong to the attempt; all if the rank lives."""
        if self.is_alive():
            kill_session(self.pid, self.start)
        elif HAS_PROC:
            kill_session(self.pid, self.start, lambda pid: processes.is_of_attempt(pid, str(self.run.path), self.n))


class AdoptedAttempt:
    """Attempt n of a run. At its deadline it is killed."""

    agent = None
    code = None
    failure = None
    noticed = None  # when a rank was seen to fail
    observed = False  # whether its launcher saw its end

    def __init__(self, run: RunDir, n: int, ranks: Sequence[AdoptedRank]) -> None:
        self.run = run
        self.n = n
        self.ranks = ranks
        self.deadline = float("inf")
        self.has_unknown_ranks = False  # unrecorded ranks may live: it is over at its deadline, not before
        self.stop_requested = False  # whether a rank was asked to save and stop
        self.gpus: Sequence[str] = ()  # names of the devices that it was given, as in CUDA_VISIBLE_DEVICES
        self._next_term = 0.0  # monotonic time of the next SIGTERM

    @property
    def world(self) -> int:
        return len(self.ranks)

    def poll(self) -> bool:
        """Whether all ranks have ended and nothing of them is left."""
        lives = self.has_unknown_ranks or any(rank.is_alive() for rank in self.ranks)
        if lives and time.monotonic() < self.deadline:
            return False
        for rank in self.ranks:
            rank.kill()
        return not any(rank.is_alive() for rank in self.ranks)

    def shorten_deadline(self, seconds: float) -> None:
        """Kill ranks that live longer than this from now on."""
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def terminate(self, seconds: float) -> None:
        """Ask all ranks to save and stop; SIGKILL ``seconds`` after the first call. Called until they have ended."""
        if time.monotonic() < self._next_term:
            return
        self._next_term = time.monotonic() + TERM_INTERVAL
        self.shorten_deadline(seconds)
        for rank in self.ranks:
            if rank.is_alive():
                self.stop_requested = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGTERM)

    def close(self) -> None:
        temporary_folders.delete_left(self.run, self.n)


def adopt(run: RunDir, n: int, patience: float) -> AdoptedAttempt:
    """Attempt n of a supervisor or agent that died: its ranks stop by the lifeline within ``patience`` seconds, or are
    killed.

    Ranks of another host, and those that pids.json does not name yet, can only be waited for.
    """
    record = read_record(run.attempt(n) / "pids.json") or []
    start = read_record(run.attempt(n) / "start.json") or {}
    local = start.get("host") == socket.gethostname()
    attempt = AdoptedAttempt(run, n, [AdoptedRank(row["pid"], row["start"], run, n) for row in record if local])
    attempt.gpus = start.get("gpus", ())
    attempt.has_unknown_ranks = attempt.world < start.get("world", 0)  # without a start.json none was started
    attempt.shorten_deadline(patience)
    return attempt
