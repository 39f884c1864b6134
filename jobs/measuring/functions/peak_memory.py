"""Peak memory of a piece of work in this process: resident bytes on a CPU (Linux), the allocator's bytes on CUDA."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path


def start_peak(device: str = "cpu") -> int:
    """Start a new peak and return the bytes present now, without what the C library keeps after it was freed."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM becomes VmRSS (proc_pid_clear_refs(5))
    return peak_bytes()


def peak_bytes(device: str = "cpu") -> int:
    """Largest number of bytes since ``start_peak``, or since the start of this process.

    Not ``ru_maxrss``: it never falls, and a child process starts with its parent's.
    """
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert match
    return 1024 * int(match[1])
