"""Processes of this machine by identity: a pid may have been given to somebody else, a pid with its start time not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path


def start_time(pid: int) -> str:
    """When the process began, in the system's own words (ticks since boot); empty if there is none."""
    if not Path("/proc/self/stat").exists():
        shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return shown.stdout.strip()
    fields = _stat(pid)
    return fields[19] if fields else ""


def alive(pid: int, start: str) -> bool:
    """Whether that very process still runs (a zombie does not)."""
    return bool(start) and start_time(pid) == start and not _over(_stat(pid))


def session(leader: int) -> list[int]:
    """Pids of the living processes in the session that ``leader`` opened, whether or not it still lives."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(entry.name))
        if fields and not _over(fields) and fields[3] == str(leader):
            found.append(int(entry.name))
    return found


def kill_session(leader: int, start: str) -> None:
    """SIGKILL whatever is left of a rank: its process group and those of its session that left the group.

    Does nothing where the leader's pid has been given to another process since.
    """
    if start_time(leader) not in ("", start):
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)
    for pid in session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _over(fields: list[str]) -> bool:
    """Whether nothing of a process can run any more. Its first thread may be a zombie while others still end: 17 is the
    number of threads."""
    return bool(fields) and fields[0] in "ZX" and int(fields[17]) < 2


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name (which may hold anything): state, ppid, pgrp, session, ... 19: start."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:  # gone, or gone while we read
        return []
    return text.rpartition(")")[2].split()
