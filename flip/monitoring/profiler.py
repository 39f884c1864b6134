"""Looks into steps with torch's profiler: a trace where one is asked for, and how long steps wait for other ranks."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

FIRST = 2
"""The step of an attempt that is looked into first: the one before it pays for what is done once."""

Interval = tuple[float, float]


class Profiler:
    """One rank's. Traces ``steps`` steps into ``folder``, from the one that the sample ``first`` is in.

    ``minutes``: between two steps that are looked into for their communication; 0, or a single rank: none is.
    """

    def __init__(
        self, folder: Path, attempt: int, world: int, device: torch.device, first: int, steps: int, minutes: float
    ) -> None:
        self._folder, self._attempt, self._cuda = folder, attempt, device.type == "cuda"
        self._first, self._steps = first, steps
        self._every = 60 * minutes if world > 1 else 0.0
        self._due, self._seen, self._left = 0.0, 0, 0
        self._trace: Any = None
        self._name = ""
        self.communication: float | None = 0.0 if world == 1 else None
        """Share of a step, its data-wait apart, that waited for other ranks; None: not known."""

    @contextlib.contextmanager
    def step(self, step: int, samples: int, batch: int) -> Iterator[None]:
        """Around a step; ``step`` is its number, ``samples`` S before it."""
        self._seen += 1
        if self._steps and samples <= self._first < samples + batch:
            self._trace, self._left = self._start(record_shapes=True), self._steps
            self._name = f"{self._attempt}-{step}.json.gz"
        if self._trace is not None:
            yield
            self._left -= 1
            if self._left == 0:
                self._write()
        elif self._every and self._seen >= FIRST and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._every
            yield from self._sample()
        else:
            yield

    def _start(self, **options: Any) -> Any:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
        begun = profile(activities=activities, **options)
        begun.start()
        return begun

    def _sample(self) -> Iterator[None]:
        looking = self._start()
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        seconds = time.perf_counter() - begin
        looking.stop()
        self.communication = min(1.0, exposed(*_intervals(looking.events(), self._cuda)) / (1e6 * seconds))

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _write(self) -> None:
        """As Chrome's and Perfetto's viewers read it."""
        self._wait()
        self._trace.stop()
        self._folder.mkdir(exist_ok=True)
        temporary = self._folder / f"tmp.{os.getpid()}.{self._name}"
        self._trace.export_chrome_trace(str(temporary))
        os.replace(temporary, self._folder / self._name)
        self._trace = None


def _intervals(events: Iterable[Any], cuda: bool) -> tuple[list[Interval], list[Interval]]:
    """(communication, arithmetic) of a profile, microseconds: NCCL's kernels and all others, or gloo's operations,
    which run in threads of their own, and PyTorch's."""
    found: tuple[list[Interval], list[Interval]] = [], []
    for event in events:
        on_card = event.device_type == torch.autograd.DeviceType.CUDA
        if on_card != cuda or (cuda and event.is_user_annotation):
            continue
        remote = event.name.startswith("nccl" if cuda else "gloo:")
        if remote or cuda or event.name.startswith("aten::"):
            found[not remote].append((event.time_range.start, event.time_range.end))
    return found


def exposed(communication: Iterable[Interval], arithmetic: Iterable[Interval]) -> float:
    """Length of the union of ``communication`` outside of the union of ``arithmetic``."""
    both = [(at, kind, sign) for kind, spans in enumerate((communication, arithmetic)) for span in spans
            for at, sign in zip(span, (1, -1), strict=True)]  # fmt: skip
    depth, since, length = [0, 0], 0.0, 0.0
    for at, kind, sign in sorted(both):
        if depth[0] and not depth[1]:
            length += at - since
        depth[kind] += sign
        since = at
    return length
