"""Training steps of one process: samples/s, share of the peak, memory next to the plan's, and compilation."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed

from flip import model_costs
from flip.config.schema import Compute
from flip.distributed import parallel
from jobs.measuring.functions.peak_memory import peak_bytes
from jobs.measuring.functions.ranks import run_ranks
from jobs.measuring.functions.timing import rounded
from jobs.measuring.functions.training_step import OURS, Case, flip_steps, model

TOLERANCE = {"bf16": 0.02, "fp32": 0.001}
"""Largest difference of a loss from that in fp32 without compilation, as a share of the first one."""
SMALLEST = 1e-9
"""Loss by which differences are divided, at least: a GPU that only pretends returns 0."""
WARM = 2
"""Steps after the first one that are not timed."""


def step(
    device: str, size: str, mask: str, batch: int, precision: str, compiled: bool, seconds: float
) -> dict[str, Any]:
    """Measure steps for ``seconds`` after warm-up; at least three."""
    threads = torch.get_num_threads()
    options = {"device": device, "precision": precision, "threads": threads, "compile": compiled, "seed": 0}
    (run,) = flip_steps(torch, Case(OURS, size, batch, (mask,)), argparse.Namespace(**options))
    first = _seconds(run, device)
    for _ in range(WARM):
        _seconds(run, device)
    graphs = _graphs()
    times = list[float]()
    while sum(times) < seconds or len(times) < 3:
        times.append(_seconds(run, device))
    median = statistics.median(times)
    flops = batch * model_costs.training_flops(model(size), mask)["total"] / median
    result: dict[str, Any] = {
        "device": device,
        "size": size,
        "mask": mask,
        "batch": batch,
        "precision": precision,
        "compiled": compiled,
        "parameters": model_costs.parameters(model(size))["total"],
        "samples_per_second": rounded(batch / median),
        "milliseconds": rounded(1000 * median),
        "spread": rounded((max(times) - min(times)) / median),
        "first_step_seconds": rounded(first),
        "recompilations": _graphs() - graphs,
        "tflops": rounded(flops / 1e12),
        "planned_megabytes": round(_planned(size, mask, batch, device, precision) / 1e6),
        "megabytes": round(peak_bytes(device) / 1e6),
    }
    if device == "cpu":
        return result | {"threads": threads, "core_gflops": rounded(flops / 1e9 / threads)}
    peak = model_costs.peak_flops(torch.cuda.get_device_name(), precision)
    if peak is not None:
        result["utilisation"] = rounded(flops / peak)
    return result


def losses(device: str, size: str, batch: int, steps: int, ranks: int) -> dict[str, Any]:
    """The losses of the same steps in other arithmetic and on ``ranks`` ranks, against one in fp32 without compilation.

    Weights change with each step, so that gradients count, too. ``largest_difference``: of a step, as a share of the
    first loss; None if a loss is not finite.
    """
    reference = _losses(device, size, batch, steps, "fp32", False)
    forms = [("bf16", False)]
    if device == "cuda":
        forms += [("fp32", True), ("bf16", True)]
    rows = []
    for precision, compiled in forms:
        values = _losses(device, size, batch, steps, precision, compiled)
        form = f"{precision}, {'compiled' if compiled else 'eager'}"
        rows.append(_compared(form, values, reference, TOLERANCE[precision]))
    if ranks > 1:
        options = {"device": device, "size": size, "batch": batch, "steps": steps}
        values = run_ranks("losses_rank", options, ranks)["losses"]
        rows.append(_compared(f"fp32, eager, {ranks} ranks", values, reference, TOLERANCE["fp32"]))
    first, last = (rounded(reference[step]) for step in (0, -1))
    return {"device": device, "size": size, "steps": steps, "first_loss": first, "last_loss": last, "rows": rows}


def losses_rank(device: str, size: str, batch: int, steps: int) -> dict[str, Any]:
    """The part of one rank of the steps in fp32 without compilation: the loss of each step, of all ranks."""
    world = parallel.start(Compute(device=device, threads=1, deterministic="no", compile="no"), hang_minutes=1.0)
    shares = _losses(device, size, batch, steps, "fp32", False, world)
    total = torch.tensor(shares, dtype=torch.float64, device=world.device)
    distributed.all_reduce(total)
    parallel.stop()
    return {"losses": (total / world.size).tolist()}


def _compared(form: str, values: Sequence[float], reference: Sequence[float], tolerance: float) -> dict[str, Any]:
    differences = [abs(a - b) for a, b in zip(values, reference, strict=True)]
    difference = float(np.max(differences)) / max(reference[0], SMALLEST)  # NaN stays
    largest = rounded(difference) if math.isfinite(difference) else None
    return {"form": form, "largest_difference": largest, "tolerance": tolerance}


def _losses(
    device: str, size: str, batch: int, steps: int, precision: str, compiled: bool, world: parallel.World | None = None
) -> list[float]:
    torch.set_num_threads(1)  # of a small model: more would wait for each other on a busy machine
    options = {"device": device, "precision": precision, "threads": 1, "compile": compiled, "seed": 0}
    (run,) = flip_steps(torch, Case(OURS, size, batch, ("0.5",)), argparse.Namespace(**options), world)
    return [float(run()) for _ in range(steps)]


def _seconds(run: Callable[[], Any], device: str) -> float:
    start_time = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_time


def _planned(size: str, mask: str, batch: int, device: str, precision: str) -> int:
    """Bytes that a plan counts for such a step."""
    return model_costs.device_memory(model(size), Compute(device=device, precision=precision), batch, mask)["total"]


def _graphs() -> int:
    """Graphs that were compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
