"""The one call behind which storage lies: bytes [start, stop) of a key, whole or an error.

Trouble with I/O never replaces a sample. What may pass is tried again with jitter until a deadline (then StorageError);
what cannot pass (no such shard, another one, bytes that are wrong twice in the same way) is a DataError.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

from flip.data.storage.base import (
    LocalStorage,
    ObjectStat,
    RangeResponse,
    RequestError,
    Storage,
    completed_future,
    is_remote,
)
from flip.data.storage.retry import (
    ACTION_BY_KIND,
    SHARE,
    Clock,
    ConcurrencyLimiter,
    HedgePolicy,
    Outage,
    OutageDetector,
    RetryAction,
    RetryPolicy,
    RetryState,
    first_good,
)


@dataclass
class IOStats:
    requests: int = 0
    bytes: int = 0
    """Received, those of attempts that failed included, not those of requests that were given up."""
    seconds: float = 0.0
    """Spent in requests; pauses between them are not in it."""
    hedged: int = 0
    """Second requests for a range whose answer was late; they are in ``requests`` too."""
    hedges_won: int = 0
    """Those that were answered first."""
    resumed: int = 0
    """Bytes that a failed attempt had brought and that were not asked for again."""
    cap: int = 0
    """Requests that may be under way at once, now."""
    held: int = 0
    """Bytes of chunks that are held or asked for, now."""
    cache_hits: int = 0
    """Chunks that the node's cache had (``flip.data.chunk_reader``)."""
    cache_misses: int = 0
    cache_failures: int = 0
    """Its files that were damaged, could not be read, or could not be written."""
    retries: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ACTION_BY_KIND, 0))
    """Failed attempts by class, those that ended the read included."""

    def __add__(self, other: IOStats) -> IOStats:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _PLAIN}
        retries = {kind: count + other.retries[kind] for kind, count in self.retries.items()}
        return IOStats(**sums, retries=retries)

    def flat(self) -> dict[str, float]:
        """Name -> number: the same names in the same order everywhere, so that ranks can add them as one vector."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return plain | {f"retries_{kind}": count for kind, count in self.retries.items()}

    @staticmethod
    def total(parts: Iterable[IOStats]) -> IOStats:
        return sum(parts, IOStats())


_PLAIN = [each.name for each in fields(IOStats) if each.name != "retries"]


_T = TypeVar("_T")


@dataclasses.dataclass
class _InFlight(Generic[_T]):
    """A request under way: the gate's ticket, when it was sent, its answer."""

    ticket: int
    begin: float
    answer: Future[_T]


class StorageClient:
    """Reads local files and, by keys ``s3://bucket/path``, object storage. Threads may share one.

    ``deadline``: seconds of outage that a read rides out; ``retry_policy`` has the rest, which seldom needs a change.
    ``report``: takes outages; by default they are logged.
    """

    def __init__(
        self, deadline: float | None = None, retry_policy: RetryPolicy | None = None, clock: Clock | None = None,
        remote: Storage | None = None, report: Callable[[Outage], None] | None = None,
    ) -> None:  # fmt: skip
        self.retry_policy = retry_policy or RetryPolicy()
        if deadline is not None:
            self.retry_policy = dataclasses.replace(self.retry_policy, deadline=deadline)
        self._clock, self._gate = clock or Clock(), ConcurrencyLimiter(self.retry_policy.requests)
        self._hedge, self._outages = HedgePolicy(self.retry_policy.hedge), OutageDetector(report, self._clock)
        self._local, self._remote = LocalStorage(), remote
        self._lock, self._counters, self._ever_succeeded = threading.Lock(), IOStats(), False

    @property
    def counters(self) -> IOStats:
        """A copy of the counts until now."""
        with self._lock:
            return dataclasses.replace(self._counters, retries=dict(self._counters.retries), cap=self._gate.cap)

    def read(self, key: str, start: int, stop: int, etag: str = "") -> bytes:
        """Bytes [start, stop) of a shard. ``etag``: the one that it must have, where known.

        Raises DataError, PermissionDenied, StorageError, or ConfigError where no storage has such an address.
        """
        return self._read(self._attempts(), key, start, stop, etag)

    def stat(self, key: str) -> ObjectStat:
        """Size and ETag (``""``: a local file). Raises as ``read`` does."""
        return self._with_retries(key, lambda storage: completed_future(storage.stat, key))

    def parts(self, key: str, stat: ObjectStat) -> Sequence[int]:
        """Sizes of the parts that an object was uploaded in, where the server tells them. Raises as ``read`` does."""
        return self._with_retries(key, lambda storage: completed_future(storage.parts, key, stat))

    def list(self, prefix: str) -> dict[str, ObjectStat]:
        """Keys that begin with ``prefix``, sorted, with size and ETag. Raises as ``read`` does; a bucket has hundreds
        of pages, and the deadline is that of each.
        """

        def each(request: Callable[[], Any]) -> Any:
            return self._with_retries(prefix, lambda _: completed_future(request))

        return dict(sorted(self._storage(prefix).list(prefix, each)))

    def _read(self, attempts: RetryState, key: str, start: int, stop: int, etag: str) -> bytes:
        """Where a body broke off, the next attempt goes on from the byte reached, if it is of the same object."""
        pieces, at, of = list[bytes](), start, ""
        while at < stop:
            got = self._once(key, lambda storage: storage.get(key, at, stop))  # noqa: B023
            fault = got if isinstance(got, RequestError) else None
            if etag and got.etag not in ("", etag):
                fault = RequestError("changed", f"its ETag is {got.etag}, indexed was {etag}")
            if fault is not None:
                self._failed(attempts, key, fault)
                if not (got.data and got.etag):
                    continue
            if pieces and got.etag != of:
                pieces, at = [], start  # another object: from the start, once more
                continue
            pieces.append(got.data)
            at, of = at + len(got.data), got.etag
            if fault is not None:
                self._count(resumed=len(got.data))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _with_retries(self, key: str, request: Callable[[Storage], Future[_T]]) -> _T:
        attempts = self._attempts()
        while True:
            found = self._once(key, request)
            if not isinstance(found, RequestError):
                return found
            self._failed(attempts, key, found)

    def _once(self, key: str, request: Callable[[Storage], Future[_T]]) -> _T | RequestError:
        """One request through the gate, or two where the first is late: what came of it, or the fault."""
        storage = self._storage(key)
        best: Future[_T] | None = None
        known = self._ever_succeeded
        sent = [_InFlight(self._gate.enter(), time.perf_counter(), request(storage))]
        try:
            if (ticket := self._second(sent[0].answer, known)) is not None:
                sent.append(_InFlight(ticket, time.perf_counter(), request(storage)))
            best = first_good([one.answer for one in sent])
        finally:
            for one in sent:
                self._end(one, one.answer is best)
        error = best.exception()
        if isinstance(error, RequestError):
            return error
        found = best.result()
        self._ever_succeeded = True
        self._outages.succeeded()
        self._hedge.record(time.perf_counter() - sent[0].begin)
        if best is not sent[0].answer:
            self._count(hedges_won=1)
        return found

    def _second(self, answer: Future[_T], known: bool) -> int | None:
        """Wait for an answer; the ticket of a second request where it is late. ``known``: storage answered before."""
        if not self._hedge.is_late(answer, long=not known):
            return None
        ticket = self._try_second_request(SHARE)
        return self._try_second_request() if ticket is None and self._hedge.is_late(answer, long=True) else ticket

    def _try_second_request(self, share: float | None = None) -> int | None:
        """The ticket of a second request, where the gate has room and no more than ``share`` of all are such."""
        with self._lock:
            if share is not None and self._counters.hedged > share * self._counters.requests:
                return None
            ticket = self._gate.spare()
            self._counters.hedged += ticket is not None
            return ticket

    def _end(self, one: _InFlight[_T], best: bool) -> None:
        """Give up what is still under way, leave the gate, count. The fault of the ``best`` one is counted later."""
        given_up, data, kind = one.answer.cancel(), b"", ""
        if not given_up:
            error = one.answer.exception()
            found = error if isinstance(error, RequestError) else one.answer.result() if error is None else None
            data = found.data if isinstance(found, RangeResponse | RequestError) else b""
            kind = error.kind if isinstance(error, RequestError) else ""
        self._gate.leave(one.ticket, None if given_up else kind)
        self._count(requests=1, bytes=len(data), seconds=time.perf_counter() - one.begin, kind="" if best else kind)

    def _failed(self, attempts: RetryState, key: str, fault: RequestError) -> None:
        """Count it and wait for the next attempt. Raises FlipError where there is to be none."""
        self._count(kind=fault.kind)
        if attempts.failed(key, fault) is RetryAction.RECONNECT:
            self._storage(key).reconnect()

    def _attempts(self) -> RetryState:
        return RetryState(self.retry_policy, lambda: self._ever_succeeded, self._clock, outages=self._outages)

    def _storage(self, key: str) -> Storage:
        if not is_remote(key):
            return self._local
        with self._lock:
            if self._remote is None:
                from flip.data.storage.s3 import S3Storage  # not needed where shards are local

                self._remote = S3Storage(self.retry_policy.timeout)
            return self._remote

    def _count(self, kind: str = "", **more: float) -> None:
        """Add to counters by name; ``kind``: of a failed attempt."""
        with self._lock:
            for name, number in more.items():
                setattr(self._counters, name, getattr(self._counters, name) + number)
            if kind:
                self._counters.retries[kind] += 1
