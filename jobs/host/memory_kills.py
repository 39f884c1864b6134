"""How many processes has the kernel killed because memory ran out? Standard library, Python >= 3.6."""

import re
from pathlib import Path
from typing import Optional


def memory_kills(own: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/sys/fs/cgroup")) -> int:
    """The processes of this process's cgroup, version 1 or 2, that were killed for memory so far; 0 if unknown.

    In a container the path may be that of the host, which does not exist below the container's root; then the root
    counts.
    """
    for line in _text(own).splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        if kinds:
            root = mounts / "memory"
            name = "memory.oom_control"
        else:
            root = mounts
            name = "memory.events"
        for folder in (root / path.strip("/"), root):
            count = _count(_text(folder / name))
            if count is not None:
                return count
    return 0


def _count(text: str) -> Optional[int]:
    match = re.search("^oom_kill ([0-9]+)$", text, re.MULTILINE)
    if match is None:
        return None
    return int(match.group(1))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
