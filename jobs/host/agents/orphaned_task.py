"""Restarts a job from a task of a node agent, if nothing on the job's first node can do so any more: a requeue or, if
Slurm does not requeue the job, a successor.

The owner of the job (which has the coordinator), its guard and srun run on the first node. They end together in two
cases, and the task of an agent that has lost its coordinator asks Slurm in which it is:

- The first node is lost. Slurm lets a job with ``--no-kill`` go on without it: nothing would end or requeue the job
  before its wall limit.
- The processes of the batch script were killed, as cgroups do at the memory limit of a step; srun may be left. The node
  lives. Slurm ends the job: it sends TERM to the tasks, and KILL after KillWait. The task acts at TERM, while its ranks
  still save (``restart_if_ending``), and again when they have ended (``restart_if_orphaned``).

Standard library, Python >= 3.6.
"""

import os
import signal
import socket
import sys
import time
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional

from flip.runs import attempts
from flip.runs.next_step import REQUEUE, Evidence, Step, next_step, recorded_step
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, exists, read_record
from jobs.host import own_job, requeue, slurm_cli
from jobs.host.node_list import first_host

PATIENCE_SECONDS = 900.0
"""Until ``status`` shows that Slurm has not noticed the loss (SlurmdTimeout, 300 s by default), or does not answer."""
POLL_SECONDS = 10.0
"""Between two queries of a job that runs. TERM wakes the task: then Slurm ends the job."""
URGENT_SECONDS = 60.0
"""For so long after the loss of the coordinator, and after TERM, Slurm may be about to kill this task."""
URGENT_POLL_SECONDS = 1.0
"""Until the next query in that time if Slurm does not answer."""
TURN_SECONDS = 60.0
"""Between the turns of two nodes of a job that runs."""
ENDING_TURN_SECONDS = 2.0
"""Between the turns of two nodes of a job that Slurm ends."""
CONNECT_SECONDS = 10.0
SAVED_SECONDS = 6.0
"""In which slurmctld writes what it has accepted to its state (SAVE_MAX_WAIT of its source, 5 s)."""
SCRIPT_ENDED = ("FAILED", "OUT_OF_MEMORY")
"""States of a job whose batch script has ended by itself, while other processes of the job are left."""
FIRST_NODE_LOST = "NODE_FAIL"
"""The state of a job whose first node is lost, as a cause: Slurm shows RUNNING."""


def sleep_until_term(seconds: float) -> bool:
    """Sleep, but return True at TERM, which is blocked in the task of an agent."""
    return signal.sigtimedwait([signal.SIGTERM], seconds) is not None


def restart_if_orphaned(environ: Mapping[str, str], sleep: Callable[[float], Any] = sleep_until_term) -> str:
    """Wait until Slurm shows that the job of this task is orphaned, then restart the job; returns what happened.

    Returns at once if the owner of the job lives: it decides when this task has ended. ``sleep``: seconds ->
    whether it was interrupted, because Slurm ends the job.
    """
    if _has_owner(environ):
        return "job %s is left to its owner" % own_job.own_job(environ)
    return OrphanedTask(environ, sleep).restart()


def restart_if_ending(environ: Mapping[str, str], sleep: Callable[[float], Any] = time.sleep) -> str:
    """Restart the job of this task if Slurm ends it and nothing else restarts it, while ranks still save; returns what
    happened, "" if Slurm does not end the job, or does not answer: then it is to be asked again."""
    if _has_owner(environ):
        return "job %s is left to its owner" % own_job.own_job(environ)
    return OrphanedTask(environ, sleep).restart_if_ending()


def restart_if_forgotten(environ: Mapping[str, str], sleep: Callable[[float], Any] = sleep_until_term) -> str:
    """Restart the job of this task again if its requeue is forgotten; returns what happened, "" if it is not.

    A controller that is killed before it has saved its state forgets a requeue that it has accepted: when it is back,
    the job has ended, and nothing but this task is left of it.
    """
    if _has_owner(environ):
        return ""
    return OrphanedTask(environ, sleep).restart_if_forgotten()


class Orphaned(NamedTuple):
    """Why and how a job must be restarted by a task."""

    reason: str
    step: Step
    is_ending: bool
    """Whether Slurm ends the job, and with it this task."""


class LeftAlone(Exception):
    """The job must not be restarted; the text says why."""


class SuccessorWaits(Exception):
    """The successor is submitted, but our job was not ended, which otherwise ends at its wall limit."""


class OrphanedTask:
    """A task whose agent has lost its coordinator, and whose batch script is gone.

    The nodes take turns, because Slurm does not say which of them have a task left: nodes that were excluded have none,
    but stay in the job. Each asks Slurm in its turn whether another has restarted the job.
    """

    def __init__(self, environ: Mapping[str, str], sleep: Callable[[float], Any]) -> None:
        self.job = own_job.own_job(environ)
        self.restarts = own_job.restart_count(environ)
        self.node = environ["SLURMD_NODENAME"]
        self.index = int(environ.get("SLURM_NODEID") or 0)
        self.run = RunDir(environ["FLIP_RUN"])
        self.attempt = _newest(self.run)
        """The newest one when this node lost its coordinator; None if it could not be read."""
        self._sleep = sleep
        self._urgent = URGENT_SECONDS
        """Seconds for which Slurm may still be about to kill this task."""

    def restart(self) -> str:
        """Restart the job when it is orphaned; returns what happened."""
        try:
            orphaned = self._wait()
        except LeftAlone as reason:
            return self._left_alone(reason)
        return self._restart_in_turn(orphaned)

    def restart_if_ending(self) -> str:
        """Restart the job if Slurm ends it; returns what happened, "" if that is not known yet."""
        fields: Dict[str, str] = {}
        state = own_job.job_state(self.job, self.restarts, slurm_cli.SHORT_DEADLINE, fields)
        try:
            orphaned = self._why_orphaned(state, fields)
        except LeftAlone as reason:
            return self._left_alone(reason)
        if orphaned is None or not orphaned.is_ending:
            return ""
        return self._restart_in_turn(orphaned)

    def restart_if_forgotten(self) -> str:
        """Restart a job that was requeued if it is not any more; returns what happened, "" if nothing did."""
        if own_job.job_state(self.job, self.restarts, slurm_cli.SHORT_DEADLINE) not in (None, "PENDING"):
            return ""
        self._sleep(SAVED_SECONDS)
        try:
            orphaned = self._wait()
        except LeftAlone:
            return ""
        return self._restart_in_turn(orphaned)

    def _left_alone(self, reason: LeftAlone) -> str:
        return "job %s is left alone: %s" % (self.job, reason)

    def _restart_in_turn(self, orphaned: Orphaned) -> str:
        """Restart the job in the turn of this node; returns what happened."""
        try:
            orphaned = self._wait_for_turn(orphaned)
            what = self._restart(orphaned)
        except LeftAlone as reason:
            return self._left_alone(reason)
        except slurm_cli.SlurmUnavailable as error:
            if orphaned.is_ending:
                return self._record_refusal(orphaned, str(error))
            return self._leave_to_user(str(error))
        except SuccessorWaits as error:
            return self._leave_to_user(str(error), "`scancel %s`" % self.job)
        return "job %s %s: %s" % (self.job, orphaned.reason, what)

    def _wait(self) -> Orphaned:
        """Wait until the job is orphaned. Raises LeftAlone.

        Without a limit, because the job holds its nodes in any case. ``status`` shows the wait after a while: on a node
        from which Slurm can never be asked, only the user can act.
        """
        reason = ""
        waited = 0.0  # for the same reason
        is_recorded = False
        while True:
            fields: Dict[str, str] = {}
            asked_at = time.monotonic()
            state = own_job.job_state(self.job, self.restarts, self._deadline(), fields)
            orphaned = self._why_orphaned(state, fields)
            if orphaned is not None:
                return orphaned
            before = reason
            if state is None:
                reason = "Slurm does not answer"
                pause = self._unanswered_pause()
            else:
                reason = "Slurm has not noticed that"
                pause = POLL_SECONDS
            passed = time.monotonic() - asked_at + pause
            if reason != before:
                waited = 0.0
            waited += passed
            if waited >= PATIENCE_SECONDS and not is_recorded:
                is_recorded = True
                self._leave_to_user(reason)
            self._urgent -= passed
            if self._sleep(pause):
                self._urgent = URGENT_SECONDS

    def _why_orphaned(self, state: Optional[str], fields: Mapping[str, str]) -> Optional[Orphaned]:
        """Why the job must be restarted, by its state and fields; None if that is not known yet. Raises LeftAlone."""
        if state is None:
            return None
        if state in slurm_cli.ON_NODES + slurm_cli.TRANSITIONAL:
            first = first_host(fields.get("NodeList", ""))
            if not first or first == fields.get("BatchHost", first):
                return None
            # if its run is over, too: the next start ends at once, and this job would hold its nodes
            step = next_step(Evidence(EndFacts(None, FIRST_NODE_LOST), is_over=False))
            return Orphaned("has lost its first node", step, is_ending=False)
        step = self._step_after(state)
        if step.do != REQUEUE:
            raise LeftAlone("it is %s: %s" % (state, step.reason))
        return Orphaned("has lost its batch script (%s)" % state, step, is_ending=True)

    def _step_after(self, state: str) -> Step:
        """What follows for a job that Slurm has ended in a state. What cannot be read now, the next start reads."""
        is_complete = state == "COMPLETED"  # its owner came to its end
        is_cancelled = False
        end: Mapping[str, Any] = {}
        try:
            is_complete = is_complete or self.run.is_complete()
            is_cancelled = exists(self.run.cancel)
            self.attempt = self.run.newest_attempt()  # the run may have gone on without this node
            end = read_record(self.run.attempt(self.attempt) / "end.json") or {}
        except (OSError, ValueError) as error:
            _note(error)
        step = next_step(Evidence(EndFacts(None, state), complete=is_complete, cancelled=is_cancelled, is_over=False))
        if step.do == REQUEUE and end:
            return recorded_step(end)
        return step

    def _wait_for_turn(self, orphaned: Orphaned) -> Orphaned:
        """Wait for the turn of this node; returns why the job must be restarted then. Raises LeftAlone."""
        while not orphaned.is_ending:  # of a node that is left the first one has no turn
            if not self._sleep(TURN_SECONDS * max(0, self.index - 1)):
                return orphaned
            orphaned = self._wait()  # Slurm ends the job meanwhile
        if self.index == 0:
            return orphaned
        self._sleep(ENDING_TURN_SECONDS * self.index)
        fields: Dict[str, str] = {}
        state = own_job.job_state(self.job, self.restarts, slurm_cli.SHORT_DEADLINE, fields)
        return self._why_orphaned(state, fields) or orphaned

    def _restart(self, orphaned: Orphaned) -> str:
        """Requeue the job or, if Slurm does not requeue it, submit its successor and end it; returns what happened.
        Both leave a job alone that another node has restarted."""
        try:
            what = requeue.requeue(self.job, self.restarts, orphaned.step.delay, ending=orphaned.is_ending)
        except slurm_cli.RequeueDisabled:
            what = requeue.submit_successor(self.job, self.restarts, self.attempt, orphaned.step.delay)
            if not orphaned.is_ending:
                self._end_job(what)
        if orphaned.step.cause == "timeout":
            self._record_time_limit()
        return what

    def _end_job(self, successor: str) -> None:
        """End the job, for whose end its successor waits. Raises SuccessorWaits."""
        try:
            slurm_cli.call("scancel", self.job)
        except slurm_cli.SlurmUnavailable as error:
            raise SuccessorWaits("%s, which waits for the end of this job: %s" % (successor, error)) from error

    def _deadline(self) -> float:
        if self._urgent > 0:
            return slurm_cli.SHORT_DEADLINE
        return slurm_cli.DEADLINE

    def _unanswered_pause(self) -> float:
        if self._urgent > 0:
            return URGENT_POLL_SECONDS
        return own_job.UNANSWERED_POLL_SECONDS

    def _record_time_limit(self) -> None:
        if self.attempt is None:
            return
        try:
            self.run.record_time_limit(self.attempt)
        except OSError:  # the next start asks Slurm
            pass

    def _record_refusal(self, orphaned: Orphaned, error: str) -> str:
        """Record for ``flip status`` why a job that Slurm has ended is not restarted; returns what happened."""
        text = "its job %s, and %s could not restart it: %s" % (orphaned.reason, self.node, error)
        if self.attempt is not None and _newest(self.run) == self.attempt:
            self._record(self.attempt, text)
        return "job %s: %s; submit again" % (self.job, text)

    def _leave_to_user(self, reason: str, remedy: str = "") -> str:
        """Record for ``flip status`` what the user must do, unless the run goes on: this node may have lost its network
        alone; returns what happened."""
        if self.attempt is None or self._goes_on():
            return "job %s is left alone: %s, and its run may go on without this node" % (self.job, reason)
        what = "its first node does not answer, and %s could not restart job %s: %s; %s"
        remedy = remedy or "`scancel %s`, then submit again" % self.job
        text = what % (self.node, self.job, reason, remedy)
        self._record(self.attempt, "the job has lost its first node", text)
        return text

    def _record(self, attempt: int, reason: str, remedy: str = "") -> None:
        """``attempts.record_failed_restart``, unless another node has recorded a remedy. The task goes on if the files
        of the run are away."""
        try:
            if not (read_record(self.run.attempt(attempt) / "end.json") or {}).get("remedy"):
                attempts.record_failed_restart(self.run, attempt, reason, remedy)
        except (OSError, ValueError) as error:
            _note(error)

    def _goes_on(self) -> bool:
        """Whether another attempt has started, or a rank has written the status of the run a short time ago."""
        if _newest(self.run) != self.attempt:
            return True
        try:
            age = time.time() - os.stat(str(self.run.status)).st_mtime
        except OSError:
            return False
        return age < PATIENCE_SECONDS / 2


def _note(text: object) -> None:
    """Print, if possible: the disk may be full."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        pass


def _newest(run: RunDir) -> Optional[int]:
    """The newest attempt of the run; None if its files cannot be read."""
    try:
        return run.newest_attempt()
    except OSError:
        return None


def _has_owner(environ: Mapping[str, str]) -> bool:
    """Whether the owner of the job lives: srun, its child, does, and Slurm shows no end of the batch script."""
    if not _srun_answers(environ):
        return False
    state = own_job.job_state(own_job.own_job(environ), own_job.restart_count(environ), slurm_cli.SHORT_DEADLINE)
    return state not in SCRIPT_ENDED


def _srun_answers(environ: Mapping[str, str]) -> bool:
    """Whether the srun of this task listens; if it was killed or its node is lost it does not."""
    try:
        place = environ["SLURM_SRUN_COMM_HOST"], int(environ["SLURM_SRUN_COMM_PORT"])
        socket.create_connection(place, CONNECT_SECONDS).close()
    except (KeyError, OSError):
        return False
    return True
