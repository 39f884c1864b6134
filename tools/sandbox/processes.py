"""Finds the processes of one folder's Slurm by name and working directory; no pid is ever stored.

Every daemon is started in a working directory of its own below the folder, and its children stay there: a slurmstepd
has its node's spool directory. A user's editor, shell or ``tail`` in the folder has another name.
"""

import contextlib
import os
import signal
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from jobs.host import sessions
from jobs.host.processes import has_ended, read_stat

DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd")


@dataclass(frozen=True)
class Process:
    """A running process; its start time distinguishes it from a later process with the same pid."""

    pid: int
    parent: int
    name: str
    start: str


def running() -> dict[int, Process]:
    """All processes by pid, without zombies, which an init that does not reap would keep for ever."""
    processes = {}
    for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
        name, fields = read_stat(pid)
        if not has_ended(fields):
            processes[pid] = Process(pid, int(fields[1]), name, fields[19])
    return processes


def daemons(folder: Path) -> dict[Path, list[Process]]:
    """Working directory -> the daemons that run in it, for directories in ``folder`` or below."""
    by_directory: dict[Path, list[Process]] = {}
    for process in running().values():
        if process.name in DAEMONS:
            with contextlib.suppress(OSError):  # ended, or another user's
                directory = Path(os.readlink(f"/proc/{process.pid}/cwd").removesuffix(" (deleted)"))
                if directory.is_relative_to(folder):
                    by_directory.setdefault(directory, []).append(process)
    return by_directory


def tasks(steps: Iterable[Process], marks: Collection[Collection[str]]) -> list[Process]:
    """Descendants of the slurmstepds ``steps``.

    Includes orphans whose environment holds all NAME=VALUE entries of one of ``marks``.
    """
    processes = running()
    inside = {step.pid for step in steps}
    while more := {p.pid for p in processes.values() if p.parent in inside} - inside:
        inside |= more
    for pid in processes.keys() - inside:
        with contextlib.suppress(OSError):  # ended, or another user's
            environment = set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
            if any(environment.issuperset(map(os.fsencode, mark)) for mark in marks):
                inside.add(pid)
    return [p for pid, p in processes.items() if pid in inside and p.name not in DAEMONS]


def alive(process: Process) -> bool:
    """Whether this process still runs."""
    with contextlib.suppress(ChildProcessError):  # reap a child of this process, which would stay a zombie
        os.waitpid(process.pid, os.WNOHANG)
    return sessions.alive(process.pid, process.start)


def state(pid: int) -> str:
    """The state letter of a process in /proc; X if it has ended."""
    return read_stat(pid)[1][0]


def kill(processes: Iterable[Process], number: int = signal.SIGKILL) -> None:
    """Send a signal to the processes that still run."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            if alive(process):
                os.kill(process.pid, number)


def freeze(processes: Collection[Process], seconds: float = 2.0) -> None:
    """Send SIGSTOP, and wait at most ``seconds`` until all are stopped or have ended."""
    kill(processes, signal.SIGSTOP)
    limit = time.monotonic() + seconds
    while any(state(process.pid) not in "TZX" for process in processes) and time.monotonic() < limit:
        time.sleep(0.005)


def children_first(processes: Collection[Process]) -> list[Process]:
    """The same processes, children before parents."""
    parents = {process.pid: process.parent for process in processes}

    def depth(pid: int) -> int:
        if pid in parents:
            return 1 + depth(parents[pid])
        return 0

    return sorted(processes, key=lambda process: -depth(process.pid))


def wait(processes: Iterable[Process], seconds: float) -> bool:
    """Wait until all have ended; False after ``seconds``."""
    left = list(processes)
    limit = time.monotonic() + seconds
    while left := [process for process in left if alive(process)]:
        if time.monotonic() > limit:
            return False
        time.sleep(0.05)
    return True


def end(processes: Collection[Process], seconds: float) -> None:
    """Send SIGTERM, and SIGKILL after ``seconds``; returns when all have ended."""
    kill(processes, signal.SIGTERM)
    if not wait(processes, seconds):
        kill(processes)
        wait(processes, 10)
