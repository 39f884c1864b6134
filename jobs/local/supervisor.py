"""The supervisor of one sweep on this machine: starts attempts of its runs, watches them, and restarts them by policy.

    python -m jobs.local.supervisor SWEEP_DIR

It detaches itself and returns at once. A lock on .supervisor/lock allows one per sweep folder. When it dies, its ranks
see the end of their lifeline and stop; the next supervisor adopts them. Problems with the files of one run do not
affect the others; any other error ends the supervisor, with the traceback in .supervisor/log.
"""

import contextlib
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flip.files import ownership
from flip.files.creation import RefusedPath, close_umask, open_lock, run_folder
from flip.runs import attempts, lifecycle
from flip.runs.errors import CAUSES, ConfigError, start_logging
from flip.runs.lifecycle import SchedulerView
from flip.runs.next_step import HERE, NOTHING_HELD, Allocation, Step
from flip.runs.origin import is_copy
from flip.runs.restart_policy import LAUNCHER_STOPPED, STOP_REQUESTED, EndFacts
from flip.runs.rundir import RunDir, read_record, write_json
from jobs.common.filesystem import locked
from jobs.common.submitter import other_submitter
from jobs.host import notify, sessions
from jobs.host.rank_entry import raise_limits
from jobs.local import adopted, agents
from jobs.tracking.tracker import start_follower

POLL = 0.2
SCAN = 1.0
RETRY = 30.0  # seconds until a retry after an error of the machine (a full disk, no more processes)
WARM_SECONDS = 30.0  # for which an agent waits for the next attempt of its run, after the time when that may start

ABSENT_REASON = "no supervisor is running"  # what status shows of a run then

log = logging.getLogger("supervisor")


class Settings:
    """.supervisor/settings.json, written by each submission and read again as it changes."""

    def __init__(self, sweep: Path) -> None:
        record = read_record(sweep / ".supervisor" / "settings.json") or {}
        self.parallel: int = record.get("parallel", 1)  # runs at once
        self.peer_grace: float = record.get("peer_grace", 20.0)  # seconds that the peers of a failed rank get
        self.stop_grace: float = record.get("stop_grace", 90.0)  # seconds to save and stop after SIGTERM


def submission_stamp(sweep: Path) -> tuple[int, int] | None:
    """Identifies the newest submission: each writes settings.json anew."""
    try:
        stat = (sweep / ".supervisor" / "settings.json").stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino


class Supervisor:
    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self.settings = Settings(sweep)
        self.submission = submission_stamp(sweep)  # the newest at the time of the request to stop
        self.active: dict[Path, agents.Attempt] = {}
        self.warm: dict[Path, tuple[agents.LocalAgent, float]] = {}  # agents for the next attempt, until when
        self.leaving: list[agents.LocalAgent] = []  # agents that were asked to end
        self.not_before: dict[tuple[Path, int], float] = {}  # (run, last attempt) -> monotonic time of the next start
        self.retry_at: dict[Path, float] = {}  # runs with file errors -> monotonic time of the next try
        self.warned: set[str] = set()  # folders above the sweep in which others can rename
        self.damaged: set[Path] = set()  # those of them that only a person can fix, which are not waited for
        self.stopping = False
        self.followers: list[subprocess.Popen[bytes]] = []  # they end by themselves

    def request_stop(self) -> None:
        """Let the runs save and stop. Holds until the next submission."""
        self.stopping = True
        self.submission = submission_stamp(self.sweep)

    def serve(self) -> None:
        """Run until nothing is left to do, or until a stop is requested and all attempts have ended."""
        scanned = -SCAN
        waiting = True
        logged = False
        while True:
            if self.stopping:
                if not logged:
                    log.info("stop requested: %d runs save and stop", len(self.active))
                logged = True
                for attempt in self.active.values():
                    attempt.terminate(self.settings.stop_grace)
                self.release_agents(everything=True)
            elif time.monotonic() - scanned >= SCAN:
                with contextlib.suppress(OSError, ValueError):  # else unchanged
                    self.settings = Settings(self.sweep)
                with self.isolate_errors(self.sweep):
                    waiting = self.start_eligible()
                self.release_agents()
                scanned = time.monotonic()
            if self.poll_attempts():
                scanned = -SCAN  # another run may start
            elif not self.active and (self.stopping or not waiting):
                self.release_agents(everything=True)
                return
            else:
                time.sleep(POLL)

    def start_eligible(self) -> bool:
        """Start runs that may start; returns whether anything is left to do later."""
        waiting = False
        for run, job in self.eligible():
            with self.isolate_errors(run.path):
                due = self.start_time(run) <= time.monotonic()
                room = len(self.active) < self.settings.parallel and self.free_gpus(job) is not None
                if due and (attempts.unended(run) or room):
                    self.start(run, job)
                waiting = True
        return waiting or bool(self.retry_at.keys() - self.damaged)

    def eligible(self) -> list[tuple[RunDir, dict[str, Any]]]:
        """Submitted runs that are not over, in submission order, except active runs and those that wait for a retry."""
        rows = []
        present = {path.parent for path in self.sweep.glob("*/job.json")}
        exposed = ownership.exposures(self.sweep)
        self.retry_at = {path: due for path, due in self.retry_at.items() if path in present}
        for path in present:
            if path in self.active or self.retry_at.get(path, 0.0) > time.monotonic():
                continue
            with self.isolate_errors(path):
                refuse_untrusted(self.sweep, path)
                run = RunDir(path)
                run.close()
                job = run.read_job()
                if not job:
                    continue  # it was never submitted
                run.refuse_other_version(job)
                if job["kind"] != "local" or is_copy(run, job):
                    continue  # another cluster manages it
                if user := other_submitter(run):
                    raise ValueError(f"{path} is a copy of a run of {user}: submit it")
                self.refuse_exposed(exposed, job["exposed"])
                if attempts.unended(run) or may_start(run, job):
                    rows.append((job["order"], run.name, run, job))
        return [(run, job) for _, _, run, job in sorted(rows, key=lambda row: row[:2])]

    def refuse_exposed(self, exposed: Sequence[ownership.Exposure], accepted: Sequence[str]) -> None:
        """Raise ValueError if others can exchange the sweep's folder through a folder above that its submission did not
        accept. ``accepted``: of job.json."""
        for place, reason, _ in exposed:
            if place not in accepted:
                raise ValueError(f"{place} is not trusted: {reason}")
            if place not in self.warned:
                self.warned.add(place)
                log.warning("%s: %s, so that others could exchange the code of these runs", place, reason)

    def refuse_untrusted_program(self, job: Mapping[str, Any]) -> None:
        """Raise ValueError if another user can change or exchange the interpreter of the ranks.

        Not that of this process, which runs already, nor a bare name, which PATH resolves. ``start`` reports one that
        does not exist.
        """
        program = job["python"]
        if program == sys.executable or not os.path.isabs(program) or not os.path.exists(program):
            return
        if reason := ownership.why_untrusted_target(program):
            raise ValueError(f"its interpreter is not trusted: {reason}. Submit it again")
        self.refuse_exposed(ownership.exposures(program), job["exposed"])

    def free_gpus(self, job: Mapping[str, Any]) -> list[str] | None:
        """GPUs for a run that no active attempt of this sweep has; None: not enough, it waits.

        Empty if it needs none or chose its own; or more than this machine has, which its ranks report.
        """
        gpus = agents.visible_gpus(os.environ)
        count = 0
        if job.get("shape", {}).get("gpus"):
            count = job["world"]
        if not 0 < count <= len(gpus) or "CUDA_VISIBLE_DEVICES" in job["env"]:
            return []
        used = {name for attempt in self.active.values() for name in attempt.gpus}
        free = [name for name in gpus if name not in used]
        if len(free) >= count:
            return free[:count]
        return None

    @contextlib.contextmanager
    def isolate_errors(self, path: Path) -> Iterator[None]:
        """Log file errors of one run, which must not end the others, and retry it later."""
        try:
            yield
        except RefusedPath as error:
            log.error("%s", error)
            self.damaged.add(path)
        except OSError as error:  # may pass: a full disk, an unreachable server, no more processes
            log.error("%s: %s; once more in %g s", path.name, error, RETRY)
            self.damaged.discard(path)
        except (ValueError, KeyError) as error:
            log.error("%s: a file of it is damaged; left alone: %r", path.name, error)
            self.damaged.add(path)
        else:
            self.retry_at.pop(path, None)
            self.damaged.discard(path)
            return
        self.retry_at[path] = time.monotonic() + RETRY

    def start_time(self, run: RunDir) -> float:
        """When the run may start, by this machine's monotonic clock."""
        end = attempts.current_end(run)
        key = (run.path, end["attempt"] if end else 0)
        if key not in self.not_before:
            wait = 0.0
            if end:
                wait = min(end["delay"], end["time"] + end["delay"] - time.time())
            self.not_before[key] = time.monotonic() + wait
        return self.not_before[key]

    def start(self, run: RunDir, job: dict[str, Any]) -> None:
        """Adopt the attempt of a dead supervisor, or start a new one."""
        if unended := attempts.unended(run):
            n = unended[-1]
            log.info("%s: adopting attempt %d", run.name, n)
            self.active[run.path] = adopted.adopt(run, n, max(agents.ADOPTION, self.settings.stop_grace))
            return
        trackers = job.get("trackers", [])
        gpus = self.free_gpus(job) or []
        self.refuse_untrusted_program(job)
        job = {key: job[key] for key in agents.JOB_KEYS}  # a damaged record raises before an attempt starts
        start_record = {
            "launcher": os.getpid(),
            "world": job["world"],
            "snapshot": job["snapshot"],
            "job": "",
            "gpus": gpus,
        }
        agent = self.take_agent(run, job)
        try:
            n = attempts.start_attempt(run, {**start_record, "warm": agent is not None})
        except OSError:
            if agent is not None:
                self.dismiss(agent)
            raise
        attempt: agents.AgentAttempt | agents.FailedAttempt
        try:
            attempt = agents.start(run, n, job, self.settings.peer_grace, gpus, agent)
        except OSError as error:  # its end is recorded as any other, so that delays and limits apply
            attempt = agents.FailedAttempt(run, n, job, error)
        self.active[run.path] = attempt
        log.info("%s: attempt %d, %d ranks", run.name, n, attempt.world)
        self.followers = [each for each in self.followers if each.poll() is None]
        if not attempt.world:
            return
        for tracker in trackers:
            try:
                self.followers.append(start_follower(run, n, tracker))
            except OSError as error:  # the run does not depend on it
                log.error("%s: no follower for %s: %s", run.name, tracker, error)

    def take_agent(self, run: RunDir, job: Mapping[str, Any]) -> agents.LocalAgent | None:
        """The agent of the last attempt of a run, if it can start another one of the same job."""
        agent, _ = self.warm.pop(run.path, (None, 0.0))
        if agent is None:
            return None
        agent.poll()
        if agent.is_usable() and agent.job == job:
            return agent
        self.dismiss(agent)
        return None

    def dismiss(self, agent: agents.LocalAgent) -> None:
        agent.leave()
        self.leaving.append(agent)

    def release_agents(self, everything: bool = False) -> None:
        """Let agents end whose run did not start again in time; ``everything``: all that wait for an attempt."""
        for path, (agent, until) in list(self.warm.items()):
            agent.poll()
            if everything or not agent.is_usable() or time.monotonic() > until:
                del self.warm[path]
                self.dismiss(agent)
        self.leaving = [agent for agent in self.leaving if agent.code is None]

    def poll_attempts(self) -> bool:
        """Poll every active attempt once; returns whether one ended."""
        ended = False
        for path, attempt in list(self.active.items()):
            over = attempt.poll()
            if self.retry_at.get(path, 0.0) > time.monotonic():
                continue
            with self.isolate_errors(path):
                if attempt.run.cancel.exists():
                    attempt.terminate(self.settings.stop_grace)
                if over:
                    self.finish(attempt)
                    del self.active[path]
                    ended = True
            if over and (path in self.damaged or not os.path.exists(attempt.run.attempt(attempt.n))):
                self.active.pop(path, None)  # the end of an attempt whose files were deleted cannot be recorded
                if attempt.agent is not None:
                    self.dismiss(attempt.agent)
        return ended

    def finish(self, attempt: agents.Attempt) -> None:
        """Record the end, keep or dismiss the agent, and send notifications."""
        attempt.close()
        run = attempt.run
        n = attempt.n
        if attempt.failure:
            cause, reason = attempt.failure
            run.write_cause(n, 0, cause, CAUSES[cause], reason)
        state = LAUNCHER_STOPPED if self.stopping else "RUNNING"
        if attempt.stop_requested:
            state = f"{state},{STOP_REQUESTED}"
        end = EndFacts(attempt.code, state)
        held = NOTHING_HELD
        if attempt.agent is not None:
            held = Allocation(int(attempt.agent.is_usable()), usable=(1,))
        step = attempts.end_attempt(run, n, end, noticed=attempt.noticed, observed=attempt.observed, allocation=held)
        self.not_before[run.path, n] = time.monotonic() + step.delay
        log.info("%s: attempt %d: %s: %s: %s", run.name, n, step.action, step.cause, step.reason)
        if attempt.agent is not None:
            self.keep_or_dismiss(attempt.agent, run, step)
        threading.Thread(target=self.notify, args=(run, step.action)).start()  # it may take a while

    def keep_or_dismiss(self, agent: agents.LocalAgent, run: RunDir, step: Step) -> None:
        """Keep the agent of an attempt that has ended if the next one starts here: from its processes."""
        if step.do == HERE and not self.stopping:
            self.warm[run.path] = agent, time.monotonic() + step.delay + WARM_SECONDS
        else:
            self.dismiss(agent)

    @staticmethod
    def notify(run: RunDir, action: str) -> None:
        for problem in notify.send_events(run, action):
            log.error("%s: %s", run.name, problem)


def main(folder: str) -> int:
    """Take the lock, detach, serve. Returns 0 also if another supervisor is running."""
    close_umask()  # ranks inherit it
    sweep = Path(folder).absolute()
    lock = take_lock(sweep)
    if lock is None:
        return 0
    child = os.fork()
    if child:
        write_json(sweep / ".supervisor" / "pid.json", {"pid": child, "start": sessions.start_time(child)})
        return 0
    os.setsid()
    raise_limits()  # ranks inherit them
    start_logging(sys.stderr)
    supervisor = Supervisor(sweep)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.request_stop())
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    log.info("supervisor %d manages %s", os.getpid(), sweep)
    while True:
        supervisor.serve()
        os.close(lock)
        # a submission that found the lock held while we were stopping has written its files by now
        stopped = supervisor.stopping
        supervisor.stopping = False
        if (stopped and supervisor.submission == submission_stamp(sweep)) or not supervisor.eligible():
            break
        again = take_lock(sweep)
        if again is None:
            break
        lock = again
    log.info("supervisor %d ends", os.getpid())
    return 0


def idle(job: Mapping[str, Any]) -> SchedulerView:
    """What a supervisor shows of a run of its sweep without a running attempt: it starts the run as soon as there is
    room, or, if the run waits for a canary, once that has passed."""
    return SchedulerView(lifecycle.HELD if job.get("waits_for") else lifecycle.QUEUED)


def may_start(run: RunDir, job: Mapping[str, Any]) -> bool:
    """Whether a run without a running attempt is to be started. Raises one of UNREADABLE."""
    state = lifecycle.state_of(lifecycle.read_run_facts(run), idle(job))
    return state.state in ("queued", "waiting") and not state.waits_for


def refuse_untrusted(*paths: Path) -> None:
    """Raise ValueError if another user may write to one of them: what job.json names is executed."""
    for path in paths:
        if reason := ownership.why_untrusted(path):
            raise ValueError(f"{path} is not trusted: {reason}")


def take_lock(sweep: Path) -> int | None:
    """A file handle that holds the sweep's lock; None if another process holds it, which ``status`` does for an
    instant.

    Raises ConfigError if the file system has no locks.
    """
    handle = open_lock(run_folder(sweep / ".supervisor") / "lock")
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
    except ConfigError:  # without locks no supervisor can have started
        return False
    finally:
        os.close(handle)


def start() -> NoReturn:
    """Run ``main`` of this process's argument, and exit."""
    try:
        sys.exit(main(sys.argv[1]))
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    start()
