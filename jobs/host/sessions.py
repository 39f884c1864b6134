"""Ranks as processes of this host: each leads a session of its own, so that its pid identifies all of its processes.

A process is identified by its pid and its start time, because the pid may belong to a later process. A rank that the
caller has not started itself is recognised by ``is_rank`` before it gets a signal: pids.json may come with a copy of a
run, or be prepared. Without /proc (macOS), ps is asked. Standard library, Python >= 3.6.
"""

import os
import signal
import subprocess
from pathlib import Path
from typing import Callable, List, Optional

from flip.runs.rundir import RunDir
from jobs.host import processes

HAS_PROC = Path("/proc/self/stat").exists()


def start_time(pid: int) -> str:
    """When the process started, in the system's own format; empty if it does not exist."""
    if HAS_PROC:
        return processes.start_time(pid)
    return _ps("lstart", pid)


def _ps(field: str, pid: int) -> str:
    """A field of a process as ps shows it; empty if the process does not exist."""
    command = ["ps", "-ww", "-o", "%s=" % field, "-p", str(pid)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return done.stdout.decode("utf-8", "replace").strip()


def alive(pid: int, start: str) -> bool:
    """Whether this process still runs (a zombie does not)."""
    if not start or start_time(pid) != start:
        return False
    return not (HAS_PROC and processes.has_ended(processes.read_stat(pid)[1]))


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal (SIGSTOP). False without /proc."""
    return processes.read_stat(pid)[1][0] == "T"


def session_pids(leader: int) -> List[int]:
    """Pids of the living processes in the session that ``leader`` opened, whether or not it still lives."""
    fields = {int(entry.name): processes.read_stat(int(entry.name))[1] for entry in Path("/proc").glob("[0-9]*")}
    return [pid for pid, row in fields.items() if not processes.has_ended(row) and row[3] == str(leader)]


def is_rank(pid: int, start: str, run: RunDir, n: int) -> bool:
    """Whether a process is a living rank of attempt ``n`` of a run, and belongs to this user."""
    if not alive(pid, start):
        return False
    if HAS_PROC:
        return processes.is_of_attempt(pid, str(run.path), n)
    # ps of macOS does not show environments. The run directory is the last argument of a rank.
    return _ps("uid", pid) == str(os.geteuid()) and _ps("command", pid).endswith(" %s" % run.path)


def kill_group(leader: int) -> None:
    """SIGKILL the process group of a rank. Nothing happens if it has none."""
    _kill(os.killpg, leader)


def kill_session(leader: int, start: str, belongs: Optional[Callable[[int], bool]] = None) -> None:
    """SIGKILL the remaining processes of a rank: its process group, and processes of its session outside the group.

    Does nothing if the leader's pid belongs to another process by now. ``belongs``: whether a process may be killed.
    """
    if start_time(leader) not in ("", start):
        return
    if belongs is None or belongs(leader):
        kill_group(leader)
    for pid in session_pids(leader):
        if belongs is None or belongs(pid):
            _kill(os.kill, pid)


def _kill(send: Callable[[int, int], None], number: int) -> None:
    try:
        send(number, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
