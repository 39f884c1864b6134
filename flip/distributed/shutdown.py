"""Signals become a flag, and the flag becomes a decision of all ranks (docs/contracts.md, Stop and resume).

No torch at import: the handlers stand before anything slow is loaded, so that no signal is lost. The agreement's
collective comes from the group that is given to it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from flip.runs.errors import STOPPED
from flip.runs.rundir import RunDir

log = logging.getLogger(__name__)

GRACE = 90.0
"""Seconds to save and leave once nobody looks after this process any more."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1)
"""What a cluster sends: SIGTERM (preemption, time limit, cancel) and the warning signal; SIGUSR1 means the same."""


CANCELLED = "cancelled"
"""Reason of a stop because cancel.json exists."""


class StopFlag:
    """Set by a signal, by the supervisor's death, or by the trainer itself. Only ever goes from clear to set."""

    def __init__(self) -> None:
        self.reason = ""
        self.signal = ""
        """Name of the signal that came first, where one came."""
        self._heard: Callable[[], None] | None = None

    def tell(self, heard: Callable[[], None]) -> None:
        """``heard`` is called once it is set, or now: a process that is killed before it can say why has then said so.

        It may be called twice, by a signal between two lines of this.
        """
        self._heard = heard
        if self.reason:  # by a signal that waited for ``install``
            heard()

    def set(self, reason: str, signal_name: str = "") -> None:
        if not self.reason:
            self.reason, self.signal = reason, signal_name
            if self._heard is not None:
                self._heard()

    def __bool__(self) -> bool:
        return bool(self.reason)


def install() -> StopFlag:
    """Install the handlers; where FLIP_LEASH_FD is given, watch for the end of the process at its other end."""
    flag = StopFlag()
    for number in SIGNALS:
        signal.signal(number, lambda n, _frame: flag.set(f"signal {signal.Signals(n).name}", signal.Signals(n).name))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # jobs/host/rank_entry.py holds them back until here
    leash = os.environ.pop("FLIP_LEASH_FD", "")
    if leash:
        threading.Thread(target=_watch, args=(int(leash), flag), name="leash", daemon=True).start()
    return flag


def _watch(descriptor: int, flag: StopFlag) -> None:
    os.set_inheritable(descriptor, False)  # a loader's worker must not hold anything of it
    while os.read(descriptor, 1):
        pass
    flag.set("the supervisor is gone")
    time.sleep(GRACE)
    os._exit(STOPPED)  # stuck where the flag is not read, as in waiting for ranks that never came


class RunWatcher:
    """Sets the stop flag when the run is cancelled or a newer attempt takes it over.

    A thread polls the run directory once a second, so that a file system that stalls never stalls a training step.
    """

    def __init__(self, run: RunDir, attempt: int, flag: StopFlag, seconds: float = 1.0) -> None:
        self._run, self._attempt, self._flag, self._seconds = run, attempt, flag, seconds
        self._closed = threading.Event()

    def start(self) -> None:
        """Look once now, since the cancelling signal may have come before its handler was installed; then poll."""
        self._poll()
        threading.Thread(target=self._watch, name="run-watcher", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._flag and not self._closed.wait(self._seconds):
            self._poll()

    def _poll(self) -> None:
        try:
            if not self._run.holds(self._attempt):
                self._flag.set("superseded by a newer attempt")
            elif self._run.cancel.exists():
                self._flag.set(CANCELLED)
        except OSError as error:  # a save, which cannot do without the file system, reports it as storage
            log.warning("the run directory cannot be read, retried in %g s: %s", self._seconds, error)


class Agreement:
    """All ranks learn at the same step what one rank wants: ``stop``, or ``save`` (only rank 0's clock asks for that).

    A MAX over two numbers runs beside the step and is read at the next call, so nobody waits for the slowest rank
    (0.4 ms a step instead of 7 ms with four processes on two cores; measured).
    """

    def __init__(self, group: Any, size: int) -> None:
        self._group, self._size = group, size
        self._pending: tuple[Any, Any] | None = None

    def poll(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """(stop, save) as agreed by the previous call of all ranks; with one rank, as given. A collective."""
        if self._size == 1:
            return stop, save
        import torch
        from torch import distributed

        agreed = self.settle()
        wish = torch.tensor([float(stop), float(save)])
        work = distributed.all_reduce(wish, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, wish)
        return agreed

    def now(self, stop: bool) -> bool:
        """Whether a rank wants to stop, answered by this very call: all wait for the slowest. A collective."""
        before, _ = self.poll(stop, False)
        return self.settle()[0] or before

    def settle(self) -> tuple[bool, bool]:
        """Wait for the call in flight, so that the group is free for other use."""
        if self._pending is None:
            return False, False
        work, wish = self._pending
        work.wait()
        self._pending = None
        return bool(wish[0] > 0), bool(wish[1] > 0)
