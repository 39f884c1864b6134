"""The processes of one folder's Slurm, found by what they are and where they stand; no pid is ever written down.

Every daemon is started in a working directory of its own below the folder (``site.Site``), and what it forks stays
there: a slurmstepd has its node's spool directory. A user's editor, shell or ``tail`` in the folder has another name.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd")


@dataclass(frozen=True)
class Process:
    """A running process; its start time distinguishes it from a later process with the same pid."""

    pid: int
    parent: int
    name: str
    start: str


def table() -> dict[int, Process]:
    """Pid -> process without zombies, which an init that does not reap would keep for ever."""
    found = {}
    for entry in os.listdir("/proc"):
        process = _read(int(entry)) if entry.isdigit() else None
        if process:
            found[process.pid] = process
    return found


def daemons(folder: Path) -> dict[Path, list[Process]]:
    """Working directory -> the daemons that run in it, for directories in ``folder`` or below."""
    found: dict[Path, list[Process]] = {}
    for process in table().values():
        if process.name in DAEMONS:
            place = _place(process.pid)
            if place and (place == folder or folder in place.parents):
                found.setdefault(place, []).append(process)
    return found


def tasks(steps: Iterable[Process], marks: Collection[Collection[str]]) -> list[Process]:
    """What the slurmstepds ``steps`` started, and its children.

    Also what has lost its parents but carries all of one of ``marks``, each NAME=VALUE, in its environment.
    """
    everybody = table()
    inside = {step.pid for step in steps}
    grown = True
    while grown:
        more = {p.pid for p in everybody.values() if p.parent in inside} - inside
        inside |= more
        grown = bool(more)
    for pid in everybody.keys() - inside:
        environment = _environment(pid)
        if any(environment.issuperset(map(os.fsencode, mark)) for mark in marks):
            inside.add(pid)
    return [p for pid, p in everybody.items() if pid in inside and p.name not in DAEMONS]


def alive(process: Process) -> bool:
    """Whether this process still runs."""
    with contextlib.suppress(ChildProcessError):  # one of ours: reaped here, else it would stay a zombie
        os.waitpid(process.pid, os.WNOHANG)
    now = _read(process.pid)
    return now is not None and now.start == process.start


def state(pid: int) -> str:
    """Its state letter in /proc, X if it has ended."""
    return _stat(pid)[1][0]


def kill(processes: Iterable[Process], number: int = signal.SIGKILL) -> None:
    """Send a signal to the processes that still run."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            if alive(process):
                os.kill(process.pid, number)


def freeze(processes: Collection[Process], seconds: float = 2.0) -> None:
    """Send SIGSTOP; returns when all are stopped or have ended, after ``seconds`` at the latest."""
    kill(processes, signal.SIGSTOP)
    limit = time.monotonic() + seconds
    while any(state(process.pid) not in "TZX" for process in processes) and time.monotonic() < limit:
        time.sleep(0.005)


def children_first(processes: Collection[Process]) -> list[Process]:
    """The same processes, children before parents."""
    parents = {process.pid: process.parent for process in processes}

    def depth(pid: int) -> int:
        return 1 + depth(parents[pid]) if pid in parents else 0

    return sorted(processes, key=lambda process: -depth(process.pid))


def gone(processes: Iterable[Process], seconds: float) -> bool:
    """Wait until all have ended; False after ``seconds``."""
    left, limit = list(processes), time.monotonic() + seconds
    while True:
        left = [process for process in left if alive(process)]
        if not left or time.monotonic() > limit:
            return not left
        time.sleep(0.05)


def end(processes: Collection[Process], seconds: float) -> None:
    """Send SIGTERM, and SIGKILL after ``seconds``; returns when all have ended."""
    kill(processes, signal.SIGTERM)
    if not gone(processes, seconds):
        kill(processes)
        gone(processes, 10)


def _read(pid: int) -> Process | None:
    name, fields = _stat(pid)
    if fields[0] == "X" or (fields[0] == "Z" and int(fields[17]) < 2):  # the first thread may end before the others
        return None
    return Process(pid, int(fields[1]), name, fields[19])


def _stat(pid: int) -> tuple[str, list[str]]:
    """Name, and the fields of /proc/PID/stat from the state on."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # gone, or gone while we read
        return "", ["X"]
    head, _, tail = text.rpartition(")")
    return head.partition("(")[2], tail.split()


def _place(pid: int) -> Path | None:
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)"))
    except OSError:  # gone, or somebody else's
        return None


def _environment(pid: int) -> set[bytes]:
    """NAME=VALUE entries of the environment that the process started with."""
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    except OSError:  # gone, or somebody else's
        return set()
