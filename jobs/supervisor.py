"""The process that looks after the runs of one sweep on this machine: starts attempts, watches them, decides, goes on.

    python -m jobs.supervisor SWEEP_DIR

It detaches itself and returns at once. One per sweep folder: it holds a lock on .supervisor/lock, and another that
finds it held ends. It loads no torch. When it dies, whatever the reason, its ranks see the end of their leash and
stop; the next one adopts what is left. An error in here is left to end it, with the traceback in .supervisor/log.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from flip.exitcodes import CAUSES
from flip.rundir import RunDir, read_json, write_json
from jobs import ledger, processes, ranks
from jobs.policy import LEAVING

POLL = 0.2
SCAN = 1.0
RETRY = 30.0
"""Seconds until something is tried again that failed because of the machine (a full disk, no more processes)."""
ADOPTION = 60.0
"""Seconds that ranks of a dead supervisor may take to save and stop."""

log = logging.getLogger("supervisor")


class Settings:
    """.supervisor/settings.json, written by each submission and read again as it changes."""

    def __init__(self, sweep: Path) -> None:
        record = read_json(sweep / ".supervisor" / "settings.json") or {}
        self.parallel: int = record.get("parallel", 1)
        """Runs at once."""
        self.peer_grace: float = record.get("peer_grace", 20.0)
        """Seconds that the peers of a failed rank get."""
        self.stop_grace: float = record.get("stop_grace", 90.0)
        """Seconds to save and stop after SIGTERM."""


class Supervisor:
    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self.settings = Settings(sweep)
        self.active: dict[Path, ranks.Attempt] = {}
        self.not_before: dict[tuple[Path, int], float] = {}
        """(run, attempt whose verdict stands) -> monotonic time before which the run does not start again."""
        self.unwritten: dict[Path, float] = {}
        """Runs whose end could not be written, with the monotonic time of the next try."""
        self.damaged: set[Path] = set()
        self.leaving = False

    def serve(self) -> None:
        """Until nothing is left to do, or until told to end."""
        scanned, waiting = -SCAN, True
        while True:
            if self.leaving:
                for attempt in self.active.values():
                    attempt.terminate(self.settings.stop_grace)
            elif time.monotonic() - scanned >= SCAN:
                self.settings = Settings(self.sweep)
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
            if run.path in self.active:
                continue
            waiting = True
            key, due = self.due(run)
            if due <= time.monotonic() and (self.unended(run) or len(self.active) < self.settings.parallel):
                try:
                    self.start(run, job)
                except OSError as error:
                    log.error("%s: %s; once more in %g s", run.name, error, RETRY)
                    self.not_before[key] = time.monotonic() + RETRY
        return waiting

    def wanted(self) -> list[tuple[RunDir, dict[str, Any]]]:
        """Submitted runs that are not over, in the order of their submission."""
        found = []
        for path in self.sweep.glob("*/job.json"):
            run = RunDir(path.parent)
            try:
                job, verdict = read_json(path), ledger.standing(run)
            except ValueError as error:  # one damaged file must not end the other runs
                if path not in self.damaged:
                    log.error("%s: left alone: %s", run.name, error)
                    self.damaged.add(path)
                continue
            over = run.result.exists() or (verdict is not None and verdict["action"] in ("stop", "done"))
            if job is not None and (self.unended(run) or not (over or run.cancel.exists())):
                found.append((run, job))
        return sorted(found, key=lambda pair: (pair[1]["order"], pair[0].name))

    def unended(self, run: RunDir) -> int:
        """The newest attempt if it has no end yet, else 0."""
        n = run.newest_attempt()
        return n if n and not (run.attempt(n) / "end.json").exists() else 0

    def due(self, run: RunDir) -> tuple[tuple[Path, int], float]:
        """(key in ``not_before``, the time there): when the run may start, by this machine's clocks."""
        verdict = ledger.standing(run)
        key = (run.path, verdict["attempt"] if verdict else 0)
        if key not in self.not_before:
            wait = min(verdict["delay"], verdict["time"] + verdict["delay"] - time.time()) if verdict else 0.0
            self.not_before[key] = time.monotonic() + wait
        return key, self.not_before[key]

    def start(self, run: RunDir, job: dict[str, Any]) -> None:
        """Adopt the attempt of a dead supervisor, or begin a new one."""
        n = self.unended(run)
        if n:
            log.info("%s: adopting attempt %d", run.name, n)
            self.active[run.path] = ranks.adopt(run, n, self.settings.peer_grace, ADOPTION)
            return
        facts = {"launcher": os.getpid(), "world": job["world"], "snapshot": job["snapshot"], "job": ""}
        n = ledger.begin(run, facts)
        try:
            self.active[run.path] = ranks.start(run, n, job, self.settings.peer_grace)
        except FileNotFoundError as error:
            reason = f"cannot start {job['python']} in {job['snapshot']}: {error.strerror}: {error.filename}"
            run.write_cause(n, 0, "config", CAUSES["config"], reason)
            self.conclude(run, n, CAUSES["config"])
            return
        log.info("%s: attempt %d, %d ranks", run.name, n, job["world"])

    # -- watching ---------------------------------------------------------------------------------------------------

    def watch(self) -> bool:
        """Look once at every active attempt; whether one ended."""
        ended = False
        for path, attempt in list(self.active.items()):
            if attempt.run.cancel.exists():
                attempt.terminate(self.settings.stop_grace)
            if attempt.poll() and self.unwritten.get(path, 0.0) <= time.monotonic():
                attempt.close()
                try:
                    self.conclude(attempt.run, attempt.n, attempt.code)
                except OSError as error:
                    log.error("%s: the end of attempt %d cannot be written: %s", path.name, attempt.n, error)
                    self.unwritten[path] = time.monotonic() + RETRY
                    continue
                del self.active[path]
                ended = True
        return ended

    def conclude(self, run: RunDir, n: int, code: int | None) -> None:
        """Record the end, then act on it."""
        decision = ledger.end(run, n, code, LEAVING if self.leaving else "RUNNING")
        self.not_before[run.path, n] = time.monotonic() + decision.delay
        log.info("%s: attempt %d: %s: %s: %s", run.name, n, decision.action, decision.cause, decision.reason)


def main(folder: str) -> int:
    """Take the lock, detach, serve. 0 also where another supervisor is there already."""
    sweep = Path(folder).absolute()
    lock = take_lock(sweep)
    if lock is None:
        return 0
    child = os.fork()
    if child:
        write_json(sweep / ".supervisor" / "pid.json", {"pid": child, "start": processes.start_time(child)})
        return 0
    os.setsid()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stderr)
    supervisor = Supervisor(sweep)

    def leave(number: int, frame: object) -> None:
        supervisor.leaving = True

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log.info("supervisor %d looks after %s", os.getpid(), sweep)
    while True:
        supervisor.serve()
        os.close(lock)
        # a submission that found the lock held while we were leaving has written its job.json by now
        if supervisor.leaving or not supervisor.wanted():
            break
        again = take_lock(sweep)
        if again is None:
            break
        lock = again
    log.info("supervisor %d ends", os.getpid())
    return 0


def take_lock(sweep: Path) -> int | None:
    """A handle that holds the sweep's lock, None where another process keeps it. ``status`` holds it for an instant."""
    (sweep / ".supervisor").mkdir(exist_ok=True)
    handle = os.open(sweep / ".supervisor" / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for _ in range(10):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            time.sleep(0.05)
    os.close(handle)
    return None


def is_served(sweep: Path) -> bool:
    """Whether a supervisor holds the sweep's lock."""
    try:
        handle = os.open(sweep / ".supervisor" / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
