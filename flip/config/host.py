"""What this machine offers to ranks: cores, memory, fast bf16, a CUDA driver."""

import os
import re
from dataclasses import dataclass
from pathlib import Path


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


def throttled_seconds(cgroup: str = "/proc/self/cgroup", mounts: str = "/sys/fs/cgroup") -> dict[str, float]:
    """Each cgroup that contains this process -> CPU seconds for which its limit has stopped threads so far.

    Groups with a history that ended before count it, too: subtract what the same group counted earlier.
    """
    counted = {}
    for line in _lines(cgroup):
        _, names, path = line.rstrip().split(":", 2)
        if names and "cpu" not in names.split(","):
            continue
        for group in (Path(path), *Path(path).parents):
            place = Path(mounts, names, str(group).lstrip("/"), "cpu.stat")
            values = dict(row.split()[:2] for row in _lines(str(place)))
            nanoseconds = int(values.get("throttled_time", 0))  # cgroup version 1
            microseconds = int(values.get("throttled_usec", 0))  # cgroup version 2
            counted[str(place.parent)] = nanoseconds / 1e9 + microseconds / 1e6
    return counted


def _lines(path: str) -> list[str]:
    """The lines of a file of the system; none if it does not exist."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


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
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flags = next((line for line in _text("/proc/cpuinfo").splitlines() if line.startswith("flags")), "").split()
    return Host(
        cores=cores(),
        memory=min([memory, *memory_limits()]),
        bf16="avx512_bf16" in flags or "amx_bf16" in flags,
        cuda=Path("/proc/driver/nvidia/version").exists(),
    )


def memory_limits(own: str = "/proc/self/cgroup", mounts: str = "/sys/fs/cgroup") -> list[int]:
    """Memory limits in bytes of this process's cgroup and of each one above it, in cgroup version 1 or 2.

    In a container the path may be that of the host, which does not exist below the container's root; then the root's
    limit counts.
    """
    limits = []
    for line in _text(own).splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        if kinds:
            file = "memory/{}/memory.limit_in_bytes"
        else:
            file = "{}/memory.max"
        names = path.strip("/").split("/")
        texts = [_text(f"{mounts}/{file.format('/'.join(names[:n]))}").strip() for n in range(len(names) + 1)]
        limits += [int(text) for text in texts if text.isdigit()]  # else "max"; version 1 has a huge number for none
    return limits


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
