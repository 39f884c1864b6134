"""``StorageClient`` reads ranges of local files and objects, with retries, second requests and a concurrency limit.

I/O errors never replace a sample. Transient errors are retried until a deadline, then raise StorageError. Permanent
ones (a missing shard, another ETag, the same wrong bytes twice) raise DataError.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from typing import Any, Generic, TypeVar

from flip.data.storage import base, retry
from flip.data.storage.base import ObjectStat, RangeResponse, RequestError, Storage, completed_future
from flip.data.storage.retry import DEFAULT_POLICY, Clock, Outage, RetryPolicy, RetryState
from flip.data.storage.storages import open_storage
from flip.runs.addresses import scheme_of

_T = TypeVar("_T")


@dataclass
class IOStats:
    """Counters of a client; they add up over workers and ranks."""

    requests: int = 0
    bytes: int = 0
    """Received, including failed attempts, excluding cancelled requests."""
    seconds: float = 0.0
    """Spent in requests, without the pauses between them."""
    hedged: int = 0
    """Second requests for a late range; included in ``requests``."""
    hedges_won: int = 0
    """Second requests that were answered first."""
    resumed: int = 0
    """Bytes of failed attempts that were not requested again."""
    cap: int = 0
    """Current limit of concurrent requests."""
    held: int = 0
    """Bytes of chunks that are held or requested, now."""
    cache_hits: int = 0
    """Chunks read from the node's cache (``flip.data.chunk_reader``)."""
    cache_misses: int = 0
    cache_failures: int = 0
    """Files of the cache that were damaged, or could not be read or written."""
    retries: dict[str, int] = field(default_factory=lambda: dict.fromkeys(retry.ACTION_BY_KIND, 0))
    """Failed attempts by kind, including the last ones of failed reads."""

    def __add__(self, other: IOStats) -> IOStats:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _PLAIN}
        retries = {kind: count + other.retries[kind] for kind, count in self.retries.items()}
        return IOStats(**sums, retries=retries)

    def flat(self) -> dict[str, float]:
        """Name -> number, with equal names in equal order on all ranks: ranks add them as one vector."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return plain | {f"retries_{kind}": count for kind, count in self.retries.items()}


_PLAIN = [each.name for each in fields(IOStats) if each.name != "retries"]


@dataclass
class _InFlight(Generic[_T]):
    """A request that was sent, with its ticket of the concurrency limiter."""

    ticket: int
    start: float
    answer: Future[_T]


class _Download:
    """The bytes of a range from ``start`` on, from responses each of which continues the one before."""

    def __init__(self, start: int) -> None:
        self.position = start
        """Where the next response has to start."""
        self._start = start
        self._etag = ""
        self._pieces: list[bytes] = []

    def add(self, data: bytes, etag: str) -> bool:
        """Append a response; returns False, and starts again, if it is of another object than those before."""
        if self._pieces and etag != self._etag:
            self._pieces.clear()
            self.position = self._start
            return False
        self._pieces.append(data)
        self.position += len(data)
        self._etag = etag
        return True

    def data(self) -> bytes:
        if len(self._pieces) == 1:
            return self._pieces[0]
        return b"".join(self._pieces)


def _refuse_changed(etag: str, expected: str) -> None:
    """Raise RequestError for a response of another object than the expected one; unknown ETags are empty."""
    if expected and etag not in ("", expected):
        raise RequestError("changed", f"its ETag is {etag}, indexed was {expected}")


class StorageClient:
    """Reads local files and, for keys that are addresses, the storages of ``STORAGES``. Threads may share an instance.

    Args:
        deadline: seconds of outage after which a read fails; replaces the deadline of ``retry_policy``.
        remote: the storage of ``s3://`` keys; default: S3.
        report: called with each outage; by default outages are logged.
    """

    def __init__(
        self, deadline: float | None = None, retry_policy: RetryPolicy = DEFAULT_POLICY, clock: Clock | None = None,
        remote: Storage | None = None, report: Callable[[Outage], None] | None = None,
    ) -> None:  # fmt: skip
        self.retry_policy = retry_policy
        if deadline is not None:
            self.retry_policy = dataclasses.replace(self.retry_policy, deadline=deadline)
        self._clock = clock or Clock()
        self._gate = retry.ConcurrencyLimiter(self.retry_policy.requests)
        self._hedge = retry.HedgePolicy(self.retry_policy.hedge)
        self._outages = retry.OutageDetector(report, self._clock)
        self._local = base.LocalStorage(self.retry_policy.absent_is_outage)
        self._storages: dict[str, Any] = {}
        """Scheme -> storage."""
        if remote is not None:
            self._storages["s3"] = remote
        self._lock = threading.Lock()
        self._counters = IOStats()
        self._ever_succeeded = False

    @property
    def counters(self) -> IOStats:
        """A copy of the current counters."""
        with self._lock:
            return dataclasses.replace(self._counters, retries=dict(self._counters.retries), cap=self._gate.cap)

    def read(self, key: str, start: int, stop: int, etag: str = "") -> bytes:
        """Bytes [start, stop) of a shard. ``etag``: the expected one, if known.

        Raises DataError, PermissionDenied, StorageError, or ConfigError if the address is invalid.
        """
        return self._read(self._attempts(), key, start, stop, etag)

    def stat(self, key: str) -> ObjectStat:
        """Size and ETag (``""`` for a local file). Raises as ``read`` does."""
        return self._with_retries(key, lambda storage: completed_future(storage.stat, key))

    def parts(self, key: str, stat: ObjectStat) -> Sequence[int]:
        """Sizes of the parts of an object's upload; empty if unknown. Raises as ``read`` does."""
        return self._with_retries(key, lambda storage: completed_future(storage.parts, key, stat))

    def list(self, prefix: str) -> dict[str, ObjectStat]:
        """Keys with this prefix, sorted, with size and ETag. Raises as ``read`` does; the deadline is per page."""

        def each(request: Callable[[], Any]) -> Any:
            return self._with_retries(prefix, lambda _: completed_future(request))

        return dict(sorted(self._storage(prefix).list(prefix, each)))

    def _read(self, attempts: RetryState, key: str, start: int, stop: int, etag: str) -> bytes:
        """``read``; after an incomplete response, the next attempt continues there if the object is the same."""
        download = _Download(start)

        def request_rest() -> None:
            while download.position < stop:
                try:
                    response = self._once(key, lambda storage: storage.get(key, download.position, stop))
                except RequestError as error:
                    _refuse_changed(error.etag, etag)
                    if error.data and error.etag and download.add(error.data, error.etag):
                        self._count(resumed=len(error.data))
                    raise
                _refuse_changed(response.etag, etag)
                download.add(response.data, response.etag)

        self._retry(attempts, key, request_rest)
        return download.data()

    def _with_retries(self, key: str, request: Callable[[Storage], Future[_T]]) -> _T:
        return self._retry(self._attempts(), key, lambda: self._once(key, request))

    def _retry(self, attempts: RetryState, key: str, request: Callable[[], _T]) -> _T:
        """The result of ``request``, repeated while it raises RequestError, which is counted. Raises as ``read``."""

        def counted() -> _T:
            try:
                return request()
            except RequestError as error:
                self._count(kind=error.kind)
                raise

        return attempts.until_success(key, counted, lambda: self._storage(key).reconnect())

    def _once(self, key: str, request: Callable[[Storage], Future[_T]]) -> _T:
        """The result of one request, or of two if the first is late. Raises RequestError."""
        storage = self._storage(key)
        best = None
        had_succeeded = self._ever_succeeded
        sent = [_InFlight(self._gate.enter(), time.perf_counter(), request(storage))]
        try:
            if (ticket := self._wait_for(sent[0].answer, had_succeeded)) is not None:
                sent.append(_InFlight(ticket, time.perf_counter(), request(storage)))
            best = retry.first_good([each.answer for each in sent])
        finally:
            for each in sent:
                self._end(each, each.answer is best)
        result = best.result()
        self._ever_succeeded = True
        self._outages.succeeded()
        self._hedge.record(time.perf_counter() - sent[0].start)
        if best is not sent[0].answer:
            self._count(hedges_won=1)
        return result

    def _wait_for(self, answer: Future[_T], had_succeeded: bool) -> int | None:
        """Wait for a response; returns the ticket of a second request if it is late and one may be sent."""
        if not self._hedge.is_late(answer, long=not had_succeeded):
            return None
        ticket = self._try_second_request(retry.SHARE)
        if ticket is None and self._hedge.is_late(answer, long=True):
            return self._try_second_request()
        return ticket

    def _try_second_request(self, share: float | None = None) -> int | None:
        """The ticket of a second request, if a slot is free and at most ``share`` of all requests are second ones."""
        with self._lock:
            if share is not None and self._counters.hedged > share * self._counters.requests:
                return None
            ticket = self._gate.spare()
            self._counters.hedged += ticket is not None
            return ticket

    def _end(self, request: _InFlight[_T], best: bool) -> None:
        """Cancel or finish a request, leave the limiter, and count; ``_retry`` counts the error of the best one."""
        if request.answer.cancel():
            self._gate.leave(request.ticket, None)
            self._count(requests=1, seconds=time.perf_counter() - request.start)
            return
        error = request.answer.exception()
        kind = ""
        data = b""
        if isinstance(error, RequestError):
            kind = error.kind
            data = error.data
        elif error is None:
            answer: object = request.answer.result()
            if isinstance(answer, RangeResponse):
                data = answer.data
        self._gate.leave(request.ticket, kind)
        self._count(requests=1, bytes=len(data), seconds=time.perf_counter() - request.start, kind="" if best else kind)

    def _attempts(self) -> RetryState:
        return RetryState(self.retry_policy, lambda: self._ever_succeeded, self._clock, outages=self._outages)

    def _storage(self, key: str) -> Storage:
        if not base.is_remote(key):
            return self._local
        scheme = scheme_of(key)
        with self._lock:
            if scheme not in self._storages:
                self._storages[scheme] = open_storage(key, self.retry_policy.timeout)
            return self._storages[scheme]  # type: ignore[no-any-return]

    def _count(self, kind: str = "", **more: float) -> None:
        """Add to counters by name; ``kind``: of a failed attempt."""
        with self._lock:
            for name, number in more.items():
                setattr(self._counters, name, getattr(self._counters, name) + number)
            if kind:
                self._counters.retries[kind] += 1
