"""What a batch script calls on the host, outside the trainer: before the ranks start, and from its exit trap.

    batch_hooks.py begin RUN_DIR            print the number of the next attempt, or nothing if there is none
    batch_hooks.py end RUN_DIR --code 75    record the end, requeue; print the decision as a line of JSON
    batch_hooks.py watch RUN_DIR            start a job again that Slurm ends for its wall limit or for
                                                              lost nodes, or whose batch shell was killed
    batch_hooks.py release RUN_DIR          release the jobs that wait for a canary once it has passed

Standard library, Python >= 3.6: whatever Python the host has. The order in ``end`` matters: after a requeue the batch
shell may be killed at once, so the end is written and synced before it; and what is printed goes to the file system
that holds the run, which may be full, so that nothing depends on it.
"""

import argparse
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


EXAMPLES = """examples:
  python3 jobs/host/batch_hooks.py begin runs/masking/mask50
  python3 jobs/host/batch_hooks.py end runs/masking/mask50 --code 75
"""

#: Seconds for which a file system that is away is waited for on the node, and then off it, before the next try.
PATIENCE, LATER = 600.0, 1800.0
#: Seconds until Slurm has learned that a batch shell is gone.
LEARNS = 2.0
#: Seconds between two looks at a canary.
LOOK = 10.0


def main(arguments: Any = None) -> int:
    args = parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # they would cut the decision off
        signal.signal(number, signal.SIG_IGN)
    if args.what in ("watch", "release"):
        follow_shell()
    if args.what == "watch":  # a signal that is blocked is kept, though it is ignored
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    return act(args, until_term)


class ShellGone(Exception):
    """The batch shell ended without its exit trap, which ends this process otherwise."""


def follow_shell() -> None:
    """Have ShellGone raised when the batch shell, this process's parent, is gone. Linux; elsewhere nothing happens."""
    shell = os.getppid()

    def gone(*_: Any) -> None:
        if os.getppid() != shell:  # scancel --full may send the same signal
            raise ShellGone()

    signal.signal(signal.SIGHUP, gone)
    try:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGHUP)  # PR_SET_PDEATHSIG
    except (ImportError, OSError, AttributeError):
        return


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description="Begin or end an attempt of a run, on the host.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("what", choices=["begin", "end", "watch", "release"])
    made.add_argument("run", metavar="RUN_DIR")
    made.add_argument(
        "--token", help="the submission that the job belongs to (begin); a job of another one does nothing"
    )
    made.add_argument("--attempt", type=int, help="the number that begin printed (end, watch; default: the newest)")
    made.add_argument("--code", type=int, help="exit code of the attempt (end)")
    made.add_argument("--late", action="store_true", help="it had its whole wall limit, but for the time to save (end)")
    made.add_argument("--state", help="the scheduler's words for the job; default: it is asked (end)")
    return made


def until_term(seconds: float) -> None:
    """Wait, but not beyond a TERM, which is what Slurm sends to all processes of a job at its limit."""
    signal.sigtimedwait([signal.SIGTERM], seconds)


def act(args: argparse.Namespace, rest: Optional[Callable[[float], None]] = None) -> int:
    """Do what was asked; the exit code. ``rest``: how the watcher waits (slurm_cli.wait_for_time_limit)."""
    from flip.runs.errors import DATA, FlipError

    try:
        if args.what == "begin":
            return retry_on_oserror(lambda met: begin(args.run, args.token))
        if args.what == "watch":
            return watch(args.run, args.attempt, rest)
        if args.what == "release":
            return release(args.run)
        return retry_on_oserror(
            lambda met: end(args.run, args.attempt, args.code, args.state, args.late, met), args.attempt
        )
    except ShellGone:  # of a canary: the next start has a process of its own that releases the others
        return 0
    except FlipError as error:
        say(error)
        return error.code
    except ValueError as error:
        say("a record of the run is damaged: %s" % error)
        return DATA


def say(text: object, stream: Any = None) -> None:
    """Print where it can be printed."""
    try:
        print(text, file=stream or sys.stderr, flush=True)
    except OSError:  # a full disk, most likely the one that is being told about
        pass


def retry_on_oserror(do: Callable[[Optional[OSError]], int], attempt: Optional[int] = None) -> int:
    """Try again while files make trouble: an attempt that cannot be recorded must not be the run's end. ``do`` is
    given the error of the try before.

    Then the job leaves the node and comes back later. That ``attempt`` could not be ended is left with the scheduler,
    and written by the next begin.
    """
    from flip.runs.errors import STORAGE

    end_, wait = time.time() + PATIENCE, 1.0
    met: Optional[OSError] = None
    while True:
        try:
            return do(met)
        except OSError as error:
            met = error
            say("%s; tried again for up to %g s" % (error, PATIENCE))
            if time.time() + wait > end_:
                break
        time.sleep(wait)
        wait = min(60.0, 2 * wait)
    from jobs.host import slurm_cli

    job, restarts = slurm_cli.own_job(os.environ), slurm_cli.restart_count(os.environ)
    # a requeue waits for Slurm as long: what is to be left with it must not be lost before
    before = slurm_cli.FailedStarts(slurm_cli.MAX_FAILED_STARTS)  # without a job nothing starts again
    heard = slurm_cli.read_failed_starts(job, restarts, slurm_cli.OUTAGE_SECONDS) if job else before
    before = heard or slurm_cli.FailedStarts()
    if before.starts < slurm_cli.MAX_FAILED_STARTS:
        mark = slurm_cli.FailedStarts(before.starts + 1, attempt or before.attempt)
        slurm_cli.record_failed_starts(job, restarts, mark, patience=0.0 if heard else slurm_cli.OUTAGE_SECONDS)
        start_again(LATER, (), attempt=attempt)
    return STORAGE


def begin(path: str, token: Optional[str]) -> int:
    """Win the next attempt and print its number. Prints nothing, and is content, where there is nothing to do:
    complete (Slurm may start a finished job once more), cancelled, or submitted again as another job.
    """
    from flip.runs.errors import CAUSES, ConfigError
    from flip.runs.rundir import RunDir, read_record
    from jobs.host import attempts, orphans, slurm_cli, successor

    run = RunDir(path)
    if not run.path.exists():
        raise ConfigError(
            "the run directory is gone", str(run.path), remedy="Was it moved to the trash? Submit it again."
        )
    job = read_record(run.path / "job.json") or {}
    idle = ""
    if token is not None and job.get("token") != token:
        idle = "it was submitted again since, as another job"
    elif successor.superseded(run.newest_attempt(), os.environ):
        idle = "another job has continued it"
    elif run.result.exists():
        idle = "it is complete"
    elif read_record(run.cancel) is not None:  # opened, not looked for: NFS remembers for a while what was not there
        idle = attempts.cancel_reason(run)
    if idle:
        say("%s: not started: %s" % (run.path, idle))
        if run.result.exists():
            settle_canary(run, "done")
        return 0
    unseen = settled(run)
    verdict = attempts.current_end(run)
    if verdict is not None and verdict["action"] == "stop":
        say("%s: not started: %s" % (run.path, verdict["reason"]))
        if unseen:  # else its exit trap has done this
            settle_canary(run, "stop")
            send_notification(run, "stop")
        return CAUSES.get(verdict["cause"], CAUSES["crash"])
    n = attempts.start_attempt(run, facts())
    orphans.kill_orphans(str(run.path), n, slurm_cli.own_job(os.environ), slurm_cli.restart_count(os.environ))
    run.open_logs(n)
    print(n)
    return 0


def settled(run: Any, before: Optional[int] = None) -> bool:
    """Give attempts that nobody saw end an end, those before one; whether there were some.

    Of one whose end could not be written the scheduler knows. While that is silent they are left open: the end of this
    attempt, or the next begin, asks again, and no end is put down to what it was not.
    """
    from jobs.host import attempts, slurm_cli

    if not [n for n in attempts.unended(run) if before is None or n < before]:
        return False
    job = slurm_cli.own_job(os.environ)
    mark: Any = slurm_cli.FailedStarts()
    if job:
        mark = slurm_cli.read_failed_starts(job, slurm_cli.restart_count(os.environ))
    if mark is None:
        say("%s: nobody says how its last attempt ended; that is asked again" % run.path)
        return False
    attempts.end_abandoned(run, mark.attempt, before)
    return True


def facts() -> dict:
    """Where this attempt runs, for its start.json."""
    from jobs.host import slurm_cli

    named = {"restarts": "SLURM_RESTART_COUNT", "nodes": "SLURM_JOB_NODELIST", "world": "SLURM_NTASKS"}
    found = {"job": slurm_cli.own_job(os.environ)}
    return dict(found, **{key: os.environ[name] for key, name in named.items() if name in os.environ})


def end(
    path: str,
    n: Optional[int],
    code: Optional[int],
    state: Optional[str],
    late: bool = False,
    met: Optional[OSError] = None,
) -> int:
    """Record the end of attempt n and do what follows from it. ``met``: the error of an earlier try of this."""
    from flip.runs.errors import ConfigError
    from flip.runs.rundir import RunDir
    from jobs.host import attempts, bad_nodes, slurm_cli, wall_limit

    seen: dict = {}
    run: Any = RunDir(path)
    n = run.newest_attempt() if n is None else n
    if n not in run.attempt_numbers():
        raise ConfigError("no such attempt", str(run.path), n, "It is won by `jobs/host/batch_hooks.py begin`.")
    if state is None and slurm_cli.own_job(os.environ):
        state = slurm_cli.wait_for_state(slurm_cli.own_job(os.environ), slurm_cli.restart_count(os.environ), seen=seen)
    if state is not None:
        settled(run, n)
    suspect = bad_nodes.find_suspect(run, n, time.time())
    among = int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
    lost = bad_nodes.unstartable_nodes(str(run.logs / str(n) / "job.err"), among)
    late = wall_limit.limit_reached(run, seen) or late  # type: ignore[assignment]
    full = str(met) if met is not None and met.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    decision = attempts.end_attempt(run, n, code, state, suspect=suspect, late=late, unstarted=lost, full=full)
    say(json.dumps(decision._asdict(), sort_keys=True), sys.stdout)
    if decision.action == "requeue":
        requeue_job(decision, run, n)
    else:
        settle_canary(run, decision.action)
        send_notification(run, decision.action)
    return 0


def send_notification(run: Any, action: str) -> None:
    """Those who want to know; the last thing that is done."""
    from jobs.host import notify

    for trouble in notify.send_events(run, action):
        say(trouble)


def settle_canary(run: Any, action: str) -> None:
    """What the end of a canary means for the jobs that wait for it. Slurm is waited for as with a requeue."""
    from jobs.host import canary, slurm_cli

    record, begin, wait = canary.canary_record(run), time.time(), 1.0
    absent: List[float] = []
    while record.get("releases"):
        try:
            if action == "stop" and not canary.passed(run, record["steps"]):
                return canary.cancel_held_jobs(record["releases"])
            if action == "nothing" or released(run, absent):
                return None
            trouble: object = "some of them are not in Slurm's queue"
        except slurm_cli.SlurmUnavailable as error:
            trouble = error
        if time.time() + wait > begin + (slurm_cli.OUTAGE_SECONDS if action == "done" else PATIENCE):
            say("%s: the jobs that wait for it were not released: %s; submit again" % (run.path, trouble))
            return None
        time.sleep(wait)
        wait = min(60.0, 2 * wait)
    return None


def released(run: Any, absent: List[float]) -> bool:
    """Release the jobs that wait for a canary; whether that is done. ``absent``: times of earlier answers of squeue
    that lacked some of them. After two such answers, scheduler.GONE seconds apart, these jobs are gone.
    """
    from jobs.host import canary, slurm_cli

    missing = canary.release(run)
    if not missing:
        return True
    absent.append(time.time())
    if absent[-1] - absent[0] < slurm_cli.UNKNOWN_JOB_SECONDS:
        return False
    say("%s: not in Slurm's queue any more: %s; submit again" % (run.path, ", ".join(missing)))
    return True


def release(path: str) -> int:
    from flip.runs.rundir import RunDir
    from jobs.host import canary, slurm_cli

    run = RunDir(path)
    absent: List[float] = []
    while True:
        try:
            record = canary.canary_record(run)
            if not record.get("releases") or (canary.passed(run, record["steps"]) and released(run, absent)):
                return 0
        except (OSError, ValueError, slurm_cli.SlurmUnavailable) as error:
            say(error)
        time.sleep(LOOK)


def watch(path: str, n: Optional[int], rest: Optional[Callable[[float], None]] = None) -> int:
    """Start the job again when Slurm ends it for its wall limit, or for lost nodes without a requeue.

    The exit trap may come too late for that: between TERM and KILL there is KillWait, and srun waits as long for tasks
    of lost nodes. The next ``begin`` records how this attempt ended.
    """
    from flip.runs.rundir import RunDir
    from jobs.host import slurm_cli

    run = RunDir(path)
    n = run.newest_attempt() if n is None else n
    job, restarts = slurm_cli.own_job(os.environ), slurm_cli.restart_count(os.environ)
    try:
        state = slurm_cli.wait_for_time_limit(job, restarts, rest, lambda limit: note_wall(run, n, limit))
    except ShellGone:
        return retry_on_oserror(lambda met: shell_gone(run, n), n)
    if state == "TIMEOUT":
        try:
            run.note_limit(n)
        except OSError as error:
            say(error)
    if state:
        start_again(0.0, (), ending=True, run=run, attempt=n)
    return 0


def note_wall(run: Any, n: Any, limit: int) -> None:
    """Record the wall limit, for `status` and for an end that leaves no time to ask."""
    from jobs.host import wall_limit

    try:
        wall_limit.record_limit(run, n, limit)
    except OSError as error:
        say(error)


def shell_gone(run: Any, n: int) -> int:
    """Do what the exit trap of a batch shell that was killed would have done: requeue the job, unless it has been
    requeued or cancelled, or nobody says so. The end of attempt n is left to the next begin: its ranks may be saving.
    """
    from flip.runs.rundir import read_record
    from jobs.host import slurm_cli
    from jobs.host.restart_policy import UNKNOWN

    time.sleep(LEARNS)
    words = slurm_cli.wait_for_state(slurm_cli.own_job(os.environ), slurm_cli.restart_count(os.environ))
    ended = read_record(run.attempt(n) / "end.json") or {"action": "requeue"}  # the trap may have got that far
    over = run.result.exists() or run.cancel.exists() or ended["action"] != "requeue"
    if over or words in (None, UNKNOWN, "PENDING", "CANCELLED"):
        say("%s: the batch shell is gone; its job (%s) is left alone" % (run.path, words))
        return 0
    say("%s: the batch shell was killed (%s)" % (run.path, words))
    if words == "TIMEOUT":
        run.note_limit(n)
    start_again(ended.get("delay", 0.0), tuple(ended.get("exclude", ())), run=run, attempt=n)
    return 0


def requeue_job(decision: Any, run: Any, n: int) -> None:
    """Start the batch job again through its scheduler. Outside of one there is nothing to start: ConfigError."""
    from flip.runs.errors import ConfigError
    from jobs.host import slurm_cli

    if not slurm_cli.own_job(os.environ):
        raise ConfigError(
            "not a batch job: nothing to requeue",
            "jobs/host/batch_hooks.py",
            decision.cause,
            "The end is recorded; local runs go on by `python jobs/submit.py`.",
        )
    start_again(decision.delay, decision.exclude, run=run, attempt=n)


def start_again(
    delay: float, exclude: tuple, ending: bool = False, run: Any = None, attempt: Optional[int] = None
) -> None:
    from jobs.host import slurm_cli

    job, restarts = slurm_cli.own_job(os.environ), slurm_cli.restart_count(os.environ)
    try:
        say("%s: %s" % (job, slurm_cli.requeue(job, restarts, delay, exclude, ending=ending)), sys.stdout)
    except slurm_cli.RequeueDisabled:
        succeed(job, restarts, delay, exclude, run, attempt)
    except slurm_cli.SlurmUnavailable as error:
        say("%s was not requeued: %s; submit again" % (job, error))


def succeed(job: str, restarts: int, delay: float, exclude: tuple, run: Any, attempt: Optional[int]) -> None:
    """Submit a successor of a job that Slurm does not requeue. Where that is refused too, record why the run ends here.

    ``run``: None where its files cannot be written.
    """
    from jobs.host import attempts, slurm_cli, successor

    try:
        say("%s: %s" % (job, successor.submit(job, restarts, attempt, delay, exclude)), sys.stdout)
    except slurm_cli.SlurmUnavailable as error:
        reason = "requeue is disabled here, and a new job was refused (%s)" % error
        say("%s: %s; submit again" % (job, reason))
        if run is not None and attempt is not None:
            attempts.record_failed_restart(run, attempt, reason)
            settle_canary(run, "stop")
            send_notification(run, "stop")


if __name__ == "__main__":
    sys.exit(main())
