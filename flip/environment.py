"""What an attempt runs on: interpreter, packages, processor and GPU.

Equal weights are promised for equal environments only (docs/parallel.md). Each attempt records its own, so that a
package that was upgraded between two attempts leaves a trace. No torch: the launcher records the environment, too.
"""

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from flip.runs.rundir import RunDir, read_lenient

PACKAGES = ("torch", "torchvision", "timm", "numpy", "tokenizers", "omegaconf", "pillow", "simplejpeg", "safetensors")
"""Packages whose release can change samples, weights or files."""

_GENERATION = {"cpu family": "family", "model": "model", "CPU implementer": "implementer", "CPU part": "part"}
"""What distinguishes generations: lines of /proc/cpuinfo on x86 and on Arm, and their short names."""


def environment() -> dict[str, Any]:
    """Interpreter, platform and package versions, from metadata without imports."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": versions}


def of_attempt(gpu: str = "", kernel: str = "") -> dict[str, Any]:
    """``environment`` with the processor's and the GPU's model. ``gpu``: its name; empty: no GPU is used.

    ``kernel``: whether the visible-patch kernel is used, and which. It changes no batch, so that ``changes`` leaves it
    out.
    """
    return {**environment(), "processor": processor(), "gpu": gpu, "kernel": kernel}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of two records of ``of_attempt`` differs and can change bits: "torch 2.12.0 -> 2.13.0".

    The platform is left out: a new kernel changes no result.
    """
    pairs = {name: (before.get(name), now.get(name)) for name in ("python", "processor", "gpu")}
    old = before.get("packages") or {}
    new = now.get("packages") or {}
    for name in PACKAGES:
        pairs[name] = old.get(name), new.get(name)
    return [f"{name} {a or 'none'} -> {b or 'none'}" for name, (a, b) in pairs.items() if (a or "") != (b or "")]


def changes_in(run: RunDir, attempt: int, now: Mapping[str, Any] | None = None) -> list[str]:
    """``changes`` of an attempt since the attempt before it that recorded its environment; empty if there is none.

    ``now``: the environment of the attempt; None: what it has recorded. Damaged records count as none.
    """
    current = _recorded(run, attempt) if now is None else now
    if not current:
        return []
    for n in reversed(run.attempt_numbers()):
        before = _recorded(run, n) if n < attempt else {}
        if before:
            return changes(before, current)
    return []


def processor(cpuinfo: str = "/proc/cpuinfo") -> str:
    """The processor with the numbers of its generation: "AMD EPYC (family 26, model 2)".

    Virtual machines give several generations one name. Without a name in Linux's list: the architecture.
    """
    try:
        lines = Path(cpuinfo).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    values: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())  # of the first core
    name = values.get("model name") or platform.machine()
    numbers = ", ".join(f"{word} {values[key]}" for key, word in _GENERATION.items() if values.get(key))
    if numbers:
        name += f" ({numbers})"
    return name


def _recorded(run: RunDir, attempt: int) -> Mapping[str, Any]:
    record = read_lenient(run.attempt(attempt) / "ready.json")
    return record.get("environment") or {}
