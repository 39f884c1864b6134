"""Steps of one process under torch's profiler: the kernels that take longest, and the share of time without any."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from jobs.measuring.functions.timing import rounded
from jobs.measuring.functions.training_step import OURS, Case, flip_steps

STEPS = 3
WARM = 5
LONGEST = 8
"""Kernels that are named."""


def trace(
    device: str, size: str, mask: str, batch: int, precision: str, compiled: bool, threads: int = 1, file: str = ""
) -> dict[str, Any]:
    """Profile STEPS steps after WARM others; the trace goes to ``file``, for ui.perfetto.dev.

    ``busy``: time of kernels as a share of the steps, above 1 if streams overlap; ``longest``: shares of kernels.
    """
    cuda = device == "cuda"
    options = {"device": device, "precision": precision, "threads": threads, "compile": compiled, "seed": 0}
    (step,) = flip_steps(torch, Case(OURS, size, batch, (mask,)), argparse.Namespace(**options))

    def run(times: int) -> float:
        start_time = time.perf_counter()
        for _ in range(times):
            step()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start_time

    run(WARM)
    with profiler(cuda) as profile:
        seconds = run(STEPS)
    if file:
        profile.export_chrome_trace(str(Path(file)))
    rows = times(profile, cuda)
    longest = {name: rounded(spent / seconds) for spent, name, _ in rows[:LONGEST]}
    return {
        "device": device,
        "size": size,
        "mask": mask,
        "milliseconds": rounded(1000 * seconds / STEPS),
        "busy": rounded(sum(spent for spent, _, _ in rows) / seconds),
        "kernels": sum(count for _, _, count in rows) // STEPS,
        "longest": longest,
    }


def profiler(cuda: bool) -> Any:
    """A profiler of the host and, if there is one, of the GPU: a context."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def times(profile: Any, cuda: bool) -> list[tuple[float, str, int]]:
    """(seconds, name, count) of each operation, on CUDA of each kernel; the longest first."""
    field = "self_cpu_time_total"
    if cuda:
        field = "self_device_time_total"
    rows = device_rows(profile.key_averages(), cuda)
    spent = [(getattr(row, field) / 1e6, row.key, row.count) for row in rows]
    return sorted((row for row in spent if row[0]), reverse=True)


def device_rows(rows: Iterable[Any], cuda: bool) -> list[Any]:
    """Rows of ``key_averages()`` whose times add up: on CUDA those of kernels.

    Rows of operations repeat the time of the kernels that they launched, and annotations that of what is in them.
    """
    return [row for row in rows if not cuda or (row.device_type.name == "CUDA" and not row.is_user_annotation)]
