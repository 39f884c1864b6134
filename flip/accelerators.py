"""Memory and dense bf16 peak of GPUs, for plans and for MFU. Their price is the site's own (a profile's field).

From NVIDIA's data sheets; where those give the rate with sparsity, half of it. Memory is nominal, in 10^9 bytes: what a
card has beyond that is left to its context, the buffers of NCCL, and what the allocator cannot use.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    name: str
    pattern: str
    """Of its names, in lower case: those that people and drivers give it, and Slurm's gres."""
    memory_gb: float
    tflops: float
    """Dense bf16 with fp32 sums, TFLOP/s."""
    source: str


#: The first whose pattern is found in a name counts. A bare ``a100`` is taken for the smaller one.
ACCELERATORS = (
    Accelerator("B200", r"\bb200", 180, 2250, "NVIDIA HGX B200 data sheet: 4500 with sparsity"),
    Accelerator("GH200", r"gh200", 96, 989, "NVIDIA GH200 data sheet: 1979 with sparsity"),
    Accelerator("H200 NVL", r"\bh200.*nvl", 141, 835, "NVIDIA H200 data sheet: 1671 with sparsity"),
    Accelerator("H200", r"h200", 141, 989, "NVIDIA H200 data sheet: 1979 with sparsity"),
    Accelerator("H100 NVL", r"h100.*nvl", 94, 835, "NVIDIA H100 data sheet: 1671 with sparsity"),
    Accelerator("H100 PCIe", r"h100.*pcie", 80, 756, "NVIDIA H100 data sheet: 1513 with sparsity"),
    Accelerator("H100 SXM", r"h100", 80, 989, "NVIDIA H100 data sheet: 1979 with sparsity"),
    Accelerator("A100 80 GB", r"a100.*80", 80, 312, "NVIDIA A100 data sheet"),
    Accelerator("A100 40 GB", r"a100", 40, 312, "NVIDIA A100 data sheet"),
    Accelerator("L40S", r"l40s", 48, 362, "NVIDIA L40S data sheet"),
    Accelerator("L4", r"\bl4\b", 24, 121, "NVIDIA L4 data sheet: 242 with sparsity"),
    Accelerator("A40", r"\ba40\b", 48, 150, "NVIDIA A40 data sheet"),
    Accelerator("A10", r"\ba10\b", 24, 125, "NVIDIA A10 data sheet"),
)


def find(name: str) -> Accelerator | None:
    """The card of that name, as ``H100 SXM``, ``NVIDIA A100-SXM4-80GB`` or gres ``h100``; None: not in the table."""
    name = name.lower()
    return next((card for card in ACCELERATORS if re.search(card.pattern, name)), None)


_SPEED = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5}
"""Precision -> tensor-core rate relative to bf16. It is the same for every card of the table."""


def peak_flops(name: str, precision: str) -> float | None:
    """Dense datasheet peak of a device in FLOP/s, or None if it is unknown.

    ``name``: as ``torch.cuda.get_device_name`` returns it. ``precision``: ``bf16``, ``fp16``, ``tf32`` or ``fp32``. The
    last does not run on tensor cores and has no peak here. A MIG slice has only a part of its card's rate: unknown.
    """
    card = None if " MIG " in name else find(name)
    return None if card is None or precision not in _SPEED else 1e12 * card.tflops * _SPEED[precision]
