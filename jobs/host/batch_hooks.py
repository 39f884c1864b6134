"""What a batch script calls on the host, outside the trainer: before the ranks start, and from its exit trap.

    batch_hooks.py begin RUN_DIR            print the number of the next attempt, or nothing if there is none
    batch_hooks.py end RUN_DIR --code 75    record the end, requeue; print the decision as a line of JSON
    batch_hooks.py watch RUN_DIR            restart a job that Slurm ends for its wall limit or for lost nodes, or whose
                                            batch shell was killed, also before `begin` has ended; end an srun that
                                            outlives its ranks
    batch_hooks.py release RUN_DIR          release the jobs that wait for a canary once it has passed

The order in ``end`` matters: after a requeue the batch shell may be killed at once, so the end is written and synced
first. Output goes to the file system of the run, which may be full, so nothing depends on it.
"""

import argparse
import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from flip.files.creation import RefusedPath
from flip.runs import attempts, canary, wall_limit
from flip.runs.credentials import scrub_stderr
from flip.runs.errors import CAUSES, DATA, STORAGE, ConfigError, FlipError
from flip.runs.next_step import REQUEUE, Evidence, Step, next_step
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, exists, read_record
from jobs.host import (
    attempt_end,
    failed_starts,
    held_jobs,
    lost_step,
    notify,
    own_job,
    processes,
    rank_entry,
    requeue,
    slurm_cli,
)  # fmt: skip
from jobs.host.agents.channel import CONTACT
from jobs.host.agents.job_coordinator import JobCoordinator

EXAMPLES = """examples:
  python3 jobs/host/batch_hooks.py begin runs/masking/mask50
  python3 jobs/host/batch_hooks.py end runs/masking/mask50 --code 75
"""
RETRY_SECONDS = 600.0  # for which an unavailable file system is retried on the node
REQUEUE_DELAY = 1800.0  # until the next start after that
SHELL_EXIT_SECONDS = 2.0  # until Slurm has noticed that a batch shell is gone
CANARY_POLL_SECONDS = 10.0
START_POLL_SECONDS = 0.5  # between two looks for the attempt that `begin` wins
KILLED = 137  # exit code of a shell that was killed by SIGKILL


def main(arguments: Optional[List[str]] = None) -> int:
    args = parser().parse_args(arguments)
    scrub_stderr()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # they would interrupt the decision
        signal.signal(number, signal.SIG_IGN)
    if args.what == "watch":  # a blocked signal stays pending, although it is ignored
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    if args.agents is not None:  # a connection per node
        rank_entry.raise_limits()
    return act(args, sleep_until_term)


class ShellGone(Exception):
    """The batch shell ended without its exit trap, which otherwise ends this process."""


def watch_shell(shell: int) -> None:
    """Raise ShellGone in this process when its parent, the batch shell, is gone, also if it is gone now. Linux only."""

    def on_hangup(*_: Any) -> None:
        if os.getppid() != shell:  # scancel --full may send the same signal
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            raise ShellGone()

    signal.signal(signal.SIGHUP, on_hangup)
    if processes.prctl(processes.PR_SET_PDEATHSIG, signal.SIGHUP):
        on_hangup()  # it may have been killed before that call


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description="Start or end an attempt of a run, on the host.", epilog=EXAMPLES, formatter_class=formatter
    )
    parser.add_argument("what", choices=["begin", "end", "watch", "release"])
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("--token", help="submission that the job belongs to (begin); a job of another does nothing")
    parser.add_argument("--attempt", type=int, help="number that begin printed (end); default: the newest")
    parser.add_argument("--shell", type=int, help="process id of the batch shell (watch, release)")
    parser.add_argument(
        "--agents",
        type=int,
        metavar="FD",
        help="coordinate node agents, and write the exit code of their step to this file descriptor (watch)",
    )
    parser.add_argument("--peer-seconds", type=float, help="the most that peers of a failed rank get (watch --agents)")
    parser.add_argument("--code", type=int, help="exit code of the attempt (end)")
    parser.add_argument("--state", help="the scheduler's state of the job (end); default: Slurm is asked")
    return parser


def sleep_until_term(seconds: float) -> bool:
    """Sleep, but return True at TERM, which Slurm sends to all processes of a job at its limit."""
    return signal.sigtimedwait([signal.SIGTERM], seconds) is not None


def act(args: argparse.Namespace, sleep: Optional[Callable[[float], Any]] = None) -> int:
    """Run one command; returns the exit code. ``sleep``: how the watcher waits (own_job.wait_for_time_limit)."""
    try:
        if args.what == "begin":
            return retry_on_oserror(lambda error: begin(args.run, args.token))
        if args.what == "watch":
            return watch(args.run, args.attempt, sleep, args.shell, args.agents, args.peer_seconds)
        if args.what == "release":
            return release(args.run, args.shell)
        return retry_on_oserror(
            lambda error: end(args.run, args.attempt, args.code, args.state, error),
            lambda: newest(args.run, args.attempt),
        )
    except ShellGone:  # of a canary: the next start has its own process that releases the others
        return 0
    except FlipError as error:
        log(error)
        return error.code
    except RefusedPath as error:
        log(error)
        return CAUSES["permission"]
    except ValueError as error:
        log("a record of the run is damaged: %s" % error)
        return DATA


def log(text: object, stream: Any = None) -> None:
    """Print, if possible: the disk may be full."""
    try:
        print(text, file=stream or sys.stderr, flush=True)
    except OSError:
        pass


def own_start() -> Tuple[str, int]:
    """(the batch job of this process, its restart count)."""
    return own_job.own_job(os.environ), own_job.restart_count(os.environ)


def newest(path: str, attempt: Optional[int]) -> Optional[int]:
    """The newest attempt of this start; ``attempt``, its first one, if the files of the run cannot be read."""
    try:
        return attempt_end.newest_of_start(RunDir(path), own_start()) or attempt
    except (OSError, ValueError):
        return attempt


def retry_on_oserror(
    do: Callable[[Optional[OSError]], int], attempt: Callable[[], Optional[int]] = lambda: None
) -> int:
    """Call ``do`` with the error of the previous try, and retry on file errors for RETRY_SECONDS.

    After that the job leaves the node and starts again later. The comment of the job then says that the end of
    ``attempt`` could not be written; the next ``begin`` writes it.
    """
    deadline = time.time() + RETRY_SECONDS
    wait = 1.0
    last: Optional[OSError] = None
    while True:
        try:
            return do(last)
        except RefusedPath:  # waiting does not change an owner
            raise
        except OSError as error:
            last = error
            log("%s; retried for up to %g s" % (error, RETRY_SECONDS))
            if time.time() + wait > deadline:
                break
        time.sleep(wait)
        wait = min(60.0, 2 * wait)
    if not own_start()[0]:  # nothing restarts it
        return STORAGE
    return restart_later(STORAGE, REQUEUE_DELAY, attempt())


def restart_later(
    code: int,
    delay: Optional[float] = None,
    attempt: Optional[int] = None,
    run: Optional[RunDir] = None,
    ended: bool = False,
    leave_node: bool = False,
) -> int:
    """Requeue the job after a start that could not record its end, at most MAX_FAILED_STARTS times in a row.

    ``code``: how this start ends; it is returned. ``delay``: seconds; None: 60 more for each failed start before.
    ``attempt``: the one whose end could not be written. ``run``: as for ``restart``. ``ended``: whether Slurm has ended
    the job, whose comment can then be written only after the requeue. ``leave_node``: whether the next start avoids
    this node. ``requeue_elsewhere`` of ``jobs/slurm/batch_functions.sh`` does the same, with ``leave_node``.
    """
    job, restarts = own_start()
    fields: Dict[str, str] = {}
    # a requeue waits for Slurm as long: the comment must not be lost before
    known = failed_starts.read_failed_starts(job, restarts, slurm_cli.OUTAGE_SECONDS, seen=fields)
    state = own_job.state_of(fields, restarts)
    ended = ended or (fields.get("JobState") == "COMPLETING" and state != "PENDING")
    before = known or failed_starts.FailedStarts()
    step = next_step(Evidence(EndFacts(None, state), failed_starts=before.starts))
    if step.do != REQUEUE:
        return code
    node = os.environ.get("SLURMD_NODENAME", "")
    failed = failed_starts.FailedStarts(before.starts + 1, attempt or before.attempt, code, node)
    if not ended:
        patience = 0.0
        if not known:
            patience = slurm_cli.OUTAGE_SECONDS
        failed_starts.record_failed_starts(job, restarts, failed, patience)
    nodes: Optional[Sequence[str]] = None
    if leave_node and node:
        nodes = requeue.exclude_failed_node(fields, node, before.node)
    if delay is None:
        delay = step.delay
    restart(delay, nodes, run=run, attempt=attempt, failed=failed)
    if ended:
        failed_starts.record_failed_starts(job, restarts, failed)
    return code


def begin(path: str, token: Optional[str]) -> int:
    """Win the next attempt and print its number.

    Prints nothing and returns 0 if the run is complete (Slurm may restart a finished job), cancelled, or submitted
    again as another job.
    """
    run = RunDir(path)
    if not run.path.exists():
        remedy = "Was it moved to the trash? Submit it again."
        raise ConfigError("the run directory does not exist", str(run.path), remedy=remedy)
    run.close()  # before it is read: then no other user can exchange it
    record = run.read_job()
    idle = ""
    if token is not None and record.get("token") != token:
        idle = "it was submitted again since, as another job"
    elif requeue.superseded(run, os.environ):
        idle = "another job has continued it"
    elif exists(run.result):
        idle = "it is complete"
    elif read_record(run.cancel) is not None:  # opened, not stat: NFS caches for a while that a file does not exist
        idle = attempts.cancel_reason(run)
    if idle:
        log("%s: not started: %s" % (run.path, idle))
        if run.result.exists():
            settle_canary(run, "done")
        return 0
    abandoned = end_abandoned(run)
    previous = attempts.current_end(run)
    if previous is not None and previous["action"] == "stop":
        log("%s: not started: %s" % (run.path, previous["reason"]))
        if abandoned:  # else its exit trap has done this
            settle_canary(run, "stop")
            send_notification(run, "stop")
        return CAUSES.get(previous["cause"], CAUSES["crash"])
    os.environ.pop(requeue.FOLLOWS, None)  # repeated after an error, this call finds the attempt that it has won
    n = attempts.start_attempt(run, start_record())
    processes.kill_orphans(str(run.path), n, *own_start())
    try:
        run.open_logs(n)
    except RefusedPath as error:
        attempts.end_attempt(run, n, EndFacts(CAUSES["permission"], None), met={"permission": str(error)})
        raise
    print(n)
    return 0


def end_abandoned(run: RunDir, before: Optional[int] = None) -> bool:
    """Record ends of attempts that ended unobserved, of those before number ``before``; returns whether there were any.

    The comment of the job names the one whose end could not be written. If Slurm does not answer they stay open, since
    their cause is not known; the end of this attempt or the next ``begin`` asks again.
    """
    if not [n for n in attempts.unended(run) if before is None or n < before]:
        return False
    job, restarts = own_start()
    if job:
        failed = failed_starts.read_failed_starts(job, restarts)
    else:
        failed = failed_starts.FailedStarts()
    if failed is None:
        log("%s: Slurm does not say how the last attempt ended; it is asked again later" % run.path)
        return False
    attempts.end_abandoned(run, failed.attempt, before)
    return True


def start_record() -> Dict[str, str]:
    """Where this attempt runs, for its start.json."""
    names = {"restarts": "SLURM_RESTART_COUNT", "nodes": "SLURM_JOB_NODELIST", "world": "SLURM_NTASKS"}
    values = {key: os.environ[name] for key, name in names.items() if name in os.environ}
    return dict(values, job=own_job.own_job(os.environ))


def end(
    path: str,
    n: Optional[int],
    code: Optional[int],
    state: Optional[str],
    last_error: Optional[OSError] = None,
) -> int:
    """Record the end of attempt n, or of the newest that its job has started since, and carry out the decision.

    The coordinator of node agents may have recorded it. ``last_error``: of an earlier try of this call.
    """
    fields: Dict[str, str] = {}
    run = RunDir(path)
    if n is None:
        n = run.newest_attempt()
    if n not in run.attempt_numbers():
        raise ConfigError("no such attempt", str(run.path), n, "It is won by `jobs/host/batch_hooks.py begin`.")
    job, restarts = own_start()
    if job:
        n = max(n, attempt_end.newest_of_start(run, (job, restarts)))
    if state is None and job:
        state = own_job.wait_for_state(job, restarts, seen=fields)
    if state is not None:
        end_abandoned(run, n)
    if state == "RUNNING" and lost_node(run, n, fields):
        state = "NODE_FAIL"
    decision = attempt_end.record_end(run, n, code, state, fields, last_error)
    if decision.action == "requeue" and ("CANCELLED" in (state or "") or exists(run.cancel)):
        decision = attempts.record_cancel(run, n)  # the coordinator has recorded the end before
    log(json.dumps(decision._asdict(), sort_keys=True), sys.stdout)
    if decision.action == "requeue":
        if not job:
            remedy = "The end is recorded; continue local runs with `flip submit`."
            what = "not a batch job: nothing to requeue"
            raise ConfigError(what, "jobs/host/batch_hooks.py", decision.cause, remedy=remedy)
        restart(decision.delay, avoided_nodes(run, decision.exclude), run=run, attempt=n)
    else:
        if job and "PENDING" in (state or "") and decision.delay >= 1:  # Slurm has requeued it, to start at once
            problem = requeue.delay_start(job, decision.delay)
            if problem:
                log("%s: it starts again without the delay: %s" % (run.path, problem))
        settle_canary(run, decision.action)
        send_notification(run, decision.action)
    return 0


def lost_node(run: RunDir, n: int, fields: Dict[str, str]) -> bool:
    """Whether attempt n may have ended because its job, which goes on (``--no-kill``), has lost a node.

    False if agents started its ranks: their coordinator knows which nodes had ranks, and has recorded such an end.
    """
    if (run.attempt(n) / CONTACT).exists() or attempt_end.restarted_in_place(run, n):
        return False
    return own_job.has_lost_node(fields, int(os.environ.get("SLURM_JOB_NUM_NODES") or 1))


def send_notification(run: RunDir, action: str) -> None:
    """Run the profile's notification command. Called last."""
    for problem in notify.send_events(run, action):
        log(problem)


def settle_canary(run: RunDir, action: str) -> None:
    """Release or cancel the jobs that wait for a canary which ends. Slurm outages are waited out as for a requeue."""
    try:
        record = canary.canary_of(run.read_job())
    except RefusedPath as error:  # the end of the attempt is recorded with it
        log(error)
        return None
    start = time.time()
    wait = 1.0
    absent: List[float] = []
    while record.get("releases"):
        try:
            then = canary.at_end(action, action == "stop" and canary.has_passed(run, record))
            if then == canary.CANCEL:
                return held_jobs.cancel(record["releases"])
            if then == canary.LEAVE or release_held_jobs(run, record, absent):
                return None
            problem: object = "held jobs are missing from squeue"
        except slurm_cli.SlurmUnavailable as error:
            problem = error
        if time.time() + wait > start + (slurm_cli.OUTAGE_SECONDS if action == "done" else RETRY_SECONDS):
            log("%s: the jobs that wait for it were not released: %s; submit again" % (run.path, problem))
            return None
        time.sleep(wait)
        wait = min(60.0, 2 * wait)
    return None


def release_held_jobs(run: RunDir, record: Dict[str, Any], absent: List[float]) -> bool:
    """Release the jobs that wait for a canary; returns whether that is done.

    ``record``: of the canary, from ``RunDir.read_job``. ``absent``: times of earlier answers of squeue that lacked some
    of them. After two such answers, slurm_cli.UNKNOWN_JOB_SECONDS apart, these jobs are gone.
    """
    missing = held_jobs.release(run, record)
    if not missing:
        return True
    absent.append(time.time())
    if absent[-1] - absent[0] < slurm_cli.UNKNOWN_JOB_SECONDS:
        return False
    log("%s: no longer in Slurm's queue: %s; submit again" % (run.path, ", ".join(missing)))
    return True


def release(path: str, shell: Optional[int] = None) -> int:
    """Wait until the canary at ``path`` has passed, then release the jobs that wait for it."""
    run = RunDir(path)
    absent: List[float] = []
    if shell is not None:
        watch_shell(shell)
    while True:
        try:
            record = canary.canary_of(run.read_job())
            if not record.get("releases"):
                return 0
            if canary.has_passed(run, record) and release_held_jobs(run, record, absent):
                return 0
        except RefusedPath:
            raise
        except (OSError, ValueError, slurm_cli.SlurmUnavailable) as error:
            log(error)
        time.sleep(CANARY_POLL_SECONDS)


def watch(
    path: str,
    n: Optional[int] = None,
    sleep: Optional[Callable[[float], Any]] = None,
    shell: Optional[int] = None,
    agents: Optional[int] = None,
    peer_seconds: Optional[float] = None,
) -> int:
    """Restart the job if its batch shell is killed, or when Slurm ends it for its wall limit, or for lost nodes without
    a requeue.

    The exit trap may come too late: only KillWait passes between TERM and KILL, and srun waits as long for tasks of
    lost nodes. The next ``begin`` records how this attempt ended. It starts before the attempt (``n`` is None then),
    because a shell may be killed while ``begin`` works. ``agents``: it also coordinates the node agents of the job, and
    writes the exit code of their step to this file descriptor.
    """
    own = OwnAttempt(RunDir(path), n)
    sleep = sleep or time.sleep
    try:
        if shell is not None:
            watch_shell(shell)
        if agents is not None:
            own.start_coordinator(functools.partial(write_code, agents), peer_seconds)
        state = own_job.wait_for_time_limit(*own_start(), lambda seconds: own.sleep(seconds, sleep), own.record_limit)
        if not state and own.coordinator is not None:
            own.coordinator.join()
    except ShellGone:
        if own.coordinator is not None:
            own.coordinator.may_restart = False
        return retry_on_oserror(lambda error: on_shell_gone(own), lambda: own.number)
    step = step_around_ranks(state)
    if step.cause == "timeout" and own.find():
        try:
            own.run.record_time_limit(own.number)
        except OSError as error:
            log(error)
    if step.do == REQUEUE:
        restart(0.0, None, ending=True, run=own.run, attempt=own.number or None)
        if own.coordinator is not None:  # ranks may still be saving
            own.coordinator.join()
    return 0


def step_around_ranks(state: Optional[str], run: Optional[RunDir] = None) -> Step:
    """What follows when the job ends while its ranks may still run. ``run``: None if its files are not to be read."""
    complete = run is not None and exists(run.result)
    cancelled = run is not None and exists(run.cancel)
    return next_step(Evidence(EndFacts(None, state), complete=complete, cancelled=cancelled, is_over=False))


class OwnAttempt:
    """The newest attempt of this start of the job, for its watcher; ``number`` is 0 before ``begin`` has won one."""

    def __init__(self, run: RunDir, number: Optional[int] = None) -> None:
        self.run = run
        self.number = number or 0
        self.first = self.number
        self.limit: Optional[int] = None  # seconds, not recorded yet
        self.step: Optional[lost_step.LostStep] = None
        self.coordinator: Optional[JobCoordinator] = None

    def start_coordinator(self, on_end: Callable[[int], None], peer_seconds: Optional[float] = None) -> None:
        """Coordinate the node agents of the job from now on, in a thread. ``on_end``: see ``JobCoordinator``."""

        def find() -> int:
            return self.number if self.find() else 0

        self.coordinator = JobCoordinator(
            self.run, own_start(), find, self._started, on_end, start_record, log, peer_seconds
        )
        self.coordinator.start_thread()

    def _started(self, n: int) -> None:
        self.number = n

    def find(self) -> bool:
        """Whether the attempt has started; looks for it if that is unknown."""
        if self.number:
            return True
        try:
            self.number = attempt_end.newest_of_start(self.run, own_start())
        except (OSError, ValueError):  # asked again
            return False
        self.first = self.number
        if self.number:
            os.environ["FLIP_ATTEMPT"] = str(self.number)  # as all processes of the attempt have it
        return bool(self.number)

    def record_limit(self, limit: Optional[int]) -> None:
        """Record the wall limit in seconds for ``status``, and for an end that leaves no time to ask."""
        self.limit = limit
        if limit is None or not self.find():
            return
        try:
            wall_limit.record_limit(self.run, self.number, limit)
        except OSError as error:
            log(error)
        self.limit = None

    def sleep(self, seconds: float, sleep: Callable[[float], Any]) -> None:
        """Sleep until TERM. Until the attempt has started, look for it every START_POLL_SECONDS; then, every
        ``lost_step.POLL_SECONDS``, look for the end of its ranks."""
        while not self.find() and seconds > START_POLL_SECONDS:
            if sleep(START_POLL_SECONDS):
                return
            seconds -= START_POLL_SECONDS
        self.record_limit(self.limit)
        while self.find() and seconds > lost_step.POLL_SECONDS:
            if sleep(lost_step.POLL_SECONDS):
                return
            seconds -= lost_step.POLL_SECONDS
            self.check_step()
        sleep(seconds)

    def check_step(self) -> None:
        """End an srun that outlives its ranks, unless it waits for agents."""
        if self.coordinator is not None and self.coordinator.is_active:
            return
        if self.step is None:
            self.step = lost_step.LostStep(self.run, self.first)
        if self.step.check():
            log("%s: srun was killed: its ranks have ended, and Slurm did not notice" % self.run.path)


def write_code(fd: int, code: int) -> None:
    """Write a line with an exit code for the batch shell, which reads it when srun has ended."""
    os.write(fd, b"%d\n" % code)


def on_shell_gone(own: OwnAttempt) -> int:
    """Requeue the job in place of the exit trap of a batch shell that was killed.

    Does nothing if the job has been requeued or cancelled, or if its state is unknown. The next ``begin`` records the
    end of the attempt, whose ranks may still be saving. Without an attempt it counts as a failed start.
    """
    time.sleep(SHELL_EXIT_SECONDS)
    run = own.run
    state = own_job.wait_for_state(*own_start())
    ended: Dict[str, Any] = {"action": "requeue"}
    if own.find():
        ended = read_record(run.attempt(own.number) / "end.json") or ended  # the trap may have got that far
    step = step_around_ranks(state, run)
    if ended["action"] != "requeue" or step.do != REQUEUE:
        log("%s: the batch shell is gone; its job (%s) is left alone: %s" % (run.path, state, step.reason))
        return 0
    log("%s: the batch shell was killed (%s)" % (run.path, state))
    if not own.number:
        restart_later(KILLED, run=run, ended=state != "RUNNING", leave_node=True)
        return 0
    if step.cause == "timeout":
        run.record_time_limit(own.number)
    nodes = avoided_nodes(run, tuple(ended.get("exclude", ())))
    restart(ended.get("delay", 0.0), nodes, run=run, attempt=own.number)
    return 0


def avoided_nodes(run: RunDir, decided: Sequence[str]) -> Optional[Sequence[str]]:
    """All nodes that the next start of a run avoids; None: as before. ``decided``: if the records cannot be read."""
    try:
        return attempts.excluded_nodes(run, time.time())
    except (OSError, ValueError):  # an unreadable record must not prevent the restart
        return decided or None


def restart(
    delay: float,
    exclude: Optional[Sequence[str]],
    ending: bool = False,
    run: Optional[RunDir] = None,
    attempt: Optional[int] = None,
    failed: Optional[failed_starts.FailedStarts] = None,
) -> None:
    """Requeue our job, or submit a successor if Slurm does not requeue it (``requeue.restart``). If Slurm refuses,
    record why the run ends here; ``run`` is None if its files cannot be written."""
    job, restarts = own_start()
    disabled = False
    try:
        what = requeue.restart(job, restarts, delay, exclude, attempt, ending, failed)
        log("%s: %s" % (job, what), sys.stdout)
        return
    except requeue.SuccessorRefused as error:
        disabled = True
        reason = "requeue is disabled here, and a new job was refused (%s)" % error
    except slurm_cli.SlurmUnavailable as error:
        reason = "the requeue was refused (%s)" % error
    log("%s: %s; submit again" % (job, reason))
    if run is not None and attempt is not None and (disabled or not ending):  # else the exit trap still tries
        attempts.record_failed_restart(run, attempt, reason)
        settle_canary(run, "stop")
        send_notification(run, "stop")


if __name__ == "__main__":
    sys.exit(main())
