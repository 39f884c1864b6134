"""Retries, second requests, concurrency limit and outage reports of storage clients.

Failed requests are retried with exponential back-off and full jitter until a deadline in minutes, so that many clients
survive an outage of their storage and do not all return at once when it ends. ``RetryState.until_success`` is the only
loop: shards, chunks and checkpoints call it.
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
from typing import Any, NamedTuple, Protocol, TypeVar

from flip.data.storage.base import RequestError, is_remote
from flip.runs.addresses import SCHEMES, scheme_of
from flip.runs.errors import ConfigError, DataError, FlipError, PermissionDenied, StorageError

log = logging.getLogger("flip.data")

_T = TypeVar("_T")


class ErrorWording(NamedTuple):
    """Words for the operation and its object in error messages."""

    doing: str = "reading"
    verb: str = "read"
    thing: str = "the shard"
    remedy: str = "Restore it, or index the others again."


class RetryAction(enum.Enum):
    """What follows a failed request."""

    AGAIN = "wait, then try again"
    SLOWER = "the same, with fewer concurrent requests"
    RECONNECT = "the same, with new connections and new credentials"
    DENIED = "reconnect if a request has succeeded before, else try once more"
    SETTINGS = "reconnect if a request has succeeded before, else the settings are wrong: raise an error"
    LIMITED = "the same a few times, then give up"
    NEVER = "permanent: raise an error"


ACTION_BY_KIND = {
    "slowdown": RetryAction.SLOWER,  # 503, 429, SlowDown
    "server": RetryAction.AGAIN,  # 500, 502, 504, an unreadable response
    "connection": RetryAction.AGAIN,  # refused, reset, closed early
    "stall": RetryAction.AGAIN,  # no data for too long
    "short": RetryAction.AGAIN,  # a complete response with other bytes than requested
    "checksum": RetryAction.RECONNECT,  # wrong CRC32 of a chunk
    "expired": RetryAction.RECONNECT,  # credentials
    "denied": RetryAction.DENIED,  # 401, 403, no credentials
    "redirect": RetryAction.SETTINGS,  # 3xx, and errors that name another region
    "range": RetryAction.SETTINGS,  # a response with another range than requested
    "refused": RetryAction.LIMITED,  # other 4xx: some servers' response to a range beyond the end
    "missing": RetryAction.NEVER,  # 404
    "changed": RetryAction.NEVER,  # another ETag, or shorter than before
    "io": RetryAction.AGAIN,  # errors of a local file system
}
"""Kind of a ``RequestError`` -> action."""

_MAX_LIMITED = 4
"""Failures of the action LIMITED after which an operation gives up."""
FIRST_ACCESS = 5.0
"""Seconds for which a first access that is denied is tried again: the service that gives credentials may fail once."""
SHARE = 0.05
"""Hedging (``HedgePolicy``): largest share of second requests among all requests. The first one is always allowed."""
LONG = 5
"""Hedging: factor of the usual delay. The first requests of a process wait this long, because the client is created in
the meantime. After this time a late request gets a second one even beyond ``SHARE``."""
_RECENT = 200
"""Hedging: number of recent durations from which the delay is computed."""
AFTER = 10.0
"""Outages (``OutageDetector``): seconds without a successful request before a report, and between reports."""


class Patience(Protocol):
    """Settings of how long a job waits for storage: the section ``data`` of a configuration, or an evaluation's."""

    @property
    def deadline(self) -> float: ...

    @property
    def timeout(self) -> float: ...


@dataclass(frozen=True)
class RetryPolicy:
    """Deadlines, pauses and limits of requests. Times are in seconds."""

    deadline: float = 600.0
    """Seconds of outage after which a read fails."""
    timeout: float = 15.0
    """Seconds without a byte after which a request has failed."""
    first: float = 0.1
    """Upper bound of the pause after the first failure; doubled after each further one."""
    longest: float = 30.0
    """Upper bound of all pauses."""
    hedge: float = 0.0
    """Seconds without a response after which a second request is sent (``HedgePolicy``); 0: never."""
    requests: int = 16
    """Most concurrent requests per client."""
    absent_is_outage: bool = False
    """Whether to retry if a local file and its folder are missing: their file system may not be mounted yet."""

    @classmethod
    def of(cls, settings: Patience, **more: Any) -> RetryPolicy:
        """The policy of a job. ``more``: further fields."""
        return cls(deadline=settings.deadline, timeout=settings.timeout, **more)


DEFAULT_POLICY = RetryPolicy()
"""Of readers and checkpoints without settings of a job."""


@dataclass(frozen=True)
class Clock:
    """Time and randomness, replaceable in tests."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = random.uniform


@dataclass
class RetryState:
    """The attempts of one operation.

    Args:
        retry_policy: deadline and pauses.
        has_ever_succeeded: whether storage has served this process before: then its settings and credentials are right.
        clock: time and randomness.
        wording: words for errors.
        outages: notified of each failure.
    """

    retry_policy: RetryPolicy
    has_ever_succeeded: Callable[[], bool]
    clock: Clock = field(default_factory=Clock)
    wording: ErrorWording = ErrorWording()
    outages: OutageDetector | None = None

    def __post_init__(self) -> None:
        self._start = self.clock.now()
        self._wait = self.retry_policy.first
        self._denied = 0
        self._limited = 0

    def until_success(self, key: str, request: Callable[[], _T], reconnect: Callable[[], None]) -> _T:
        """Repeat ``request`` while it raises RequestError, and return its result. Raises FlipError as ``failed`` does.

        ``reconnect`` is called before attempts that need new connections and credentials.
        """
        while True:
            try:
                return request()
            except RequestError as error:
                if self.failed(key, error) is RetryAction.RECONNECT:
                    reconnect()

    def failed(self, key: str, error: RequestError) -> RetryAction:
        """Sleep until the next attempt is due and return its action. Raises FlipError if no attempt is left."""
        action = ACTION_BY_KIND[error.kind]
        if action is RetryAction.NEVER:
            raise _permanent(key, error, self.wording) from error
        if self.outages:
            self.outages.failed(self._start, error)
        denied = action is RetryAction.DENIED and not self.has_ever_succeeded()
        if action is RetryAction.DENIED:
            self._denied += 1
            if self._denied > 1 and denied and self.clock.now() - self._start >= FIRST_ACCESS:
                raise _denied(key, error, self.wording) from error
            action = RetryAction.RECONNECT
        if action is RetryAction.LIMITED:
            self._limited += 1
            if self._limited == _MAX_LIMITED:
                if self.has_ever_succeeded():
                    raise _permanent(key, error, self.wording) from error
                raise _denied(key, error, self.wording) from error
        if action is RetryAction.SETTINGS:
            if not self.has_ever_succeeded():
                what = f"{self.wording.doing} is not possible with these settings: {error}"
                raise ConfigError(what, key, remedy=error.remedy) from error
            action = RetryAction.RECONNECT
        pause = self.clock.uniform(0, self._wait)
        if self.clock.now() + pause > self._start + self.retry_policy.deadline:
            if denied:  # waiting did not help
                raise _denied(key, error, self.wording) from error
            what = f"{self.wording.doing} failed for {self.retry_policy.deadline:g} s, at last with: {error}"
            raise StorageError(what, key, remedy="The run may be started again later.") from error
        if self.outages:
            self.outages.sleep(pause)
        else:
            self.clock.sleep(pause)
        self._wait = min(2 * self._wait, self.retry_policy.longest)
        return action


def _permanent(key: str, error: RequestError, wording: ErrorWording) -> FlipError:
    """The error for an object that is missing or differs from the one that was indexed."""
    if error.kind == "missing":
        return DataError(f"{wording.thing} is missing ({error})", key, remedy=wording.remedy)
    if wording != ErrorWording():
        return DataError(f"{wording.doing} {wording.thing} was refused: {error}", key, remedy=wording.remedy)
    what = f"the shard is not the one that was indexed: {error}"
    return DataError(what, key, remedy="Restore it, or index the shards again.")


def _denied(key: str, error: RequestError, wording: ErrorWording) -> FlipError:
    """The error for missing permissions."""
    if not is_remote(key):
        return PermissionDenied(f"{wording.thing} may not be read: {error}", key, remedy="Grant read access to it.")
    if scheme_of(key) != "s3":
        what = f"the storage does not let us {wording.verb}: {error}"
        row = SCHEMES.get(scheme_of(key))
        name = row.storage if row else "the storage"
        remedy = f"Check the credentials of {name}, and that they give the right to {wording.verb} this."
        return PermissionDenied(what, key, remedy=remedy)
    remedy = (
        "Check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, ~/.aws), AWS_ENDPOINT_URL, and the bucket's policy. "
        "Storage answers the same for a missing key if listing is not allowed."
    )
    return PermissionDenied(f"the storage does not let us {wording.verb}: {error}", key, remedy=remedy)


class ConcurrencyLimiter:
    """Limits concurrent requests to ``cap``, which adapts between 1 and ``most``.

    If storage asks for fewer requests, ``cap`` is halved; it grows by one after ``cap`` successful requests. Responses
    to requests that were sent before the last halving do not halve it again.
    """

    def __init__(self, most: int) -> None:
        self.cap = most
        self._most = most
        self._busy = 0
        self._successes = 0
        self._halvings = 0
        self._changed = threading.Condition()

    def enter(self) -> int:
        """Wait until a request may be sent; returns a ticket for ``leave``."""
        with self._changed:
            while self._busy >= self.cap:
                self._changed.wait()
            self._busy += 1
            return self._halvings

    def spare(self) -> int | None:
        """A ticket for an extra request, without waiting; None if no slot is free or the cap is reduced."""
        with self._changed:
            if self.cap < self._most or self._busy >= self.cap:
                return None
            self._busy += 1
            return self._halvings

    def leave(self, ticket: int, kind: str | None = "") -> None:
        """End a request. ``kind``: of its error, ``""`` after a success, None if it was cancelled."""
        with self._changed:
            self._busy -= 1
            if kind and ACTION_BY_KIND[kind] is RetryAction.SLOWER:
                self._successes = 0
                if ticket == self._halvings:
                    self.cap = max(1, self.cap // 2)
                    self._halvings += 1
            elif kind == "" and self.cap < self._most:
                self._successes += 1
                if self._successes >= self.cap:
                    self.cap += 1
                    self._successes = 0
            self._changed.notify_all()


class HedgePolicy:
    """Decides when a request is late, so that a second one is sent and the first good response counts.

    One slow connection or server no longer delays a read, and ``SHARE`` bounds the extra load if all are slow.
    ``after``: seconds before which no request is late; 0: no request is ever late. Threads may share an instance.
    """

    def __init__(self, after: float) -> None:
        self._after = after
        self._lock = threading.Lock()
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def record(self, seconds: float) -> None:
        """Record the time from a first request to its response."""
        with self._lock:
            self._recent.append(seconds)

    @property
    def delay(self) -> float:
        """Seconds after which a request is late: the larger of ``after`` and the quantile 1 - ``SHARE`` of recent
        durations.

        Durations can be compared, because requests are about equal in size: one chunk.
        """
        with self._lock:
            recent = sorted(self._recent)
        if recent:
            return max(self._after, recent[int((1 - SHARE) * len(recent))])
        return self._after

    def is_late(self, answer: Future[_T], long: bool = False) -> bool:
        """Wait for a response for the usual delay, or ``LONG`` times as long; returns whether it is late."""
        if not self._after or answer.done():
            return False
        return not wait([answer], self.delay * (LONG if long else 1)).done


def first_good(answers: Sequence[Future[_T]]) -> Future[_T]:
    """Wait for the first future that ends without an error; returns the first one if all fail."""
    pending = set(answers)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for answer in done:
            if answer.exception() is None:
                return answer
    return answers[0]


class Outage(NamedTuple):
    """An outage: no request has succeeded for ``seconds`` in spite of ``retries``."""

    since: float
    """Unix time."""
    seconds: float
    retries: int
    fault: str
    """The last error."""
    over: bool = False
    """Whether a request has succeeded since."""

    def __str__(self) -> str:
        if self.over:
            return f"storage answers again, after {self.seconds:.0f} s and {self.retries} retries"
        since = time.strftime("%H:%M:%S", time.localtime(self.since))
        return f"storage does not answer since {since}, {self.retries} retries, the last: {self.fault}"


class OutageDetector:
    """Detects that no request of this process succeeds any more. Threads may share an instance.

    ``report`` is called after ``AFTER`` seconds, again while the outage lasts, and once when it is over. The default
    logs a warning when an outage is noticed and one when it is over.
    """

    def __init__(self, report: Callable[[Outage], None] | None = None, clock: Clock | None = None) -> None:
        self._report = report or OutageBoard().add
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._last_success = self._clock.now()
        self._since = 0.0
        self._reported = 0.0
        self._retries = 0
        self._error = ""

    def succeeded(self) -> None:
        """Record a successful request."""
        with self._lock:
            self._last_success = self._clock.now()
            over = self._outage(over=True) if self._reported else None
            self._retries = 0
            self._reported = 0.0
        if over:
            self._report(over)

    def failed(self, start: float, error: RequestError) -> None:
        """Record a failed request whose first attempt started at ``start`` (by the clock)."""
        with self._lock:
            if not self._retries:
                self._since = max(self._last_success, start)
            self._retries += 1
            self._error = str(error)

    def sleep(self, seconds: float) -> None:
        """Sleep before a retry. A report that becomes due in the meantime is made in time."""
        with self._lock:
            due = max(0.0, (self._reported or self._since) + AFTER - self._clock.now())
        if due < seconds:
            self._clock.sleep(due)
            self._report_if_due()
            seconds -= due
        self._clock.sleep(seconds)

    def _report_if_due(self) -> None:
        """Report an outage that has lasted long enough, unless another thread has just done so."""
        with self._lock:
            now = self._clock.now()
            if not self._retries or now < (self._reported or self._since) + AFTER:
                return
            self._reported = now
            outage = self._outage()
        self._report(outage)

    def _outage(self, over: bool = False) -> Outage:
        seconds = self._clock.now() - self._since
        return Outage(time.time() - seconds, seconds, self._retries, self._error, over)


class OutageBoard:
    """Combines the outages of several processes into one, with one warning at its start and one at its end.

    ``show`` is called with the text at each report, and with None when the outage is over.
    """

    def __init__(self) -> None:
        self.show: Callable[[str | None], None] = lambda text: None
        self._lock = threading.Lock()
        self._open: dict[int, Outage] = {}

    def add(self, outage: Outage, process: int = 0) -> None:
        """Add the report of a process."""
        with self._lock:
            first = not self._open
            if outage.over:
                self._open.pop(process, None)
            else:
                self._open[process] = outage
            if self._open:
                oldest = min(self._open.values())
                outage = oldest._replace(retries=sum(each.retries for each in self._open.values()), fault=outage.fault)
            if first or outage.over:
                log.warning("%s", outage)
            self.show(None if outage.over else str(outage))

    def clear(self) -> None:
        """Forget all reports: the processes have ended."""
        with self._lock:
            if self._open:
                self._open.clear()
                self.show(None)
