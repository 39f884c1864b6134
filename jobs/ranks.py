"""The ranks of one attempt on this machine: started, watched, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from flip.exitcodes import COMPLETE, STOPPED
from flip.rundir import RunDir, read_json, write_json
from jobs import processes

STRAGGLE = 600.0
"""Seconds that peers of a cleanly stopped rank may take: they agreed on the stop, only a hang takes longer."""


class Rank(Protocol):
    """One rank: leader of its own session, so that its pid names all that it starts."""

    pid: int
    start: str

    def poll(self) -> tuple[bool, int | None]:
        """(ended, exit code as a shell would say it: 128 + signal; None where it cannot be known)."""


class Child:
    """A rank that this process started."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self.popen, self.pid = popen, popen.pid
        self.start = processes.start_time(popen.pid)

    def poll(self) -> tuple[bool, int | None]:
        if self.popen.returncode is None:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return False, None
            # still a zombie: while it is, no other process can have been given the number of its group
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self.popen.wait()
        code = self.popen.returncode
        return True, 128 - code if code < 0 else code


class Orphan:
    """A rank of a supervisor that is gone. Its code went with its parent."""

    def __init__(self, pid: int, start: str) -> None:
        self.pid, self.start = pid, start

    def poll(self) -> tuple[bool, int | None]:
        return not processes.alive(self.pid, self.start), None


class Attempt:
    """Attempt n of a run, from the first rank's start to the last one's end.

    ``poll`` is called every fraction of a second and says when it is over. A deadline, once set, ends in SIGKILL.
    """

    def __init__(self, run: RunDir, n: int, ranks: list[Rank], leash: int | None, grace: float) -> None:
        self.run, self.n, self.ranks, self.leash, self.grace = run, n, ranks, leash, grace
        self.codes: dict[int, int | None] = {}
        """Exit codes by rank, in the order of their ends."""
        self.code: int | None = COMPLETE if leash is not None else None
        """What stands for the attempt: the first bad code, else 75 if any, else 0; None for orphans."""
        self.deadline = float("inf")
        self.told = False

    def poll(self) -> bool:
        """Whether all ranks have ended and nothing of them is left."""
        for rank, process in enumerate(self.ranks):
            if rank not in self.codes:
                ended, code = process.poll()
                if ended:
                    self.codes[rank] = code
                    self._note(code)
        if len(self.codes) < len(self.ranks) and time.monotonic() < self.deadline:
            return False
        for process in self.ranks:
            processes.kill_session(process.pid, process.start)
        return all(rank in self.codes for rank in range(len(self.ranks)))

    def _note(self, code: int | None) -> None:
        if code is None:
            return
        if code not in (COMPLETE, STOPPED):
            if self.code in (COMPLETE, STOPPED):
                self.code = code
            self.limit(self.grace)  # its peers can only wait for it
        elif code == STOPPED:
            self.code = STOPPED if self.code == COMPLETE else self.code
            self.limit(STRAGGLE)

    def limit(self, seconds: float) -> None:
        """No rank lives longer than this from now on."""
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def terminate(self, seconds: float) -> None:
        """Ask all ranks, once, to save and stop; SIGKILL after ``seconds``."""
        if not self.told:
            self.told = True
            self.limit(seconds)
            for rank, process in enumerate(self.ranks):
                if rank not in self.codes and processes.alive(process.pid, process.start):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGTERM)

    def close(self) -> None:
        if self.leash is not None:
            os.close(self.leash)
            self.leash = None


def start(run: RunDir, n: int, job: Mapping[str, Any], grace: float) -> Attempt:
    """Start the W ranks of attempt n as ``job`` (a job.json) says. OSError where a process cannot be started.

    The ranks hold the read end of a pipe whose only write end is ours: its end of file tells them that we are gone.
    """
    world, (leash, ours) = job["world"], os.pipe()
    ranks: list[Rank] = []
    attempt = Attempt(run, n, ranks, ours, grace)
    shared = _environment(job, n, world, leash)
    out, err = _open_logs(run, n)
    try:
        for rank in range(world):
            command = [job["python"], "-m", job["module"], str(run.path)]
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            popen = subprocess.Popen(
                command,
                cwd=job["snapshot"],
                env={**shared, **place},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=[leash],
                start_new_session=True,
            )
            ranks.append(Child(popen))
        record = [{"rank": rank, "pid": r.pid, "start": r.start} for rank, r in enumerate(ranks)]
        write_json(run.attempt(n) / "pids.json", record)
    except OSError:
        attempt.limit(0.0)
        while not attempt.poll():
            time.sleep(0.01)
        attempt.close()
        raise
    finally:
        for handle in (leash, out, err):
            os.close(handle)
    return attempt


def adopt(run: RunDir, n: int, grace: float, patience: float) -> Attempt:
    """Attempt n of a supervisor that died: its ranks stop by the leash within ``patience`` seconds, or are killed."""
    record = read_json(run.attempt(n) / "pids.json") or []
    local = (read_json(run.attempt(n) / "start.json") or {}).get("host") == socket.gethostname()
    ranks: list[Rank] = [Orphan(row["pid"], row["start"]) for row in record if local]
    attempt = Attempt(run, n, ranks, None, grace)
    attempt.limit(patience)
    return attempt


def _environment(job: Mapping[str, Any], n: int, world: int, leash: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = {
        "PYTHONPATH": job["snapshot"],
        "PYTHONUNBUFFERED": "1",  # ranks share a log: whole lines, at once
        "FLIP_ATTEMPT": str(n),
        "FLIP_SNAPSHOT": job["snapshot"],
        "FLIP_LEASH_FD": str(leash),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return {**os.environ, **job["env"], **ours}


def _open_logs(run: RunDir, n: int) -> tuple[int, int]:
    """Appending handles of logs/<n>/node0.{out,err}; ``logs/latest`` follows."""
    folder = run.logs / str(n)
    folder.mkdir(parents=True, exist_ok=True)
    link = Path(f"{run.logs / 'latest'}.new")
    link.unlink(missing_ok=True)
    link.symlink_to(str(n))
    os.replace(link, run.logs / "latest")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.open(folder / "node0.out", flags, 0o644), os.open(folder / "node0.err", flags, 0o644)
