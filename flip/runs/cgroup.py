"""What limits this process: memory of the host and of its cgroups, throttled threads, processes killed for memory.

The only reader of /proc/self/cgroup, version 1 or 2. A limit of a cgroup holds for all groups below it, so that each
function looks at the group of this process and at all above it. Standard library, Python >= 3.6.

In a container the path of the group may be that of the host, which does not exist below the container's root. Then the
files of the root count, because those of missing groups are missing.
"""

import os
import re
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Union

OWN = "/proc/self/cgroup"
MOUNTS = "/sys/fs/cgroup"
HOST_MEMORY = "/proc/meminfo"

_Path = Union[str, Path]


class _Group(NamedTuple):
    """A cgroup. ``version``: 1 or 2, which name their files differently."""

    folder: Path
    version: int


_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}
_USAGE = {1: "memory.usage_in_bytes", 2: "memory.current"}
_KILLS = {1: "memory.oom_control", 2: "memory.events"}
_THROTTLED = {1: ("throttled_time", 1e9), 2: ("throttled_usec", 1e6)}
"""Name of the count in cpu.stat, and its units in a second."""
_FILE_CACHE = {1: ("total_active_file", "total_inactive_file"), 2: ("active_file", "inactive_file")}
"""Parts of the usage that the kernel frees when memory is needed. Shared memory, which it cannot free, is no part."""


def total_memory(own: _Path = OWN, mounts: _Path = MOUNTS) -> int:
    """Bytes that this process and its children can use at most: the least of the host and of all limits."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [_memory_limit(group) for group in _groups("memory", own, mounts)]
    return min([physical] + [limit for limit in limits if limit is not None])


def available_memory(own: _Path = OWN, mounts: _Path = MOUNTS, host_memory: _Path = HOST_MEMORY) -> Optional[int]:
    """Bytes that can be allocated now, on the host and within all limits; None if the host does not say."""
    match = re.search("^MemAvailable: *([0-9]+) kB$", _text(Path(host_memory)), re.MULTILINE)
    if match is None:
        return None
    available = 1024 * int(match.group(1))
    for group in _groups("memory", own, mounts):
        limit = _memory_limit(group)
        usage = _text(group.folder / _USAGE[group.version]).strip()
        if limit is not None and usage.isdigit():
            counts = _counts(group.folder / "memory.stat")
            cache = sum(counts.get(name, 0) for name in _FILE_CACHE[group.version])
            available = min(available, max(0, limit - int(usage) + cache))
    return available


def memory_kills(own: _Path = OWN, mounts: _Path = MOUNTS) -> int:
    """The processes of this process's cgroup that were killed for memory so far; 0 if unknown."""
    for group in _groups("memory", own, mounts):
        count = _counts(group.folder / _KILLS[group.version]).get("oom_kill")
        if count is not None:
            return count
    return 0


def throttled_seconds(own: _Path = OWN, mounts: _Path = MOUNTS) -> Dict[str, float]:
    """Folder of each cgroup -> CPU seconds for which its limit has stopped threads so far.

    Groups with a history that ended before count it, too: subtract what the same group counted earlier.
    """
    seconds = {}
    for group in _groups("cpu", own, mounts):
        name, units = _THROTTLED[group.version]
        seconds[str(group.folder)] = _counts(group.folder / "cpu.stat").get(name, 0) / units
    return seconds


def _groups(controller: str, own: _Path, mounts: _Path) -> List[_Group]:
    """The cgroups of this process that have a controller: its own, then each one above it."""
    groups = []
    for line in _text(Path(own)).splitlines():
        _, controllers, path = line.split(":", 2)
        version = 2
        roots = [""]
        if controllers:
            version = 1
            if controller not in controllers.split(","):
                continue
            roots = sorted({controller, controllers})  # mounted as "cpu", or as "cpu,cpuacct"
        names = [name for name in path.split("/") if name]
        for root in roots:
            for count in range(len(names), -1, -1):
                groups.append(_Group(Path(mounts, root, *names[:count]), version))
    return groups


def _memory_limit(group: _Group) -> Optional[int]:
    """Bytes; None without a limit in version 2 ("max"). Version 1 has a huge number."""
    text = _text(group.folder / _LIMIT[group.version]).strip()
    if not text.isdigit():
        return None
    return int(text)


def _counts(path: Path) -> Dict[str, int]:
    """The counts of a file with a name and a number in each line; none if it does not exist."""
    rows = [line.split() for line in _text(path).splitlines()]
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _text(path: Path) -> str:
    """The content of a file of the kernel; empty if it does not exist."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
