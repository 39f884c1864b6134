"""Products of matrices by dtype on each device, and copies between host and device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from flip import model_costs
from flip.monitoring.utilisation import measure_matmul_flops
from flip.runs.cgroup import throttled_seconds
from jobs.measuring.functions.timing import rounded

CUDA_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CPU_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COPY_BYTES = {"cuda": 1 << 28, "cpu": 1 << 26}


def matmul(device: str, seconds: float = 1.0) -> dict[str, Any]:
    """TFLOP/s of large products, of each GPU alone or of all cores; for GPUs also the datasheet's bf16."""
    if device == "cuda":
        devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
        kinds = CUDA_TYPES
    else:
        devices = [torch.device("cpu")]
        kinds = CPU_TYPES
    rows = []
    before = throttled_seconds()
    for each in devices:
        rates = {name: _tflops(each, dtype, seconds) for name, dtype in kinds.items()}
        row: dict[str, Any] = {"number": each.index or 0, "name": _name(each), **rates}
        peak = model_costs.peak_flops(_name(each), "bf16")
        if peak is not None:
            row["datasheet"] = peak / 1e12
        rows.append(row)
    stopped = round(_most_throttled(before, throttled_seconds()), 2)
    return {"device": device, "threads": torch.get_num_threads(), "throttled_seconds": stopped, "devices": rows}


def copies(device: str, seconds: float = 0.5) -> dict[str, Any]:
    """GB/s from host to each device, from page-locked memory; on a CPU between two tensors."""
    rows = []
    count = torch.cuda.device_count() if device == "cuda" else 1
    for number in range(count):
        source = torch.ones(COPY_BYTES[device], dtype=torch.uint8)
        if device == "cuda":
            source = source.pin_memory()
        target = torch.empty_like(source, device=torch.device(device, number) if device == "cuda" else None)
        rows.append({"number": number, "gbytes": _gbytes(source, target, seconds)})
    return {"device": device, "devices": rows}


def _most_throttled(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """CPU seconds for which the strictest of the groups has stopped threads in between."""
    return max((seconds - before.get(group, 0.0) for group, seconds in after.items()), default=0.0)


def _tflops(device: torch.device, dtype: torch.dtype, seconds: float) -> float:
    return rounded(measure_matmul_flops(device, dtype, seconds) / 1e12)


def _gbytes(source: torch.Tensor, target: torch.Tensor, seconds: float) -> float:
    target.copy_(source)
    if target.is_cuda:
        torch.cuda.synchronize(target.device)
    start_time = time.perf_counter()
    count = 0
    spent = 0.0
    while spent < seconds:
        target.copy_(source)
        if target.is_cuda:
            torch.cuda.synchronize(target.device)
        count += 1
        spent = time.perf_counter() - start_time
    return rounded(count * source.nbytes / spent / 1e9)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU"
