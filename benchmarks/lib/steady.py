"""One pass of a pipeline with loader processes, measured while their buffers are full.

Loader processes work ahead. The clock therefore starts after ``AHEAD`` batches and stops ``AHEAD`` batches before the
end, so that the buffers hold as much at both times. Processor time is that of the process, its threads and children.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import psutil

from benchmarks.lib.interleaved import Pass

AHEAD = 8
"""Batches. Two loader processes hold three each, by PyTorch's prefetch_factor of 2."""


def measure(open_batches: Callable[[str], Iterator[int]], name: str, samples: int, batch: int) -> Pass:
    """A pass over so many samples, in the calling process."""
    count = samples // batch
    ahead = min(AHEAD, count // 4)
    with closing(open_batches(name)) as batches:  # type: ignore[type-var]
        for _ in range(ahead):
            next(batches)
        cpu = _processor_seconds()
        start_time = time.perf_counter()
        done = sum(next(batches) for _ in range(count - 2 * ahead))
        seconds = time.perf_counter() - start_time
        cpu = _processor_seconds() - cpu
    return Pass(done / seconds, 1e6 * cpu / done)


def _processor_seconds() -> float:
    process = psutil.Process()
    own = process.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return float(total)
