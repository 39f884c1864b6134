"""The ranks of one attempt on this machine: starts, watches and ends them (``jobs.host.sessions``)."""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flip.distributed.shutdown import LIFELINE_VARIABLE
from flip.runs import deletion, python_path
from flip.runs.errors import CAUSES, COMPLETE, STOPPED
from flip.runs.files import RefusedPath, open_append
from flip.runs.rundir import OWNER, RunDir, read_record, write_json
from jobs.host import processes
from jobs.host.rank_entry import allocator
from jobs.host.sessions import HAS_PROC, alive, is_rank, kill_session, start_time

STRAGGLER_SECONDS = 600.0  # for peers of a rank that ended well: they agreed on the end, only a hang takes longer
TERM_INTERVAL = 3.0  # seconds between two SIGTERMs: one that comes while a rank starts may be lost
JOB_KEYS = ("python", "module", "snapshot", "world", "env")  # what ``start`` needs of a job.json


class Rank:
    """A rank that this process has started, the leader of its own session, so that its pid identifies its processes."""

    def __init__(self, pid: int, start: str, popen: subprocess.Popen[bytes]) -> None:
        self.pid = pid
        self.start = start
        self.popen = popen

    def is_alive(self) -> bool:
        return alive(self.pid, self.start)

    def poll(self) -> tuple[bool, int | None]:
        """(ended, exit code as in a shell: 128 + signal; None if unknown)."""
        if self.popen.returncode is None:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return False, None
            # while it is a zombie, no other process can have the number of its group
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self.popen.wait()
        code = self.popen.returncode
        return True, 128 - code if code < 0 else code

    def kill(self) -> None:
        """SIGKILL the rank and all processes of its session."""
        kill_session(self.pid, self.start)


class AdoptedRank:
    """A rank of a supervisor that has died. Its exit code is lost, and only a record names its pid."""

    def __init__(self, pid: int, start: str, run: RunDir, n: int) -> None:
        self.pid = pid
        self.start = start
        self.run = run
        self.n = n

    def is_alive(self) -> bool:
        return is_rank(self.pid, self.start, self.run, self.n)

    def poll(self) -> tuple[bool, None]:
        """As ``Rank.poll``."""
        return not self.is_alive(), None

    def kill(self) -> None:
        """SIGKILL those processes of the session that belong to the attempt; all if the rank lives."""
        if self.is_alive():
            kill_session(self.pid, self.start)
        elif HAS_PROC:
            kill_session(self.pid, self.start, lambda pid: processes.is_of_attempt(pid, str(self.run.path), self.n))


class LocalAttempt:
    """Attempt n of a run, from the start of the first rank to the end of the last. At its deadline it is killed."""

    def __init__(
        self, run: RunDir, n: int, ranks: Sequence[Rank | AdoptedRank], lifeline: int | None, grace: float
    ) -> None:
        self.run = run
        self.n = n
        self.ranks = ranks
        self.lifeline = lifeline
        self.grace = grace
        self.codes: dict[int, int | None] = {}  # exit codes by rank, in the order of their ends
        # exit code of the attempt: the first bad code, else 75 if any, else 0; None for adopted ranks
        self.code: int | None
        if lifeline is not None:
            self.code = COMPLETE
        else:
            self.code = None
        self.deadline = float("inf")
        self.has_unknown_ranks = False  # unrecorded ranks may live: it is over at its deadline, not before
        self.failure: tuple[str, str] | None = None  # (cause, reason) if it could not be started
        self.stop_requested = False  # whether a rank was asked to save and stop
        self.store: Path | None = None  # private folder of the file in which several ranks publish their addresses
        self.next_term = 0.0  # monotonic time of the next SIGTERM
        self.gpus: Sequence[str] = ()  # names of the devices that it was given, as in CUDA_VISIBLE_DEVICES

    def poll(self) -> bool:
        """Whether all ranks have ended and nothing of them is left."""
        for rank, process in enumerate(self.ranks):
            if rank not in self.codes:
                ended, code = process.poll()
                if ended:
                    self.codes[rank] = code
                    self._record_code(code)
        if (self.has_unknown_ranks or len(self.codes) < len(self.ranks)) and time.monotonic() < self.deadline:
            return False
        for process in self.ranks:
            process.kill()
        return all(rank in self.codes for rank in range(len(self.ranks)))

    def _record_code(self, code: int | None) -> None:
        if code is None:
            return
        if code not in (COMPLETE, STOPPED):
            if self.code in (COMPLETE, STOPPED):
                self.code = code
            self.shorten_deadline(self.grace)  # its peers can only wait for it
        else:
            if self.code == COMPLETE:
                self.code = code
            self.shorten_deadline(STRAGGLER_SECONDS)

    def shorten_deadline(self, seconds: float) -> None:
        """Kill ranks that live longer than this from now on."""
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def terminate(self, seconds: float) -> None:
        """Ask all ranks to save and stop; SIGKILL ``seconds`` after the first call. Called until they have ended."""
        if time.monotonic() < self.next_term:
            return
        self.next_term = time.monotonic() + TERM_INTERVAL
        self.shorten_deadline(seconds)
        for rank, process in enumerate(self.ranks):
            if rank not in self.codes and process.is_alive():
                self.stop_requested = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)

    def close(self) -> None:
        if self.store is not None:
            deletion.discard_own_folder(self.store)
        if self.lifeline is not None:
            os.close(self.lifeline)
            self.lifeline = None


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that a process may use: names of CUDA_VISIBLE_DEVICES, or indices of all devices of NVIDIA's driver."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        return list(filter(None, environ["CUDA_VISIBLE_DEVICES"].split(",")))
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def start(run: RunDir, n: int, job: Mapping[str, Any], grace: float, gpus: Sequence[str] = ()) -> LocalAttempt:
    """Start the ranks of attempt n, with ``job`` from job.json. Raises OSError if a process cannot be started.

    ``gpus``: those that the ranks see, all if empty.

    The ranks hold the read end of a pipe whose only write end is ours: its end of file tells them that we have died.
    """
    world = job["world"]
    lifeline, write_end = os.pipe()
    ranks: list[Rank] = []
    record: list[dict[str, Any]] = []
    attempt = LocalAttempt(run, n, ranks, write_end, grace)
    attempt.gpus = gpus
    logs: list[Any] = []
    started = False
    try:
        if world > 1:
            attempt.store = _make_store(run, n)
        shared = _environment(run, job, n, world, lifeline, attempt.store, gpus)
        folder = run.open_logs(n)
        for name in ("node0.out", "node0.err"):  # one by one: the second may fail
            logs.append(open_append(folder / name))
        for rank in range(world):
            popen = subprocess.Popen(
                [job["python"], "-m", job["module"], str(run.path)],
                cwd=job["snapshot"],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=logs[0],
                stderr=logs[1],
                pass_fds=[lifeline],
                start_new_session=True,
            )
            ranks.append(Rank(popen.pid, start_time(popen.pid), popen))
            # after every rank, so that a supervisor that adopts the attempt knows as many as possible
            record.append({"rank": rank, "pid": popen.pid, "start": ranks[-1].start})
            write_json(run.attempt(n) / "pids.json", record)
        started = True
    finally:
        os.close(lifeline)
        for log in logs:
            log.close()
        if not started:
            attempt.shorten_deadline(0.0)
            while not attempt.poll():
                time.sleep(0.01)
            attempt.close()
    return attempt


def failed_start(run: RunDir, n: int, job: Mapping[str, Any], error: OSError) -> LocalAttempt:
    """Attempt n, which failed to start: this machine could not start a process or open a file."""
    attempt = LocalAttempt(run, n, [], None, 0.0)
    # Storage is retried. An error without a file name: no temporary folder is writable (a full disk).
    if isinstance(error, FileNotFoundError) and error.filename:
        cause = "config"
    else:
        cause = "storage"
    if isinstance(error, RefusedPath):
        cause = "permission"
    attempt.failure = cause, f"cannot start {job['python']} in {job['snapshot']}: {error}"
    attempt.code = CAUSES[cause]
    return attempt


def adopt(run: RunDir, n: int, grace: float, patience: float) -> LocalAttempt:
    """Attempt n of a supervisor that died: its ranks stop by the lifeline within ``patience`` seconds, or are killed.

    Ranks of another host, and those that pids.json does not name yet, can only be waited for.
    """
    record = read_record(run.attempt(n) / "pids.json") or []
    start = read_record(run.attempt(n) / "start.json") or {}
    local = start.get("host") == socket.gethostname()
    ranks = [AdoptedRank(row["pid"], row["start"], run, n) for row in record if local]
    attempt = LocalAttempt(run, n, ranks, None, grace)
    attempt.gpus = start.get("gpus", ())
    attempt.has_unknown_ranks = len(ranks) < start.get("world", 0)  # without a start.json none was started
    attempt.shorten_deadline(patience)
    return attempt


def _make_store(run: RunDir, n: int) -> Path:
    """Create the folder of the ranks' store, with mode 0700, on a local disk, because its file is locked at every
    access.

    Its record lets a later attempt delete the folder if this supervisor is killed (``jobs.runtime.rank_process``).
    """
    folder = Path(tempfile.mkdtemp(prefix="flip-store-"))
    try:
        write_json(folder / OWNER, {"run": str(run.path), "attempt": n})
    except OSError:
        deletion.discard_own_folder(folder)
        raise
    return folder


def _environment(
    run: RunDir, job: Mapping[str, Any], n: int, world: int, lifeline: int, store: Path | None, gpus: Sequence[str]
) -> dict[str, str]:
    with socket.socket() as probe:  # for snapshots that do not know FLIP_STORE
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {
        **python_path.variables(job["snapshot"]),
        "PYTHONUNBUFFERED": "1",  # ranks share a log: whole lines, at once
        "FLIP_RUN": str(run.path),
        "FLIP_ATTEMPT": str(n),
        "FLIP_SNAPSHOT": job["snapshot"],
        LIFELINE_VARIABLE: str(lifeline),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "FLIP_STORE": str(store / "store") if store else "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    inherited = {**os.environ, **job["env"]} | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
    return {**inherited, **allocator(inherited), **own}
