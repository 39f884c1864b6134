"""Profiles steps: traces for viewers, and samples of the time that steps wait for other ranks."""

from __future__ import annotations

import gzip
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from flip.files.creation import atomic_write, run_folder

if TYPE_CHECKING:
    from flip.training.callbacks import Training

FIRST = 2
"""The first step of an attempt that is sampled; the step before it contains one-time costs."""

Interval = tuple[float, float]


class Profiler:
    """Profiler of one rank, a callback: traces ``steps`` steps to ``folder``, from the step with sample ``first`` on.

    ``minutes``: interval at which a step is sampled for communication; 0, or a single rank: never.
    """

    def __init__(
        self, folder: Path, attempt: int, world: int, device: torch.device, first: int, steps: int, minutes: float
    ) -> None:
        self._folder = folder
        self._attempt = attempt
        self._cuda = device.type == "cuda"
        self._first = first
        self._steps = steps
        self._every = 60 * minutes if world > 1 else 0.0
        self._due = 0.0
        self._seen = 0
        self._left = 0
        self._trace: Any = None
        self._sample: Any = None
        self._start_time = 0.0
        self._name = ""
        self.communication: float | None
        if world == 1:
            self.communication = 0.0
        else:
            self.communication = None
        """Share of a step, without data wait, that waited for other ranks; None: unknown."""

    def before_step(self, training: Training) -> None:
        self._seen += 1
        samples_seen = training.samples_seen
        if self._steps and samples_seen <= self._first < samples_seen + training.span.stage.batch:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
            self._trace = _start(activities, record_shapes=True)
            self._left = self._steps
            self._name = f"{self._attempt}-{training.step + 1}.json.gz"
        elif self._trace is None and self._every and self._seen >= FIRST and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._every
            # of a GPU's step only kernels are read (``_intervals``): recording operations too would slow their launch
            self._sample = _start([ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU])
            self._wait()
            self._start_time = time.perf_counter()

    def step(self, training: Training) -> None:
        if self._trace is not None:
            self._left -= 1
            if self._left == 0:
                self._write()
        elif self._sample is not None:
            self._wait()
            seconds = time.perf_counter() - self._start_time
            profiler = self._sample
            self._sample = None
            profiler.stop()
            exposed = exposed_communication_time(*_intervals(profiler.events(), self._cuda))
            self.communication = min(1.0, exposed / (1e6 * seconds))

    def stop(self, training: Training) -> None:
        """Write the trace if training ends before all its steps."""
        if self._trace is not None:
            self._write()

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    def _write(self) -> None:
        """Write the trace in the format of the viewers of Chrome and Perfetto."""
        self._wait()
        self._trace.stop()
        with tempfile.NamedTemporaryFile(suffix=".json") as plain:
            self._trace.export_chrome_trace(plain.name)
            with atomic_write(run_folder(self._folder) / self._name) as file:
                _compress(plain.name, file)
        self._trace = None


def _start(activities: Sequence[ProfilerActivity], **options: Any) -> Any:
    profiler = profile(activities=activities, **options)
    profiler.start()
    return profiler


def _compress(path: str, file: IO[bytes]) -> None:
    """Write the content of ``path`` to ``file`` with gzip. torch does it line by line, which takes seconds."""
    with open(path, "rb") as content, gzip.GzipFile("", "wb", 6, file) as compressed:
        while chunk := content.read(1 << 20):
            compressed.write(chunk)


def _intervals(events: Iterable[Any], cuda: bool) -> tuple[list[Interval], list[Interval]]:
    """(communication, arithmetic) in microseconds: kernels of NCCL and others, or operations of gloo and PyTorch."""
    intervals: tuple[list[Interval], list[Interval]] = [], []
    for event in events:
        is_cuda = event.device_type == torch.autograd.DeviceType.CUDA
        if is_cuda != cuda or (cuda and event.is_user_annotation):
            continue
        remote = event.name.startswith("nccl" if cuda else "gloo:")
        if remote or cuda or event.name.startswith("aten::"):
            intervals[not remote].append((event.time_range.start, event.time_range.end))
    return intervals


def exposed_communication_time(communication: Iterable[Interval], arithmetic: Iterable[Interval]) -> float:
    """Length of the union of ``communication`` outside the union of ``arithmetic``."""
    edges = [(edge, kind, sign) for kind, spans in enumerate((communication, arithmetic)) for span in spans
             for edge, sign in zip(span, (1, -1), strict=True)]  # fmt: skip
    depth = [0, 0]
    previous = 0.0
    length = 0.0
    for edge, kind, sign in sorted(edges):
        if depth[0] and not depth[1]:
            length += edge - previous
        depth[kind] += sign
        previous = edge
    return length
