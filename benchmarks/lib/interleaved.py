"""Runs passes of several pipelines in turns, a batch each, on one core; the others are stopped with their threads.

The speed of a shared machine changes from second to second. Passes one after the other see different speeds; turns of
about a second see the same one, so that the ratio of two pipelines' times is stable.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import NamedTuple

import psutil

BEFORE = 2
"""Turns before the clock starts, to create clients and fill buffers."""
GRACE = 10.0
"""Seconds for a pipeline to close its batches after another one failed."""
_LOOK = 0.002
"""Seconds between polls for the end of a turn."""


class Pass(NamedTuple):
    """One pass of one pipeline."""

    rate: float
    """Samples per second, in its own turns."""
    cpu: float
    """CPU microseconds per sample, child processes included."""


class _Turn(NamedTuple):
    samples: int
    seconds: float
    cpu: float


def passes(
    processes: Mapping[str, ProcessPoolExecutor], open_batches: Callable[[str], Iterator[int]], samples: int
) -> dict[str, Pass]:
    """A pass of each over so many samples. ``open_batches``: picklable; returns the batches of a name, in its process.

    If one fails, the others close their batches. Those that do not within ``GRACE`` are killed.
    """
    ids = {name: process.submit(os.getpid).result() for name, process in processes.items()}
    ends: dict[str, Future[list[_Turn]]] = {}
    try:
        for name, process in processes.items():
            ends[name] = process.submit(_work, open_batches, name, samples)
            _turn(ids[name], ends[name])
        while going := [name for name, end in ends.items() if not end.done()]:
            for name in going:
                os.kill(ids[name], signal.SIGCONT)
                _turn(ids[name], ends[name])
        return {name: _sum(end.result()[BEFORE:]) for name, end in ends.items()}
    finally:
        going = {name: end for name, end in ends.items() if not end.done()}
        for number in (signal.SIGTERM, signal.SIGCONT):
            _tell([ids[name] for name in going], number)
        wait(going.values(), GRACE)
        _tell([ids[name] for name, end in going.items() if not end.done()], signal.SIGKILL)


def _tell(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _turn(process: int, end: Future[list[_Turn]]) -> None:
    """Wait until a pipeline has stopped itself or ended. Raises its error, such as BrokenProcessPool."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while not end.done():
            if psutil.Process(process).status() == psutil.STATUS_STOPPED:
                return
            time.sleep(_LOOK)
    end.result()


def _work(open_batches: Callable[[str], Iterator[int]], name: str, samples: int) -> list[_Turn]:
    """The turns of a pipeline; between turns this process is stopped until SIGCONT, or SIGTERM to end."""
    turns = list[_Turn]()
    signal.signal(signal.SIGTERM, _end)
    with contextlib.closing(open_batches(name)) as batches:  # type: ignore[type-var]
        while True:
            cpu = _cpu()
            since = time.perf_counter()
            count = next(batches, 0)
            turns.append(_Turn(count, time.perf_counter() - since, _cpu() - cpu))
            if not count or sum(turn.samples for turn in turns) >= samples:
                return turns
            signal.raise_signal(signal.SIGSTOP)


def _end(*_: object) -> None:
    raise KeyboardInterrupt  # so that batches are closed, and what they hold is released


def _cpu() -> float:
    """CPU seconds of this process, its threads and finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(times.ru_utime + times.ru_stime for times in used)


def _sum(turns: list[_Turn]) -> Pass:
    count, seconds, cpu = (sum(column) for column in zip(*turns, strict=True))
    return Pass(count / seconds, 1e6 * cpu / count)
