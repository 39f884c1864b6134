"""What this machine offers to ranks: cores, memory, fast bf16, a CUDA driver."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from flip.runs.cgroup import total_memory


@dataclass(frozen=True)
class Host:
    """A node that ranks run on. ``memory``: bytes. ``bf16``: its CPU has fast bf16 arithmetic. ``hours``: limit of a
    job there, unless a run asks for another."""

    cores: int
    memory: int
    bf16: bool = False
    cuda: bool = False
    hours: float = 24.0


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def core_seconds(statistics: str = "/proc/stat") -> tuple[float, float]:
    """Seconds so far of the cores that this process may use: in use by other processes, and all.

    (0, 0) without Linux's ``statistics``.
    """
    rows = [line.split() for line in _text(statistics).splitlines() if re.match(r"cpu\d", line)]
    allowed = os.sched_getaffinity(0) if rows else ()
    ticks = [[int(tick) for tick in more[:8]] for name, *more in rows if int(name[3:]) in allowed]  # 3, 4: idle
    total = sum(map(sum, ticks))
    used = sum(sum(row) - row[3] - row[4] for row in ticks)
    hertz = os.sysconf("SC_CLK_TCK")
    own = sum(os.times()[:4])
    if total:
        return used / hertz - own, total / hertz
    return 0.0, 0.0


def others_since(before: tuple[float, float]) -> tuple[float, float]:
    """Core-seconds that other processes used since ``before`` (``core_seconds``), and those that passed."""
    used, total = core_seconds()
    return used - before[0], total - before[1]


def this_host() -> Host:
    """This machine."""
    flags = next((line for line in _text("/proc/cpuinfo").splitlines() if line.startswith("flags")), "").split()
    return Host(
        cores=cores(),
        memory=total_memory(),
        bf16="avx512_bf16" in flags or "amx_bf16" in flags,
        cuda=Path("/proc/driver/nvidia/version").exists(),
    )


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
