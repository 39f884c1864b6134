"""Owns one start of a job, from its first attempt to its last. The batch script executes it and is replaced by it.

    python3 -I jobs/host/job.py RUN_DIR --token TOKEN --script SCRIPT [--agents] [--tracker NAME] [--peer-seconds N]

    BEGIN --won--> GATHER --agents are ready--> RUN --all ranks have ended or are lost--> DECIDE --here--> GATHER
      |              | no agents: srun starts the ranks --^                                  |
      | idle         | step ended, unhealthy nodes ------------------------------> DECIDE    | requeue, stop,
      v              v                                                                       v done, leave
    EXIT <---------------------------------------------------------------------------------CLOSE

One thread. Each wait, in each state, also looks at the wall limit, at a canary and at the guard when that is due.
Signals are only passed on. ``next_step`` alone decides what follows; ``JobRestart`` alone restarts the job. An
exception ends this process without ``over``: the guard then restarts the job as after SIGKILL. Standard library,
Python >= 3.6.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, NoReturn, Optional, Sequence, Set, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def leave_node(code: int) -> NoReturn:
    """Go back to the batch script, whose fallback needs no file of ours: the code cannot be read on this node."""
    traceback.print_exc()
    script = sys.argv[sys.argv.index("--script") + 1]
    os.execv("/bin/bash", ["bash", script, "elsewhere", str(code)])  # noqa: S606


try:
    from flip.files import deletion
    from flip.files.creation import RefusedPath, open_append
    from flip.runs import attempts, canary, wall_limit
    from flip.runs.credentials import scrub_stderr
    from flip.runs.errors import CAUSES, COMPLETE, DATA, STORAGE, ConfigError, FlipError
    from flip.runs.next_step import DONE, HERE, LEAVE, REQUEUE, STOP, Allocation, Evidence, Step, next_step
    from flip.runs.restart_policy import EndFacts
    from flip.runs.rundir import RunDir, exists, read_record
    from jobs.host import attempt_start, end_evidence, held_jobs, notify, rank_entry, requeue, slurm_cli
    from jobs.host.agents.channel import CONTACT, NO_AGENTS
    from jobs.host.agents.coordinator import AttemptOutcome
    from jobs.host.agents.node_pool import POLL_SECONDS, NodePool, exit_code, open_server
    from jobs.host.guard import Guard
    from jobs.host.job_nodes import JobNodes, nodes_of_job
    from jobs.host.job_processes import JobProcesses
    from jobs.host.job_restart import JobRestart, StandIn
    from jobs.host.job_watch import CanaryWatch, LimitWatch
    from jobs.host.rank_step import RankStep
    from jobs.host.scheduler import RUNNING, SUSPENDED, JobSeen, Scheduler, SlurmScheduler
except (ImportError, OSError, SyntaxError):
    if __name__ != "__main__":
        raise
    leave_node(1)

EXAMPLE = """example:
  python3 -I jobs/host/job.py runs/masking/mask50 --token 0123abcd --script /var/spool/slurmd/job7/slurm_script
"""
RETRY_SECONDS = 600.0  # for which an unavailable file system is retried on the node
REQUEUE_DELAY = 1800.0  # until the next start after that
STATE_SECONDS = 5.0  # for which an answer of Slurm counts; a wait and the return of an agent may take minutes
IDLE_SECONDS = 1.0  # in which a signal is noticed while nothing runs
FOREVER = float("inf")
NO_ANSWER = "Slurm does not show the state of the job"


class FilesAway(Exception):
    """The files of the run were unavailable for RETRY_SECONDS."""


class JobOptions(NamedTuple):
    """What the batch script says about the job."""

    token: Optional[str] = None
    """The submission that the job belongs to; a job of another one does nothing. None: not checked."""
    agents: bool = False
    """Whether node agents start the ranks."""
    peer_seconds: float = 20.0
    """The most that the peers of a failed rank get, in seconds."""
    trackers: Sequence[str] = ()
    script: str = ""
    """The batch script; it starts steps and followers."""


class Owner:
    """``make_guard``, ``serve_agents``: as ``Guard`` and ``open_server``."""

    def __init__(
        self,
        run: RunDir,
        options: JobOptions,
        scheduler: Scheduler,
        make_guard: Callable[..., Any] = Guard,
        serve_agents: Callable[..., Any] = open_server,
    ) -> None:
        self.run = run
        self.options = options
        self.scheduler = scheduler
        self.n = 0
        """The newest attempt of this start; 0: none."""
        self.nodes = JobNodes(1, [1], 1)
        self.pool: Optional[NodePool] = None
        self.ranks: Optional[RankStep] = None
        self.processes = JobProcesses(self._start, self.retry, self.log)
        self.is_over = False
        """Whether the job was restarted or ends, so that nothing can follow any more."""
        self._serve_agents = serve_agents
        self._evidence = Evidence(EndFacts(None, None))
        self._allocation = Allocation()
        self._seen = JobSeen()
        self._seen_at = -FOREVER
        self._limit: Optional[int] = None
        """The wall limit that is recorded, in seconds."""
        self._signal = 0
        """The last one that came."""
        self._pause_end = FOREVER
        """When the first of the pauses ends that are under way, by the monotonic clock."""
        self.limit = LimitWatch(scheduler, self._restart_around_ranks, self._record_limit)
        self.canary = CanaryWatch(run, self.log)
        stand_in = StandIn(run, scheduler, self.log)
        self.guard = make_guard(stand_in.on_gone, stand_in.on_silent)
        self.restart = JobRestart(run, scheduler, self.log, self.pause)
        scheduler.sleep = self.pause

    # -- signals and waits -----------------------------------------------------------------------------------------

    def on_signal(self, number: int, *_: Any) -> None:
        """Pass a signal of the cluster on. srun kills its ranks at TERM; for them USR1 means the same."""
        if number == signal.SIGTERM:  # perhaps Slurm ends the job, and kills it after KillWait
            self.limit.hurry()
            self.guard.hurry()
            number = signal.SIGUSR1
        else:
            number = signal.SIGUSR2
        self._signal = number
        self.processes.signal_step(number)

    def wait(self, seconds: float) -> None:
        """Wait for what the agents or the step do, for a short time, and do what is due."""
        if self.pool is not None:
            self.pool.poll(seconds)
        elif self.ranks is not None:
            self.ranks.poll(seconds)
        else:
            self.scheduler.pause(seconds)
        self.guard.beat()
        if not self.is_over:
            self.limit.look()
        self.canary.look()

    def pause(self, seconds: float) -> None:
        """``wait`` for all of this time."""
        end = time.monotonic() + seconds
        outer = self._pause_end
        self._pause_end = min(outer, end)
        longest = IDLE_SECONDS if self.pool is None else POLL_SECONDS
        try:
            while time.monotonic() < end:
                self.wait(max(0.0, min(longest, end - time.monotonic())))
        finally:
            self._pause_end = outer

    def next_due(self) -> float:
        """When ``wait`` has something to do without an event, by the monotonic clock."""
        return min(self.limit.due, self.canary.due, self._pause_end)

    def _restart_around_ranks(self, state: str) -> None:
        """Slurm ends the job while ranks may save. KillWait is short, so it is requeued now; the end of the attempt is
        recorded here if it comes before SIGKILL, else by the next start."""
        step = next_step(Evidence(EndFacts(None, state), is_over=False))
        if step.do == REQUEUE:  # before any file, which may hang
            self._requeue(step, None, urgent=True)
        if step.cause == "timeout" and self.n:
            try:
                self.run.record_time_limit(self.n)
            except OSError as error:
                self.log(error)

    def _requeue(self, step: Step, nodes: Optional[Sequence[str]], urgent: bool = False) -> None:
        self.guard.say(delay=step.delay, exclude=",".join(nodes or ()))
        if self.restart.now(step, nodes, self.n, urgent):
            self.is_over = True
        elif not urgent:  # else the end of the attempt still tries
            self._settle_canary(STOP)
            self._notify(STOP)

    def _record_limit(self, limit: Optional[int]) -> None:
        """Record the wall limit for ``status``, and for an end that leaves no time to ask."""
        if limit is None or limit == self._limit or not self.n:
            return
        try:
            wall_limit.record_limit(self.run, self.n, limit)
            self._limit = limit
        except OSError as error:
            self.log(error)

    def retry(self, do: Callable[[Optional[OSError]], Any]) -> Any:
        """``do(the error of the last try)``, retried on file errors. Raises FilesAway."""
        deadline = time.time() + RETRY_SECONDS
        pause = 1.0
        last: Optional[OSError] = None
        while True:
            try:
                return do(last)
            except RefusedPath:  # waiting does not change an owner
                raise
            except OSError as error:
                last = error
                self.log("%s; retried for up to %g s" % (error, RETRY_SECONDS))
                if time.time() + pause > deadline:
                    raise FilesAway(str(error)) from error
            self.pause(pause)
            pause = min(60.0, 2 * pause)

    def see(self) -> JobSeen:
        """The job now; Slurm is asked for as long as a requeue of it would wait: a short outage costs less."""
        end = time.time() + slurm_cli.RETRY_SECONDS
        pause = 1.0
        seen = self.scheduler.see()
        while seen.state is None and time.time() + pause <= end:
            self.pause(pause)
            pause = min(30.0, 2 * pause)
            seen = self.scheduler.see()
        self._seen = seen
        self._seen_at = time.monotonic()
        return seen

    # -- the life of the job ---------------------------------------------------------------------------------------

    def serve(self) -> int:
        """Own the job to its end; returns its exit code."""
        try:
            code = self._serve()
        except FilesAway:
            code = STORAGE
            if self.scheduler.can_restart:
                self.restart.later(STORAGE, self.n, REQUEUE_DELAY)
        except FlipError as error:
            self.log(error)
            code = error.code
        except RefusedPath as error:
            self.log(error)
            code = CAUSES["permission"]
        except ValueError as error:
            self.log("a record of the run is damaged: %s" % error)
            code = DATA
        self.is_over = True
        self.guard.say(over=1)
        self._close(code)
        try:
            return COMPLETE if self.n and self.run.is_complete() else code
        except OSError:
            return code

    def _serve(self) -> int:
        n, code = self.retry(lambda error: self._begin())
        if not n:
            return int(code)
        self._won(n)
        self.retry(lambda error: attempt_start.open_logs(self.run, n))
        outcome, unhealthy = self._first_attempt()
        while True:
            code = exit_code(outcome)
            step = self._decide(code, outcome, unhealthy)
            if step.do == HERE:
                step = self._prepare_next(step)
            if step.do != HERE:
                self._carry_out(step)
                return int(code)
            outcome, unhealthy = self._run_attempt(step.nodes)

    # -- BEGIN -----------------------------------------------------------------------------------------------------

    def _begin(self) -> Tuple[int, int]:
        """Win the next attempt; returns (its number, 0), or (0, the exit code) if none starts: the run is complete
        (Slurm may restart a finished job), cancelled, or submitted again as another job."""
        run = self.run
        if not exists(run.path):
            remedy = "Was it moved to the trash? Submit it again."
            raise ConfigError("the run directory does not exist", str(run.path), remedy=remedy)
        run.close()  # before it is read: then no other user can exchange it
        record = run.read_job()
        idle = attempt_start.reason_to_be_idle(run, self.options.token, record)
        if idle:
            self.log("%s: not started: %s" % (run.path, idle))
            if run.is_complete():
                self._settle_canary(DONE)
            return 0, COMPLETE
        abandoned = end_evidence.end_abandoned(run, self.scheduler, self.log)
        previous = attempts.current_end(run)
        if previous is not None and previous["action"] == "stop":
            self.log("%s: not started: %s" % (run.path, previous["reason"]))
            self._settle_canary(STOP)  # the owner that decided it may have been killed before it did this
            if abandoned:
                self._notify(STOP)
            return 0, CAUSES.get(previous["cause"], CAUSES["crash"])
        os.environ.pop(requeue.FOLLOWS, None)  # repeated after an error, this call finds the attempt that it has won
        run.refuse_other_version(record)
        self.nodes = nodes_of_job(record)
        self.canary.watch(canary.canary_of(record))
        n = attempts.start_attempt(run, attempt_start.start_record(self.nodes, self.nodes.most))
        self.scheduler.end_leftovers(run.path, n)
        return n, 0

    def _won(self, n: int) -> None:
        """This process has started attempt n."""
        self.n = n
        self._limit = None
        self.limit.look_soon()
        os.environ["FLIP_ATTEMPT"] = str(n)  # as all processes of the attempt have it
        self.guard.say(attempt=n)

    def _start_step(self, kind: str, nodes: int) -> None:
        self.processes.start_step(kind, nodes)
        self.processes.start_followers(self.options.trackers)

    def _start(self, *words: str) -> Any:
        argv = ["/bin/bash", self.options.script, *words]
        return self.scheduler.start_step(argv, os.environ, self.run.logs / str(self.n))

    # -- GATHER and RUN --------------------------------------------------------------------------------------------

    def _first_attempt(self) -> Tuple[AttemptOutcome, Dict[str, str]]:
        """Run the attempt that ``_begin`` has won; returns its outcome, and what ``exclude_unhealthy`` does."""
        if self.options.agents and self._open_pool():
            assert self.pool is not None
            self._start_step("agents", self.nodes.total)
            if self._gather_first(self.pool):
                return self._run_attempt(self.nodes.most)
            code = self.processes.code_of_step()
            if code not in (None, COMPLETE, NO_AGENTS):
                return AttemptOutcome(code, (), False, "the step of the node agents has ended"), {}
            self._do_without_agents(self.pool)
        return self._run_ranks(), {}

    def _open_pool(self) -> bool:
        """Whether agents can connect to this process."""
        pool = NodePool(
            self.run,
            self.nodes,
            self.wait,
            self.log,
            self._is_suspended,
            self._lost_nodes,
            lambda: not self.processes.has_step(),
            self.options.peer_seconds,
            self._serve_agents,
        )
        try:
            pool.open(self.n, self.scheduler.place_for_agents(self.nodes.total))
        except OSError as error:
            self.log("no node agents: %s" % error)
            return False
        self.pool = pool
        return True

    def _gather_first(self, pool: NodePool) -> bool:
        """Whether the agents of this start are ready, and their network is measured."""
        nodes = self.nodes.most
        if not pool.gather_first():
            return False
        if pool.exclude_unhealthy(nodes):
            return True
        pool.measure_network()
        pool.open_gathering()
        return pool.gather(nodes) >= nodes  # an agent may have been killed meanwhile, and comes back

    def _do_without_agents(self, pool: NodePool) -> None:
        """An agent cannot connect, and none has started ranks: their step ends, and srun starts the ranks."""
        ready = len(pool.coordinator.ready())
        self.log("%d of %d node agents are ready: srun starts the ranks, and each restart is a requeue" % (
            ready, self.nodes.total,
        ))  # fmt: skip
        pool.leave(NO_AGENTS)
        self.pool = None
        self.processes.end_step(self.wait)
        deletion.delete_file(self.run.attempt(self.n) / CONTACT)  # it would prove that agents have started the ranks

    def _run_attempt(self, nodes: int) -> Tuple[AttemptOutcome, Dict[str, str]]:
        """Run the attempt that was won on this number of nodes, by their agents."""
        assert self.pool is not None
        unhealthy = self.pool.exclude_unhealthy(nodes)
        if unhealthy:
            return AttemptOutcome(None, (), False, "nodes have failed their health check"), unhealthy
        if self._signal:  # it came before the agents could hear it
            self.processes.signal_step(self._signal)
        return self.pool.run_attempt(self.n, nodes), {}

    def _run_ranks(self) -> AttemptOutcome:
        """Run the attempt that was won as a step of ranks."""
        self._start_step("ranks", self.nodes.most)
        self.ranks = RankStep(self.run, self.n, self.processes.step, self.options.peer_seconds, self.log)
        while self.ranks.code() is None:
            self.wait(POLL_SECONDS)
        code = self.ranks.code()
        self.ranks = None
        return AttemptOutcome(code, (), False, "")

    def _is_suspended(self) -> bool:
        return self.scheduler.see().state == SUSPENDED

    def _lost_nodes(self, nodes: Sequence[str]) -> Sequence[str]:
        """Those of ``nodes`` that Slurm has taken out of the job. It is not asked if they would end the job."""
        if not self.nodes.is_elastic:
            return ()
        return self.scheduler.lost_nodes(nodes)

    # -- DECIDE ----------------------------------------------------------------------------------------------------

    def _decide(self, code: int, outcome: AttemptOutcome, unhealthy: Dict[str, str]) -> Step:
        """Decide what follows from the end of the attempt, and record it."""
        seen = self.see()
        noticed = time.time() - outcome.settling
        step: Step = self.retry(lambda error: self._record_end(code, seen, unhealthy, noticed, error))
        return step

    def _record_end(
        self, code: int, seen: JobSeen, unhealthy: Dict[str, str], noticed: float, error: Optional[OSError]
    ) -> Step:
        n = self.n
        if seen.state is not None:
            end_evidence.end_abandoned(self.run, self.scheduler, self.log, n)
        state = self._state_of_end(seen)
        self._evidence = end_evidence.evidence_of_end(self.run, n, code, state, seen, unhealthy, error)
        self._allocation = self._what_is_held(seen)
        step = attempts.record_step(self.run, n, self._evidence, noticed, True, self._allocation)
        self.log(json.dumps(step._asdict(), sort_keys=True), "job.out")
        return step

    def _state_of_end(self, seen: JobSeen) -> Optional[str]:
        """The state of the job as the rule reads it: this process runs, so a suspended job is about to be resumed. A
        job of ranks that goes on after it has lost a node (``--no-kill``) has lost one of theirs."""
        if not seen.is_ours:
            return seen.state
        if self.pool is None and seen.node_count is not None and seen.node_count < self.nodes.total:
            return "NODE_FAIL"
        return RUNNING

    def _what_is_held(self, seen: JobSeen) -> Allocation:
        """What is left of the nodes and of the time of the job."""
        refusal = self._why_not_here(seen)
        if refusal or self.pool is None:
            return Allocation(refusal=refusal or "srun starts the ranks")
        return Allocation(
            nodes=min(self.nodes.total, seen.node_count or self.nodes.total),
            usable=self.nodes.usable,
            seconds_left=seen.seconds_left,
            nodes_after_requeue=self.nodes.most,
            queued=seen.queued,
            seconds_needed=wall_limit.startup_seconds(self.run) + wall_limit.save_seconds(self.run),
            held=self._names_of_nodes(seen),
            excluded=tuple(self.pool.coordinator.excluded),
        )

    def _names_of_nodes(self, seen: JobSeen) -> Optional[Set[str]]:
        """The nodes that the job has, if that matters: asking costs time. None: unknown."""
        assert self.pool is not None
        if self.pool.coordinator.excluded or next_step(self._evidence).exclude:
            return self.scheduler.held_nodes(seen)
        return None

    def _why_not_here(self, seen: JobSeen) -> str:
        """Why no attempt may start in this job; empty if one may."""
        if self.is_over:
            return "Slurm ends the job"
        request = read_record(self.run.attempt(self.n) / "told.json") or {}
        if request.get("signal"):  # a lifeline that ends leaves none
            return "the run was asked to stop"
        if seen.state is None:
            return NO_ANSWER
        if not seen.is_ours:
            return "the state of the job: %s" % seen.state
        if self.pool is not None and not self.processes.has_step():
            return "the step of the node agents has ended"
        return ""

    # -- the next attempt in this job ------------------------------------------------------------------------------

    def _prepare_next(self, step: Step) -> Step:
        """Win the attempt that follows here when its nodes are ready; returns what follows if that has changed."""
        assert self.pool is not None
        self.log("%s: attempt %d: %s: %s" % (self.run.path, self.n, step.do, step.place))
        for node in step.exclude:
            self.pool.coordinator.exclude(node, "%s is excluded" % node)
        self.pool.open_gathering()
        self.pause(step.delay)
        self.pool.measure_network()
        if self.pool.gather(step.nodes) < step.nodes:
            self._allocation = self.pool.allocation_of_ready(self._allocation)
        changed: Step = self.retry(lambda error: self._win_next())
        return changed

    def _win_next(self) -> Step:
        """Win the next attempt if it may still start here."""
        if time.monotonic() - self._seen_at > STATE_SECONDS:
            self.see()
        evidence = self._evidence._replace(
            end=self._evidence.end._replace(state=self._state_of_end(self._seen)),
            complete=self.run.is_complete(),
            cancelled=exists(self.run.cancel),
            superseded=self.run.newest_attempt() > self.n,
        )
        step = next_step(evidence, self._allocation._replace(refusal=self._why_not_here(self._seen)))
        if step.cause == "cancelled":
            return attempts.record_cancel(self.run, self.n)
        if step.do != HERE:
            return step
        record = attempt_start.start_record(self.nodes, step.nodes)
        n = attempts.start_attempt(self.run, record, after=self.n)
        if not n:
            return next_step(evidence._replace(superseded=True))
        self._won(n)
        self.run.open_logs(n)
        return step

    # -- CLOSE -----------------------------------------------------------------------------------------------------

    def _carry_out(self, step: Step) -> None:
        """Do what was decided, unless the next attempt starts here."""
        if step.do == REQUEUE and not self.is_over:
            self._requeue(step, self.restart.avoided_nodes(step.exclude))
        elif step.do == LEAVE and step.delay >= 1 and self._seen.state == "PENDING":  # Slurm has requeued it
            problem = self.scheduler.delay_start(step.delay)
            if problem:
                self.log("%s: it starts again without the delay: %s" % (self.run.path, problem))
        elif step.do in (DONE, STOP):
            self._settle_canary(step.do)
            self._notify(step.do)

    def _settle_canary(self, action: str) -> None:
        held_jobs.settle(self.run, action, self.log, self.pause)

    def _notify(self, action: str) -> None:
        for problem in notify.send_events(self.run, action):
            self.log(problem)

    def _close(self, code: int) -> None:
        """Let agents, their step and the followers end."""
        if self.pool is not None:
            self.pool.leave(code)
            self.pool = None
            self.processes.end_step(self.wait)
        self.processes.end_followers(self.scheduler.pause)

    # -- the log ---------------------------------------------------------------------------------------------------

    def log(self, text: object, name: str = "job.err") -> None:
        """Write to the log of the attempt, which ``flip logs`` shows, else to that of the submission."""
        try:
            if self.n:
                with open_append(self.run.logs / str(self.n) / name, "utf-8") as file:
                    file.write("%s\n" % text)
                return
        except OSError:  # the disk may be full
            pass
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:
            pass


def parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description="Own a job from its start to its end.", epilog=EXAMPLE, formatter_class=formatter
    )
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("--token", help="submission that the job belongs to; a job of another does nothing")
    parser.add_argument("--script", required=True, help="the batch script: it starts steps and followers")
    parser.add_argument("--agents", action="store_true", help="start ranks by node agents")
    parser.add_argument("--tracker", action="append", default=[], metavar="NAME", help="start a follower for it")
    parser.add_argument("--peer-seconds", type=float, default=20.0, help="the most that peers of a failed rank get")
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    args = parser().parse_args(arguments)
    scrub_stderr()
    rank_entry.raise_limits()  # a connection per node
    options = JobOptions(args.token, args.agents, args.peer_seconds, args.tracker, args.script)
    owner = Owner(RunDir(args.run), options, SlurmScheduler())
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, owner.on_signal)
    return owner.serve()


if __name__ == "__main__":
    sys.exit(main())
