"""What a worker reads before it is needed: the chunks of each lane's next block, in the background.

A lane's block is shuffled as a whole, so that all its chunks must be there when it begins. They are asked for while the
block before it is used up, one after the other, at moments that differ from lane to lane over the whole run: storage
sees an even stream of requests. All are asked for ``LEAD`` seconds before the block begins, at the pace of the steps
that is measured here: a request that is answered late is not noticed. The order of samples does not depend on any of
this (benchmarks/prefetch.py shows what it is good for).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from flip.concurrency import DaemonExecutor
from flip.data.chunk_reader import Chunk
from flip.data.order import Order

THREADS = 8
"""Reads at once of one worker."""
LEAD = 10.0
"""Seconds by which a read comes before its block begins: longer than a slow answer, or one and its repetition."""
MOST = 0.25
"""Share of a block that the lead may take at most: with it a lane holds 1.5 + MOST / 2 blocks on average."""
_GOLDEN = 0.6180339887498949


class Prefetch:
    """Chunks of ``lanes`` from position ``start`` of each on. ``read`` reads one, ``useless``: none of it counts.

    ``size`` tells the bytes of one; ``bytes`` is their sum over the chunks that are held or asked for. Each chunk is
    read once per block. What a read raises is raised where the chunk is asked for.
    """

    def __init__(
        self,
        order: Order,
        lanes: range,
        start: int,
        read: Callable[[int], Chunk],
        useless: Callable[[int], bool],
        size: Callable[[int], int],
    ) -> None:
        self.order, self.lanes, self._useless, self._size = order, lanes, useless, size
        self.bytes = 0
        self._held: list[dict[int, dict[int, Future[Chunk]]]] = [{} for _ in lanes]
        """Per lane: block number -> number of a chunk -> the chunk."""
        self._asked: list[dict[int, int]] = [{} for _ in lanes]
        """Per lane: block number -> how many of its chunks were asked for."""
        self._pool, self._read = DaemonExecutor(THREADS, "read"), read
        self._pace, self._at, self._asking = 0.0, time.monotonic(), order.span
        self._phases = [phase(lane) for lane in lanes]
        self._begin(*divmod(start, order.span))

    def chunk(self, a: int, k: int, j: int) -> Chunk:
        """Chunk j for block k of lane number a; waits for it."""
        return self._ask(a, k, j).result()

    def passed(self, a: int, k: int, n: int) -> None:
        """Lane a has used sample n of block k: let go of a block that is done, ask for what is due of the next one."""
        now = due(n, self._asking, self.order.block, self._phases[a])
        if now > self._asked[a].get(k + 1, 0):
            self._asked[a][k + 1] = now
            for j in self._chunks(a, k + 1)[:now]:
                if not self._useless(j):
                    self._ask(a, k + 1, j)
        if n + 1 == self.order.span:
            self.bytes -= sum(map(self._size, self._held[a].pop(k, ())))
            self._asked[a].pop(k, None)

    def paced(self, count: int) -> None:
        """Each lane has gone on by ``count`` samples since the last call."""
        now = time.monotonic()
        pace = count / max(now - self._at, 1e-6)
        self._pace, self._at = (0.9 * self._pace + 0.1 * pace if self._pace else pace), now
        self._asking = self.order.span - self.lead

    @property
    def lead(self) -> int:
        """``LEAD`` in samples of a lane."""
        return int(min(LEAD * self._pace, MOST * self.order.span))

    def close(self) -> None:
        """Forget what is not begun. Nobody waits for the rest: a stop must not hang on storage that is away."""
        self._pool.close()

    def _begin(self, k: int, n: int) -> None:
        """Ask for what is left of the present blocks, in the order in which the lanes need it."""
        first: dict[tuple[int, int], int] = {}
        for a, ids in enumerate(self.order.held(self.lanes, k)[0]):
            chunks, at = np.unique(ids[n:] // self.order.chunk, return_index=True)
            first |= {(a, int(j)): int(i) for j, i in zip(chunks, at, strict=True)}
        for a, j in sorted(first, key=lambda key: (first[key], key[0])):
            if not self._useless(j):
                self._ask(a, k, j)

    def _chunks(self, a: int, k: int) -> list[int]:
        return np.unique(self.order.held(self.lanes, k)[0][a] // self.order.chunk).tolist()

    def _ask(self, a: int, k: int, j: int) -> Future[Chunk]:
        chunks = self._held[a].setdefault(k, {})
        if j not in chunks:
            chunks[j] = self._pool.submit(self._read, j)
            self.bytes += self._size(j)
        return chunks[j]


def phase(lane: int) -> float:
    """The moment, in (0, 1], at which a lane asks for its chunks: the lanes 0 .. m - 1 are spread evenly for any m."""
    return 1.0 - lane * _GOLDEN % 1.0


def due(n: int, span: int, block: int, phase: float) -> int:
    """Chunks of the next block due after sample n of the present one: chunk i is at (i + phase) / Q of ``span``."""
    return min(block, int((n + 1) / span * block - phase + 1))
