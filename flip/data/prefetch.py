"""Reads the chunks of each lane's next block in the background, before they are needed.

A lane's block is shuffled as a whole, so that all its chunks must be read when it starts. They are requested while the
lane drains the block before, at moments that differ between lanes: storage sees an even stream of requests. The last
one is requested ``LOOKAHEAD_SECONDS`` before the block starts, at the measured rate of steps, so that a slow response
does not delay training. The order of samples does not depend on any of this (benchmarks/prefetch.py measures the
effect).
"""

import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from flip.concurrency import DaemonExecutor
from flip.data.chunk_reader import Chunk
from flip.data.manifest.manifest import Manifest
from flip.data.order import SampleOrder
from flip.runs.errors import StorageError

THREADS = 8
"""Concurrent reads of one worker."""
LOOKAHEAD_SECONDS = 10.0
"""Seconds from the last read to the start of its block: longer than a slow response, or than one and its retry."""
MAX_LOOKAHEAD = 0.25
"""Largest lookahead, as a share of a block. With it a lane holds 1.5 + MAX_LOOKAHEAD / 2 blocks on average."""
HANG_SECONDS = 120.0
"""Seconds after the deadline of reads after which one hangs: a mount whose server is away answers nothing."""
_GOLDEN = 0.6180339887498949


class Prefetch:
    """Chunks of ``lanes`` from position ``start`` of each on; each chunk is read once per block.

    Args:
        read: reads a chunk. Its errors are raised by ``chunk``.
        skip_chunk: whether a chunk has no usable sample and is not to be read ahead.
        chunk_bytes: size of a chunk; ``bytes`` is their sum over chunks held or requested.
        patience: seconds to wait for the end of any read. Reads have a deadline, which one that hangs never meets.
    """

    def __init__(
        self,
        order: SampleOrder,
        lanes: range,
        start: int,
        read: Callable[[int], Chunk],
        skip_chunk: Callable[[int], bool],
        chunk_bytes: Callable[[int], int],
        patience: float | None = None,
    ) -> None:
        self.order = order
        self.lanes = lanes
        self._skip_chunk = skip_chunk
        self._chunk_bytes = chunk_bytes
        self.bytes = 0
        self._patience = patience
        self._last_end = 0.0
        self._chunks: list[dict[int, dict[int, Future[Chunk]]]] = [{} for _ in lanes]
        """Per lane: block number -> chunk number -> the chunk."""
        self._requested: list[dict[int, int]] = [{} for _ in lanes]
        """Per lane: block number -> number of its chunks that were requested."""
        self._pool = DaemonExecutor(THREADS, "read")
        self._read = read
        self._rate = 0.0
        self._updated_at = time.monotonic()
        self._request_window = order.block_samples
        self._phases = [phase(lane) for lane in lanes]
        self._request_first(*divmod(start, order.block_samples))

    def chunk(self, lane: int, k: int, j: int) -> Chunk:
        """Chunk j for block k of a lane (its index in ``lanes``). Raises StorageError if it does not come in time."""
        future = self._request(lane, k, j)
        if future.done():
            return future.result()
        last_end = time.monotonic()
        while True:
            last_end = max(last_end, self._last_end)
            wait = None
            if self._patience is not None:
                wait = max(0.0, last_end + self._patience - time.monotonic())
            try:
                return future.result(wait)
            except TimeoutError as error:
                if self._last_end > last_end:  # others came: it is behind them in the queue
                    continue
                what = f"no read has ended for {self._patience:g} s: the file system hangs"
                raise StorageError(what, f"chunk {j}", remedy="The run may be started again later.") from error

    def advance(self, lane: int, k: int, n: int) -> None:
        """Sample n of block k was used: request the chunks due of the next block, and drop a block that is used up."""
        due = chunks_due(n, self._request_window, self.order.block, self._phases[lane])
        if due > self._requested[lane].get(k + 1, 0):
            self._requested[lane][k + 1] = due
            ids = self.order.cached_block(self.lanes, k + 1)[0][lane]
            for j in np.unique(ids // self.order.chunk).tolist()[:due]:
                if not self._skip_chunk(j):
                    self._request(lane, k + 1, j)
        if n + 1 == self.order.block_samples:
            self.bytes -= sum(map(self._chunk_bytes, self._chunks[lane].pop(k, ())))
            self._requested[lane].pop(k, None)

    def update_rate(self, count: int) -> None:
        """Each lane has advanced by ``count`` samples since the last call."""
        now = time.monotonic()
        rate = count / max(now - self._updated_at, 1e-6)
        if self._rate:
            self._rate = 0.9 * self._rate + 0.1 * rate
        else:
            self._rate = rate
        self._updated_at = now
        self._request_window = self.order.block_samples - self.lookahead

    @property
    def lookahead(self) -> int:
        """``LOOKAHEAD_SECONDS`` in samples of a lane."""
        return int(min(LOOKAHEAD_SECONDS * self._rate, MAX_LOOKAHEAD * self.order.block_samples))

    def close(self) -> None:
        """Drop reads that have not started. Running ones are not waited for: storage may be unavailable."""
        self._pool.close()

    def _request_first(self, k: int, n: int) -> None:
        """Request the rest of the current blocks, in the order in which the lanes need it."""
        first: dict[tuple[int, int], int] = {}
        for lane, ids in enumerate(self.order.cached_block(self.lanes, k)[0]):
            chunks, index = np.unique(ids[n:] // self.order.chunk, return_index=True)
            first |= {(lane, int(j)): int(i) for j, i in zip(chunks, index, strict=True)}
        for lane, j in sorted(first, key=lambda key: (first[key], key[0])):
            if not self._skip_chunk(j):
                self._request(lane, k, j)

    def _timed_read(self, j: int) -> Chunk:
        try:
            return self._read(j)
        finally:
            self._last_end = time.monotonic()

    def _request(self, lane: int, k: int, j: int) -> Future[Chunk]:
        chunks = self._chunks[lane].setdefault(k, {})
        if j not in chunks:
            chunks[j] = self._pool.submit(self._timed_read, j)
            self.bytes += self._chunk_bytes(j)
        return chunks[j]


def chunk_bytes(manifest: Manifest, j: int) -> int:
    """Bytes read for chunk j."""
    return sum(stop - start for _, start, stop, _ in manifest.chunk_ranges(j))


def phase(lane: int) -> float:
    """Phase, in (0, 1], of a lane's requests: those of the lanes 0 .. m - 1 are spread evenly for any m."""
    return 1.0 - lane * _GOLDEN % 1.0


def chunks_due(n: int, window: int, block: int, phase: float) -> int:
    """Chunks of the next block due after sample n of this one: chunk i is due at (i + phase) / Q of ``window``."""
    return min(block, int((n + 1) / window * block - phase + 1))
