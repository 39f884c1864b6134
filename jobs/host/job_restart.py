"""Restarts a job: ``JobRestart`` for its owner, ``StandIn`` for the guard of an owner that was killed or hangs.

``JobRestart`` alone calls ``Scheduler.requeue``, after ``next_step`` has decided it. Where no owner and no guard is
left, a task of node agents (``agents/orphaned_task.py``) or the script (``fallback.sh``) restarts the job. Standard
library, Python >= 3.6.
"""

import os
import time
from typing import Callable, Optional, Sequence, Tuple

from flip.runs import attempts
from flip.runs.errors import KILLED
from flip.runs.next_step import REQUEUE, Evidence, Step, next_step
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir
from jobs.host import requeue, slurm_cli
from jobs.host.failed_starts import FailedStarts
from jobs.host.guard import Heard
from jobs.host.scheduler import JobSeen, Scheduler

OWNER_EXIT_SECONDS = 2.0  # until Slurm has noticed that the owner is gone
LOOK_SECONDS = 60.0  # between two looks of the guard at a job whose owner hangs

Log = Callable[..., None]
"""``log(text, name="job.err")``: writes to a log of the attempt."""


class JobRestart:
    """``pause``: waits for this many seconds."""

    def __init__(self, run: RunDir, scheduler: Scheduler, log: Log, pause: Callable[[float], None]) -> None:
        self._run = run
        self._scheduler = scheduler
        self._log = log
        self._pause = pause

    def now(
        self,
        step: Step,
        exclude: Optional[Sequence[str]],
        n: int,
        urgent: bool = False,
        failed: Optional[FailedStarts] = None,
    ) -> bool:
        """Restart the job; returns whether that was possible. If not, end.json of attempt n says so.

        ``exclude``: all nodes that the next start avoids; None: as before. ``urgent``: Slurm ends the job at this
        moment, and the end of the attempt tries again. ``failed``: this start counts as a failed one.
        """
        if not self._scheduler.can_restart:
            self._log("not a batch job: nothing restarts it; continue local runs with `flip submit`")
            return False
        disabled = False
        try:
            what = self._scheduler.requeue(step.delay, exclude, n or None, urgent, failed)
            self._log(what, "job.out")
            return True
        except requeue.SuccessorRefused as error:
            disabled = True
            reason = "requeue is disabled here, and a new job was refused (%s)" % error
        except slurm_cli.SlurmUnavailable as error:
            reason = "the requeue was refused (%s)" % error
        self._log("%s; submit again" % reason)
        if n and failed is None and (disabled or not urgent):
            attempts.record_failed_restart(self._run, n, reason)
        return False

    def later(self, code: int, n: int, delay: Optional[float] = None, avoid_node: bool = False) -> None:
        """Restart the job after a start that could not write to its run, at most MAX_FAILED_STARTS times in a row.

        ``code``: of this start. ``n``: its newest attempt, whose end could not be written; 0: none. ``delay``: seconds;
        None: longer after each one. ``avoid_node``: whether the next start avoids this node.
        """
        seen = self.patient_see(slurm_cli.DEADLINE)  # a requeue waits as long: the comment must not be lost before
        before = seen.failed or FailedStarts()
        step = next_step(Evidence(EndFacts(None, seen.state), failed_starts=before.starts))
        self._log(step.reason)
        if step.do != REQUEUE:
            return
        if delay is not None:
            step = step._replace(delay=delay)
        node = os.environ.get("SLURMD_NODENAME", "")
        failed = FailedStarts(before.starts + 1, n or before.attempt, code, node)
        is_ending = bool(seen.ending) and seen.state != "PENDING"  # Slurm then refuses a comment until the requeue
        if not is_ending:
            self._scheduler.note_failed_start(failed)
        nodes = None
        if avoid_node and node:
            nodes = self._scheduler.nodes_without(node, before.node)
        self.now(step, nodes, n, failed=failed)
        if is_ending:
            self._scheduler.note_failed_start(failed)

    def patient_see(self, deadline: float) -> JobSeen:
        """The job as soon as Slurm answers, for half a day."""
        until = time.time() + slurm_cli.OUTAGE_SECONDS
        pause = 1.0
        seen = self._scheduler.see(deadline)
        while seen.state is None and time.time() < until:
            self._pause(pause)
            pause = min(60.0, 2 * pause)
            seen = self._scheduler.see(deadline)
        return seen

    def avoided_nodes(self, decided: Tuple[str, ...]) -> Optional[Sequence[str]]:
        """All nodes that the next start avoids; None: as before. ``decided``: if the records cannot be read."""
        try:
            return attempts.excluded_nodes(self._run, time.time())
        except (OSError, ValueError):  # an unreadable record must not prevent the restart
            return decided or None


class StandIn:
    """What the guard does in place of its owner. It touches no file before the job is restarted: files may hang."""

    def __init__(self, run: RunDir, scheduler: Scheduler, log: Log) -> None:
        self._run = run
        self._scheduler = scheduler
        self._log = log
        self._restart = JobRestart(run, scheduler, self._print, lambda seconds: time.sleep(seconds))

    def on_gone(self, heard: Heard) -> None:
        """Restart the job if its owner was killed, unless Slurm or a user has ended it."""
        os.environ["FLIP_ATTEMPT"] = heard.get("attempt", "")  # as all processes of the attempt have it
        time.sleep(OWNER_EXIT_SECONDS)
        seen = self._restart.patient_see(slurm_cli.SHORT_DEADLINE)  # Slurm kills this process, too, after KillWait
        self._act("was killed", seen, heard)

    def on_silent(self, heard: Heard) -> Optional[float]:
        """Look at the job while its owner hangs in a call of a file system: nobody else would see that Slurm ends it.
        Returns the seconds until the next look, None if nothing is left to do."""
        seen = self._scheduler.see(slurm_cli.SHORT_DEADLINE)
        if seen.state is None:
            return 1.0
        if seen.is_ours:
            return max(1.0, min(LOOK_SECONDS, seen.seconds_left or LOOK_SECONDS))
        self._act("hangs", seen, heard)
        return None

    def _act(self, what: str, seen: JobSeen, heard: Heard) -> None:
        self._scheduler.sleep = None  # that of the owner serves agents
        n = int(heard.get("attempt", 0))
        step = next_step(Evidence(EndFacts(None, seen.state), is_over=False))
        if step.do == REQUEUE and not n:
            self._restart.later(KILLED, 0, avoid_node=True)
        elif step.do == REQUEUE:
            exclude = [name for name in heard.get("exclude", "").split(",") if name]
            step = step._replace(delay=float(heard.get("delay", 0.0)))
            self._restart.now(step, exclude or None, n, urgent=True)
        if step.cause == "timeout" and n:
            self._run.record_time_limit(n)
        self._log("the owner of the job %s (%s): %s" % (what, seen.state, step.do))

    def _print(self, text: object, name: str = "") -> None:
        """To the log of the submission, which is open."""
        try:
            os.write(2, ("%s\n" % text).encode())
        except OSError:
            pass
