"""Simulates the start of a fleet, which requests all first blocks at once from storage with a limit on requests.

Each reader has threads, the real concurrency limit (``flip.data.storage.retry.ConcurrencyLimiter``) and, per request,
the real pauses (``RetryState``), on a simulated clock. Storage answers ``limit`` requests per second and refuses the
others with 503 at once. A response takes a random latency, and its bytes the rate of one connection.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flip.data.prefetch import THREADS
from flip.data.storage.base import RequestError
from flip.data.storage.retry import Clock, ConcurrencyLimiter, RetryPolicy, RetryState
from flip.runs.errors import StorageError


@dataclass(frozen=True)
class Burst:
    readers: int
    each: int
    """Requests per reader."""
    limit: float
    """Requests answered per second."""
    megabytes: float
    """Bytes of a response."""
    pace: float = 85.0
    """MB/s per connection."""
    median: float = 0.2
    sigma: float = 0.5
    """Seconds to the first byte of a response: log-normal."""
    refusal: float = 0.02
    """Seconds until a 503."""


class _Storage:
    """Answers ``limit`` requests per second of the clock."""

    def __init__(self, case: Burst, rng: np.random.Generator) -> None:
        self._case = case
        self._rng = rng
        self.refused = 0
        self._second = 0
        self._given = 0

    def answer(self, now: float) -> tuple[float, str]:
        """Seconds until the response to a request sent now, and its error ("" if none)."""
        if int(now) > self._second:
            self._second = int(now)
            self._given = 0
        self._given += 1
        if self._given > self._case.limit:
            self.refused += 1
            return self._case.refusal, "slowdown"
        first = self._case.median * np.exp(self._case.sigma * self._rng.standard_normal())
        return float(first + self._case.megabytes / self._case.pace), ""


class _Reader:
    """A worker: its remaining requests and its concurrency limit."""

    def __init__(self, requests: int, patience: RetryPolicy) -> None:
        self.gate = ConcurrencyLimiter(patience.requests)
        self.waiting = deque(range(requests))
        self.asking = 0
        self.busy = 0
        """Threads busy with a request, pauses after a refusal included; requests at storage."""
        self.woken = deque[int]()
        """Requests to retry once the limiter admits them."""
        self.attempts: dict[int, RetryState] = {}

    def next(self, new_state: Callable[[], RetryState]) -> int | None:
        """The next request that may be sent now."""
        if self.busy >= self.gate.cap:
            return None
        if self.woken:
            return self.woken.popleft()
        if not self.waiting or self.asking >= THREADS:
            return None
        self.asking += 1
        request = self.waiting.popleft()
        self.attempts[request] = new_state()
        return request


class _Fleet:
    """Readers and storage on one clock. An event: (time, number, reader, request, ticket of the limiter, kind)."""

    def __init__(self, case: Burst, seed: int) -> None:
        self._case = case
        self._rng = np.random.default_rng(seed)
        self._patience = RetryPolicy()
        self._storage = _Storage(case, self._rng)
        self._readers = [_Reader(case.each, self._patience) for _ in range(case.readers)]
        self._events: list[tuple[float, int, int, int, int | None, str]] = []
        self._now = 0.0
        self._count = 0
        self._answered_at = 0.0
        self._lost = 0
        self._pauses: list[float] = []
        self._clock = Clock(
            now=lambda: self._now,
            sleep=self._pauses.append,
            uniform=lambda low, high: float(self._rng.uniform(low, high)),
        )

    def run(self) -> None:
        """Process events until none is left."""
        for r in self._rng.permutation(self._case.readers).tolist():
            self._later(float(self._rng.uniform(0, 1)), r, 0, None, "begin")  # ranks are not ready in one instant
        while self._events:
            self._now, _, r, request, ticket, what = heapq.heappop(self._events)
            self._happened(self._readers[r], r, request, ticket, what)
            self._send(self._readers[r], r)

    def summary(self) -> dict[str, Any]:
        """The outcome."""
        requests = self._case.readers * self._case.each
        return {
            "requests": requests,
            "refused": self._storage.refused,
            "refused_per_request": self._storage.refused / requests,
            "given_up": self._lost,
            "seconds": self._answered_at,
            "longest_pause_s": max(self._pauses, default=0.0),
            "deadline_s": self._patience.deadline,
        }

    def _later(self, seconds: float, r: int, request: int, ticket: int | None, what: str) -> None:
        heapq.heappush(self._events, (self._now + seconds, self._count, r, request, ticket, what))
        self._count += 1

    def _happened(self, reader: _Reader, r: int, request: int, ticket: int | None, what: str) -> None:
        if ticket is not None:
            reader.gate.leave(ticket, what)
            reader.busy -= 1
        if what == "wake":
            reader.woken.append(request)
        elif what == "slowdown":
            try:
                reader.attempts[request].failed("", RequestError("slowdown", "503"))
                self._later(self._pauses[-1], r, request, None, "wake")
            except StorageError:
                self._lost += 1
                reader.asking -= 1
        elif what == "":
            reader.asking -= 1
            self._answered_at = self._now

    def _send(self, reader: _Reader, r: int) -> None:
        """Send all requests that a reader may send now."""
        while (request := reader.next(lambda: RetryState(self._patience, lambda: True, self._clock))) is not None:
            reader.busy += 1
            ticket = reader.gate.enter()
            seconds, what = self._storage.answer(self._now)
            self._later(seconds, r, request, ticket, what)


def simulate(case: Burst, seed: int) -> dict[str, Any]:
    """Seconds until all requests are answered, refused requests, the longest pause."""
    fleet = _Fleet(case, seed)
    fleet.run()
    return fleet.summary()
