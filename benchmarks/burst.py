"""A fleet that starts asks for all its first blocks at once, of storage that answers so many requests a second: events.

Readers are many; each has threads that ask, the real gate (``flip.data.retry.Gate``) and, per request, the real pauses
(``Attempts``), with a clock that jumps. Storage answers ``limit`` requests in any second of its own, and refuses the
others with 503 at once. An answer takes a drawn latency, and its bytes at the pace of one connection.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from flip.data.prefetch import THREADS
from flip.data.retry import Attempts, Clock, Gate, Patience
from flip.data.storage import Fault
from flip.exitcodes import StorageError


@dataclass(frozen=True)
class Burst:
    readers: int
    each: int
    """Requests of a reader."""
    limit: float
    """Requests a second that are answered."""
    megabytes: float
    """Of an answer."""
    pace: float = 85.0
    """MB/s of a connection."""
    median: float = 0.2
    sigma: float = 0.5
    """Of an answer's first byte: log-normal, seconds."""
    refusal: float = 0.02
    """Seconds until a 503."""


class _Reader:
    """One worker's: what it still has to ask, and how far it may go."""

    def __init__(self, requests: int, patience: Patience) -> None:
        self.gate, self.waiting = Gate(patience.requests), deque(range(requests))
        self.asking, self.busy = 0, 0
        """Threads that are at a request, be it asleep after a refusal; requests that storage has."""


def simulate(case: Burst, seed: int) -> dict[str, Any]:
    """How it goes: seconds until all have been answered, requests that were refused, the longest pause."""
    rng, patience, now = np.random.default_rng(seed), Patience(), 0.0
    pauses: list[float] = []
    clock = Clock(now=lambda: now, sleep=pauses.append, uniform=lambda low, high: float(rng.uniform(low, high)))
    fleet = [_Reader(case.each, patience) for _ in range(case.readers)]
    attempts: dict[tuple[int, int], Attempts] = {}
    asleep: list[deque[int]] = [deque() for _ in fleet]  # woken, but the gate is shut
    events: list[tuple[float, int, int, int, int | None, str]] = []
    count = refused = lost = 0
    answered_at, second, given = 0.0, 0, 0.0

    def push(when: float, reader: int, request: int, ticket: int | None, what: str) -> None:
        nonlocal count
        heapq.heappush(events, (when, count, reader, request, ticket, what))
        count += 1

    def send(r: int) -> None:
        """Whatever reader r may send now."""
        nonlocal second, given, refused
        reader = fleet[r]
        while reader.busy < reader.gate.cap:
            if asleep[r]:
                request = asleep[r].popleft()
            elif reader.waiting and reader.asking < THREADS:
                request = reader.waiting.popleft()
                reader.asking += 1
                attempts[r, request] = Attempts(patience, lambda: True, clock)
            else:
                return
            reader.busy += 1
            ticket = reader.gate.enter()
            if int(now) > second:
                second, given = int(now), 0.0
            given += 1
            if given > case.limit:
                refused += 1
                push(now + case.refusal, r, request, ticket, "slowdown")
            else:
                takes = case.median * np.exp(case.sigma * rng.standard_normal()) + case.megabytes / case.pace
                push(now + float(takes), r, request, ticket, "")

    for r in rng.permutation(case.readers).tolist():
        push(float(rng.uniform(0, 1)), r, 0, None, "begin")  # ranks are not ready in one instant
    while events:
        now, _, r, request, ticket, what = heapq.heappop(events)
        if ticket is not None:
            fleet[r].gate.leave(ticket, what)
            fleet[r].busy -= 1
        if what == "wake":
            asleep[r].append(request)
        elif what == "slowdown":
            try:
                attempts[r, request].failed("", Fault("slowdown", "503"))
                push(now + pauses[-1], r, request, None, "wake")
            except StorageError:
                lost += 1
                fleet[r].asking -= 1
        elif what == "":
            fleet[r].asking, answered_at = fleet[r].asking - 1, now
        send(r)
    requests = case.readers * case.each
    return {
        "requests": requests,
        "refused": refused,
        "refused_per_request": refused / requests,
        "given_up": lost,
        "seconds": answered_at,
        "longest_pause_s": max(pauses, default=0.0),
        "deadline_s": patience.deadline,
    }
