"""Outages of storage, as people see them while they last: one line when one is noticed, one when it is over.

``Outages`` watches the requests of one process. ``Board`` puts together what the loader processes of a rank report.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from flip.data.storage.base import Fault
from flip.data.storage.retry import Clock

log = logging.getLogger("flip.data")

AFTER = 10.0
"""Seconds without a successful request after which an outage is reported, and between two later reports of it."""


class Outage(NamedTuple):
    """No request has succeeded for ``seconds``, though ``retries`` were made; ``over``: until now."""

    since: float
    """Unix time."""
    seconds: float
    retries: int
    fault: str
    """The last one."""
    over: bool = False

    def __str__(self) -> str:
        if self.over:
            return f"storage answers again, after {self.seconds:.0f} s and {self.retries} retries"
        since = time.strftime("%H:%M:%S", time.localtime(self.since))
        return f"storage does not answer since {since}, {self.retries} retries, the last: {self.fault}"


class Outages:
    """Notices that no request of this process succeeds. Threads may share one.

    ``report`` is called after ``AFTER`` seconds, again while it lasts, and once when it is over; by default that is a
    warning in the log when it begins and one when it ends.
    """

    def __init__(self, report: Callable[[Outage], None] | None = None, clock: Clock | None = None) -> None:
        self._report, self._clock = report or Board().add, clock or Clock()
        self._lock = threading.Lock()
        self._answered = self._clock.now()
        self._since = self._reported = 0.0
        self._retries, self._fault = 0, ""

    def succeeded(self) -> None:
        """A request did."""
        with self._lock:
            self._answered = self._clock.now()
            over = self._outage(over=True) if self._reported else None
            self._retries, self._reported = 0, 0.0
        if over:
            self._report(over)

    def failed(self, begin: float, fault: Fault) -> None:
        """A request did that was first made at ``begin``, by the clock."""
        with self._lock:
            if not self._retries:
                self._since = max(self._answered, begin)
            self._retries, self._fault = self._retries + 1, str(fault)

    def sleep(self, seconds: float) -> None:
        """The pause after a failure; a report that is due in the middle of it is not late."""
        with self._lock:
            due = max(0.0, (self._reported or self._since) + AFTER - self._clock.now())
        if due < seconds:
            self._clock.sleep(due)
            self._look()
            seconds -= due
        self._clock.sleep(seconds)

    def _look(self) -> None:
        """Report an outage that has lasted, unless another thread has done so."""
        with self._lock:
            now = self._clock.now()
            if not self._retries or now < (self._reported or self._since) + AFTER:
                return
            self._reported, found = now, self._outage()
        self._report(found)

    def _outage(self, over: bool = False) -> Outage:
        seconds = self._clock.now() - self._since
        return Outage(time.time() - seconds, seconds, self._retries, self._fault, over)


class Board:
    """The outages that several processes report, as one: of all of them a warning when it begins and when it ends.

    ``show`` is called with its text at each report, and with None when it is over.
    """

    def __init__(self) -> None:
        self.show: Callable[[str | None], None] = lambda text: None
        self._lock = threading.Lock()
        self._open: dict[int, Outage] = {}

    def add(self, outage: Outage, process: int = 0) -> None:
        """What a process reports."""
        with self._lock:
            first = not self._open
            if outage.over:
                self._open.pop(process, None)
            else:
                self._open[process] = outage
            if self._open:
                least = min(self._open.values())
                outage = least._replace(retries=sum(one.retries for one in self._open.values()), fault=outage.fault)
            if first or outage.over:
                log.warning("%s", outage)
            self.show(None if outage.over else str(outage))

    def clear(self) -> None:
        """The processes are gone."""
        with self._lock:
            if self._open:
                self._open.clear()
                self.show(None)
