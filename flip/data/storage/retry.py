"""Retries, second requests, concurrency limit and outage reports of storage clients.

Failed requests are retried with exponential back-off and full jitter until a deadline in minutes, so that many clients
survive an outage of their storage and do not all return at once when it ends.
"""

from __future__ import annotations

import enum
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from flip.data.storage.base import RequestError
from flip.runs.errors import DataError, FlipError, PermissionDenied, StorageError

log = logging.getLogger("flip.data")


class ErrorWording(NamedTuple):
    """How errors speak of what was tried."""

    doing: str = "reading"
    verb: str = "read"
    thing: str = "the shard"
    remedy: str = "Restore it, or index the others again."


class RetryAction(enum.Enum):
    AGAIN = "wait, then try again"
    SLOWER = "the same, and with fewer requests at once"
    RECONNECT = "the same, over fresh connections with fresh credentials"
    DENIED = "anew if access was has_ever_succeeded before, else once more at most"
    LIMITED = "the same a few times, then give up"
    NEVER = "it cannot pass"


ACTION_BY_KIND = {
    "slowdown": RetryAction.SLOWER,  # 503, 429, SlowDown
    "server": RetryAction.AGAIN,  # 500, 502, 504, an answer that cannot be read
    "connection": RetryAction.AGAIN,  # refused, reset, broken off
    "stall": RetryAction.AGAIN,  # nothing came for too long
    "short": RetryAction.AGAIN,  # other bytes than asked for, though announced as complete
    "checksum": RetryAction.RECONNECT,  # the reader's CRC32
    "expired": RetryAction.RECONNECT,  # credentials
    "denied": RetryAction.DENIED,  # 401, 403, no credentials
    "refused": RetryAction.LIMITED,  # other 4xx: some servers' answer to a range beyond the end, or to a wrong region
    "missing": RetryAction.NEVER,  # 404
    "changed": RetryAction.NEVER,  # another ETag, or shorter than what was read before
    "io": RetryAction.AGAIN,  # a local file system's errors
}
"""Class of fault -> what to do."""


_FEW = 4


@dataclass(frozen=True)
class RetryPolicy:
    """How long to bear with storage, and how hard to press it."""

    deadline: float = 600.0
    """Seconds of outage that a read rides out."""
    timeout: float = 15.0
    """Seconds without a byte after which a request has failed."""
    first: float = 0.1
    """Upper bound of the first pause, seconds; doubles from failure to failure."""
    longest: float = 30.0
    """Upper bound of every pause."""
    hedge: float = 0.0
    """Seconds without an answer after which a range is asked for a second time (``flip.data.storage.retry``); 0:
    never."""
    requests: int = 16
    """Requests under way at once at most, per reader."""


@dataclass(frozen=True)
class Clock:
    """Time and chance, so that tests need wait for neither."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = random.uniform


@dataclass
class RetryState:
    """The attempts of one read. ``has_ever_succeeded``: asks whether storage ever let this process read; ``outages``:
    is told of each failure."""

    retry_policy: RetryPolicy
    has_ever_succeeded: Callable[[], bool]
    clock: Clock = field(default_factory=Clock)
    words: ErrorWording = ErrorWording()
    outages: OutageDetector | None = None

    def __post_init__(self) -> None:
        self._begin, self._wait = self.clock.now(), self.retry_policy.first
        self._denied = self._refused = 0

    def failed(self, key: str, fault: RequestError) -> RetryAction:
        """Sleep until the next attempt is due; returns what it needs. Raises FlipError where there is to be none."""
        do = ACTION_BY_KIND[fault.kind]
        if do is RetryAction.NEVER:
            raise _never(key, fault, self.words) from fault
        if self.outages:
            self.outages.failed(self._begin, fault)
        denied = do is RetryAction.DENIED and not self.has_ever_succeeded()
        if do is RetryAction.DENIED:
            self._denied += 1
            if self._denied > 1 and denied:
                raise _denied(key, fault, self.words) from fault
            do = RetryAction.RECONNECT
        if do is RetryAction.LIMITED:
            self._refused += 1
            if self._refused == _FEW:
                raise (_never if self.has_ever_succeeded() else _denied)(key, fault, self.words) from fault
        pause = self.clock.uniform(0, self._wait)
        if self.clock.now() + pause > self._begin + self.retry_policy.deadline:
            if denied:  # waiting was no remedy, nor would it be later
                raise _denied(key, fault, self.words) from fault
            what = f"{self.words.doing} failed for {self.retry_policy.deadline:g} s, at last with: {fault}"
            raise StorageError(what, key, remedy="The run may be started again later.") from fault
        (self.outages or self.clock).sleep(pause)
        self._wait = min(2 * self._wait, self.retry_policy.longest)
        return do


def _never(key: str, fault: RequestError, words: ErrorWording) -> FlipError:
    if fault.kind == "missing":
        return DataError(f"{words.thing} is missing ({fault})", key, remedy=words.remedy)
    if words.doing != "reading":
        return DataError(f"{words.doing} {words.thing} was refused: {fault}", key, remedy=words.remedy)
    return DataError(
        f"the shard is not the one that was indexed: {fault}", key, remedy="Restore it, or index the shards again."
    )


def _denied(key: str, fault: RequestError, words: ErrorWording) -> FlipError:
    return PermissionDenied(
        f"the storage does not let us {words.verb}: {fault}",
        key,
        remedy="Check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, ~/.aws), AWS_ENDPOINT_URL, and the bucket's "
        "policy. Storage answers the same for a key that is missing where listing is not allowed.",
    )


class ConcurrencyLimiter:
    """Lets ``cap`` requests through at once: halved when storage asks for less, one more per window of successes.

    The answers to requests that had left before the last halving say nothing about the new cap, and do not halve it.
    """

    def __init__(self, most: int) -> None:
        self.cap, self._most = most, most
        self._busy = self._good = self._halvings = 0
        self._changed = threading.Condition()

    def enter(self) -> int:
        """Wait for leave to send a request; returns the ticket to leave with."""
        with self._changed:
            while self._busy >= self.cap:
                self._changed.wait()
            self._busy += 1
            return self._halvings

    def spare(self) -> int | None:
        """The ticket of one more request, at once; None while storage has asked for less, or where all are out."""
        with self._changed:
            if self.cap < self._most or self._busy >= self.cap:
                return None
            self._busy += 1
            return self._halvings

    def leave(self, ticket: int, kind: str | None = "") -> None:
        """``kind``: the class of the fault, ``""`` after a success, None of a request that was given up."""
        with self._changed:
            self._busy -= 1
            if kind and ACTION_BY_KIND[kind] is RetryAction.SLOWER:
                self._good = 0
                if ticket == self._halvings:
                    self.cap, self._halvings = max(1, self.cap // 2), self._halvings + 1
            elif kind == "" and self.cap < self._most:
                self._good += 1
                if self._good >= self.cap:
                    self.cap, self._good = self.cap + 1, 0
            self._changed.notify_all()


SHARE = 0.05
"""Second requests at most, as a share of all requests; the first one is free."""
LONG = 5
"""Times the usual delay: what the first requests of all are waited for, as the client is still being made; and what any
late request is waited for once more before it gets a second one that the share does not allow.
"""
_RECENT = 200
"""Answers that are looked at."""

_T = TypeVar("_T")


class HedgePolicy:
    """``after``: seconds without an answer before which no request is late; 0: none ever is. Threads may share one."""

    def __init__(self, after: float) -> None:
        self._after, self._lock = after, threading.Lock()
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def record(self, seconds: float) -> None:
        """An answer came so long after its first request."""
        with self._lock:
            self._recent.append(seconds)

    @property
    def delay(self) -> float:
        """Seconds after which a request is late: ``after``, and no less than all but ``SHARE`` of the last ones took.

        They are of about one size: a chunk's.
        """
        with self._lock:
            recent = sorted(self._recent)
        return max(self._after, recent[int((1 - SHARE) * len(recent))]) if recent else self._after

    def is_late(self, answer: Future[_T], long: bool = False) -> bool:
        """Wait for an answer for as long as it may take (``long``: ``LONG`` times as long); whether it is late."""
        if not self._after or answer.done():
            return False
        return not wait([answer], self.delay * (LONG if long else 1)).done


def first_good(answers: Sequence[Future[_T]]) -> Future[_T]:
    """Wait for the first that ends without an error; the first one where none does."""
    pending = set(answers)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for answer in done:
            if answer.exception() is None:
                return answer
    return answers[0]


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


class OutageDetector:
    """Notices that no request of this process succeeds. Threads may share one.

    ``report`` is called after ``AFTER`` seconds, again while it lasts, and once when it is over; by default that is a
    warning in the log when it begins and one when it ends.
    """

    def __init__(self, report: Callable[[Outage], None] | None = None, clock: Clock | None = None) -> None:
        self._report, self._clock = report or OutageBoard().add, clock or Clock()
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

    def failed(self, begin: float, fault: RequestError) -> None:
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


class OutageBoard:
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
