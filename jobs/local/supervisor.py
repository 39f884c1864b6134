"""The process that looks after the runs of one sweep on this machine: starts attempts, watches them, decides, goes on.

    python -m jobs.local.supervisor SWEEP_DIR

It detaches itself and returns at once. One per sweep folder: it holds a lock on .supervisor/lock, and another that
finds it held ends. It loads no torch. When it dies, whatever the reason, its ranks see the end of their lifeline and
stop; the next one adopts what is left. What goes wrong with the files of one run is no matter of the others; any other
error in here is left to end it, with the traceback in .supervisor/log.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flip.distributed.shutdown import ORPHAN_GRACE_SECONDS
from flip.runs import ownership
from flip.runs.errors import CAUSES, ConfigError, start_logging
from flip.runs.ownership import closed_folder
from flip.runs.rundir import RunDir, read_record, write_json
from jobs.common.filesystem import locked
from jobs.host import attempts, canary, notify
from jobs.host.rank_entry import raise_limits
from jobs.host.restart_policy import LAUNCHER_STOPPED, STOP_REQUESTED
from jobs.local import rank_processes

POLL = 0.2
SCAN = 1.0
RETRY = 30.0
"""Seconds until something is tried again that failed because of the machine (a full disk, no more processes)."""
ADOPTION = ORPHAN_GRACE_SECONDS + 10.0
"""Seconds that ranks of a dead supervisor get at least: their lifeline gives them ORPHAN_GRACE_SECONDS to save and
stop."""

log = logging.getLogger("supervisor")


class Settings:
    """.supervisor/settings.json, written by each submission and read again as it changes."""

    def __init__(self, sweep: Path) -> None:
        record = read_record(sweep / ".supervisor" / "settings.json") or {}
        self.parallel: int = record.get("parallel", 1)  # runs at once
        self.peer_grace: float = record.get("peer_grace", 20.0)  # seconds that the peers of a failed rank get
        self.stop_grace: float = record.get("stop_grace", 90.0)  # seconds to save and stop after SIGTERM


def submission_stamp(sweep: Path) -> tuple[int, int] | None:
    """What tells the newest submission from others: each writes settings.json anew."""
    try:
        facts = (sweep / ".supervisor" / "settings.json").stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino


class Supervisor:
    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self.settings = Settings(sweep)
        self.submission = submission_stamp(sweep)  # the newest one at the time of the order to end
        self.active: dict[Path, rank_processes.LocalAttempt] = {}
        self.not_before: dict[tuple[Path, int], float] = {}
        """(run, attempt whose verdict stands) -> monotonic time before which the run does not start again."""
        self.resting: dict[Path, float] = {}  # runs whose files made trouble, with the monotonic time of the next try
        self.damaged: set[Path] = set()  # those of them that a person must mend: nobody waits for them
        self.leaving = False

    def leave(self) -> None:
        """The order to end: let the runs save and stop. It holds until somebody submits again."""
        self.leaving, self.submission = True, submission_stamp(self.sweep)

    def serve(self) -> None:
        """Until nothing is left to do, or until told to end."""
        scanned, waiting, told = -SCAN, True, False
        while True:
            if self.leaving:
                if not told:
                    log.info("told to end: %d runs save and stop", len(self.active))
                told = True
                for attempt in self.active.values():
                    attempt.terminate(self.settings.stop_grace)
            elif time.monotonic() - scanned >= SCAN:
                with contextlib.suppress(OSError, ValueError):  # else as they were
                    self.settings = Settings(self.sweep)
                with self.apart(self.sweep):
                    waiting = self.start_eligible()
                scanned = time.monotonic()
            if self.watch():
                scanned = -SCAN  # there is room now
            elif not self.active and (self.leaving or not waiting):
                return
            else:
                time.sleep(POLL)

    # -- starting ---------------------------------------------------------------------------------------------------

    def start_eligible(self) -> bool:
        """Start what may start; whether anything is still to be done later."""
        waiting = False
        for run, job in self.wanted():
            with self.apart(run.path):
                due = self.due(run)
                if due <= time.monotonic() and (self.unended(run) or len(self.active) < self.settings.parallel):
                    self.start(run, job)
                waiting = True
        return waiting or bool(self.resting.keys() - self.damaged)

    def wanted(self) -> list[tuple[RunDir, dict[str, Any]]]:
        """Submitted runs that are not over, in the order of their submission, but those active and those that rest."""
        found = []
        present = {path.parent for path in self.sweep.glob("*/job.json")}
        self.resting = {path: due for path, due in self.resting.items() if path in present}
        for path in present:
            if path in self.active or self.resting.get(path, 0.0) > time.monotonic():
                continue
            with self.apart(path):
                refuse_untrusted(self.sweep, path, path / "job.json")
                run, job = RunDir(path), read_record(path / "job.json")
                if job is not None and job.get("kind", "local") != "local":
                    continue  # another cluster looks after it
                verdict = attempts.current_end(run)
                over = run.result.exists() or (verdict is not None and verdict["action"] in ("stop", "done"))
                waits = not over and job is not None and self.waits(run, job)
                if job is not None and (self.unended(run) or not (over or waits or run.cancel.exists())):
                    found.append((job["order"], run.name, run, job))
        return [(run, job) for _, _, run, job in sorted(found, key=lambda row: row[:2])]

    def waits(self, run: RunDir, job: dict[str, Any]) -> bool:
        """Whether its canary has not passed. One that stopped for good never will: then nobody waits for anything."""
        ahead = canary.canary_of(run, job)
        return ahead is not None and not canary.passed(ahead, canary.canary_record(ahead).get("steps", 0))

    @contextlib.contextmanager
    def apart(self, path: Path) -> Iterator[None]:
        """What goes wrong with the files of one run must not end the others: it rests for a while."""
        try:
            yield
        except OSError as error:  # may pass: a full disk, a server that is away, no more processes
            log.error("%s: %s; once more in %g s", path.name, error, RETRY)
            self.damaged.discard(path)
        except (ValueError, KeyError) as error:
            log.error("%s: a file of it is damaged; left alone: %r", path.name, error)
            self.damaged.add(path)
        else:
            self.resting.pop(path, None)
            self.damaged.discard(path)
            return
        self.resting[path] = time.monotonic() + RETRY

    def unended(self, run: RunDir) -> int:
        """The newest attempt if it has no end yet, else 0."""
        n = run.newest_attempt()
        return n if n and not (run.attempt(n) / "end.json").exists() else 0

    def due(self, run: RunDir) -> float:
        """When the run may start, by this machine's monotonic clock."""
        verdict = attempts.current_end(run)
        key = (run.path, verdict["attempt"] if verdict else 0)
        if key not in self.not_before:
            wait = min(verdict["delay"], verdict["time"] + verdict["delay"] - time.time()) if verdict else 0.0
            self.not_before[key] = time.monotonic() + wait
        return self.not_before[key]

    def start(self, run: RunDir, job: dict[str, Any]) -> None:
        """Adopt the attempt of a dead supervisor, or begin a new one."""
        n = self.unended(run)
        if n:
            log.info("%s: adopting attempt %d", run.name, n)
            patience = max(ADOPTION, self.settings.stop_grace)
            self.active[run.path] = rank_processes.adopt(run, n, self.settings.peer_grace, patience)
            return
        job = {key: job[key] for key in rank_processes.JOB_KEYS}  # a damaged one is found before an attempt begins
        facts = {"launcher": os.getpid(), "world": job["world"], "snapshot": job["snapshot"], "job": ""}
        n = attempts.start_attempt(run, facts)
        try:
            attempt = rank_processes.start(run, n, job, self.settings.peer_grace)
        except OSError as error:  # its end is written as any other's, so that delays and limits apply
            attempt = rank_processes.failed_start(run, n, job, error)
        self.active[run.path] = attempt
        log.info("%s: attempt %d, %d ranks", run.name, n, len(attempt.ranks))

    # -- watching ---------------------------------------------------------------------------------------------------

    def watch(self) -> bool:
        """Look once at every active attempt; whether one ended."""
        ended = False
        for path, attempt in list(self.active.items()):
            over = attempt.poll()
            if self.resting.get(path, 0.0) > time.monotonic():
                continue
            with self.apart(path):
                if attempt.run.cancel.exists():
                    attempt.terminate(self.settings.stop_grace)
                if over:
                    self.conclude(attempt)
                    del self.active[path]
                    ended = True
            if over and (path in self.damaged or not os.path.exists(path)):
                self.active.pop(path, None)
        return ended

    def conclude(self, attempt: rank_processes.LocalAttempt) -> None:
        """Record the end, then act on it."""
        attempt.close()
        run, n = attempt.run, attempt.n
        if attempt.failure:
            cause, reason = attempt.failure
            run.write_cause(n, 0, cause, CAUSES[cause], reason)
        state = LAUNCHER_STOPPED if self.leaving else "RUNNING"
        decision = attempts.end_attempt(
            run, n, attempt.code, f"{state},{STOP_REQUESTED}" if attempt.stop_requested else state
        )
        self.not_before[run.path, n] = time.monotonic() + decision.delay
        log.info("%s: attempt %d: %s: %s: %s", run.name, n, decision.action, decision.cause, decision.reason)
        threading.Thread(target=self.tell, args=(run, decision.action)).start()  # it may take a while

    @staticmethod
    def tell(run: RunDir, action: str) -> None:
        for trouble in notify.send_events(run, action):
            log.error("%s: %s", run.name, trouble)


def main(folder: str) -> int:
    """Take the lock, detach, serve. 0 also where another supervisor is there already."""
    sweep = Path(folder).absolute()
    lock = take_lock(sweep)
    if lock is None:
        return 0
    child = os.fork()
    if child:
        write_json(sweep / ".supervisor" / "pid.json", {"pid": child, "start": rank_processes.start_time(child)})
        return 0
    os.setsid()
    raise_limits()  # ranks inherit them
    start_logging(sys.stderr)
    supervisor = Supervisor(sweep)

    def leave(number: int, frame: object) -> None:
        supervisor.leave()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log.info("supervisor %d looks after %s", os.getpid(), sweep)
    while True:
        supervisor.serve()
        os.close(lock)
        # a submission that found the lock held while we were leaving has written its files by now
        told, supervisor.leaving = supervisor.leaving, False
        if (told and supervisor.submission == submission_stamp(sweep)) or not supervisor.wanted():
            break
        again = take_lock(sweep)
        if again is None:
            break
        lock = again
    log.info("supervisor %d ends", os.getpid())
    return 0


def refuse_untrusted(*paths: Path) -> None:
    """Raise ValueError if another user may write to one of them: what job.json names is executed."""
    for path in paths:
        if reason := ownership.untrusted(path):
            raise ValueError(f"{path} is not trusted: {reason}")


def take_lock(sweep: Path) -> int | None:
    """A handle that holds the sweep's lock, None where another process keeps it. ``status`` holds it for an instant.
    ConfigError where there are no locks."""
    closed_folder(sweep / ".supervisor")
    handle = os.open(sweep / ".supervisor" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for _ in range(10):
        if locked(handle, fcntl.LOCK_EX, sweep):
            return handle
        time.sleep(0.05)
    os.close(handle)
    return None


def is_served(sweep: Path) -> bool:
    """Whether a supervisor holds the sweep's lock."""
    try:
        handle = os.open(sweep / ".supervisor" / "lock", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # it may be a FIFO
    except FileNotFoundError:
        return False
    try:
        return not locked(handle, fcntl.LOCK_SH, sweep)
    except ConfigError:  # without locks there has never been one
        return False
    finally:
        os.close(handle)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except ConfigError as error:
        sys.exit(str(error))
