"""The agent of a node: one process that starts the ranks of its node, attempt by attempt, and reports their ends.

    python -m jobs.runtime.node_agent RUN_DIR MODULE --socket FD           # on this machine
    python -m jobs.runtime.node_agent RUN_DIR MODULE --connect HOST ...    # in a Slurm job: jobs/host/agents/entry.py

It imports torch and the trainer once, and forks each rank: a restart then costs about a second of processor time per
rank in place of three or four. The coordinator (``jobs/host/agents/coordinator.py``) decides which attempt starts.
``jobs/host/agents/channel.py`` has the messages. MODULE is what each rank executes; its ``PRELOAD`` names the modules
that it imports anyway.

- A fork is safe only while this process has one thread and has not touched a GPU. If either does not hold, ranks are
  started in a new interpreter instead, and the log says so.
- A rank leads a session of its own. When it ends, all of its processes are killed before its end is reported.
- A rank that was stopped (SIGSTOP) blocks its peers without end: after ``STOPPED_SECONDS`` it counts as hung.
- Signals of the cluster (SIGTERM, SIGUSR1, SIGUSR2) are passed on to the ranks, also to those that start later: the
  cluster sends them once.
- Where Slurm binds tasks to CPUs, each rank gets its share of those of this process.
- If the connection to the coordinator ends, the lifeline of the ranks ends with it: they save and stop, as after the
  death of a supervisor, and what is left after that is killed. If this process dies, the lifeline ends too.
"""

import argparse
import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from flip.common.shutdown import LIFELINE_VARIABLE, ORPHAN_GRACE_SECONDS, SIGNALS
from flip.files import deletion
from flip.files.creation import RefusedPath, open_append
from flip.runs import temporary_folders
from flip.runs.cgroup import memory_kills
from flip.runs.checks import UNKNOWN, Check
from flip.runs.errors import CAUSES
from flip.runs.rundir import RunDir, read_record, write_json
from jobs.host import sessions
from jobs.host.agents import contact
from jobs.host.agents.channel import (
    AGENT,
    CONTACT,
    COORDINATOR_GONE,
    GONE_CODE,
    NO_AGENTS,
    Channel,
    ChannelError,
    ConnectionLost,
    Message,
    take_key,
)  # fmt: skip
from jobs.host.agents.node_health import NETWORK
from jobs.host.processes import AGENT_VARIABLE
from jobs.host.rank_entry import unstarted_code
from jobs.runtime import check_process, health, network_check
from jobs.runtime.cpu_shares import share_of_cpus
from jobs.runtime.forked_rank import execute, preloads, why_unsafe_to_fork

BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.5  # between two looks at the states of ranks
KILL_SECONDS = 60.0  # for killed ranks to end
STOPPED_SECONDS = 2.0  # a suspended job continues agent and ranks within an instant, not at the same time
GREET_SECONDS = 600.0  # for a supervisor on this machine to answer, which may wait for a disk
SIGNAL_NAMES = {"TERM": signal.SIGTERM, "USR2": signal.SIGUSR2}
OUT_OF_MEMORY = (
    "out of memory: a process of this job was killed, at the memory limit of the job (--mem) or of this machine"
)
UNKNOWN_MESSAGE = "a message that is not known here: %s"


class RankProcess:
    """A rank that this process has started."""

    def __init__(self, rank: int, pid: int) -> None:
        self.rank = rank
        self.pid = pid
        self.start = sessions.start_time(pid)
        self.stopped_at: float | None = None
        """When it was first seen stopped, by the monotonic clock."""
        self.code: int | None = None
        """The code to report in place of its exit code, if this process ended it for a reason."""


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    agent = NodeAgent(RunDir(args.run), args.module, args.lifeline, is_local=not args.connect)
    agent.catch_signals()
    channel: Channel | None
    if args.connect:
        n = int(os.environ["FLIP_ATTEMPT"])
        channel = find_coordinator(agent.run, n, args.connect, contact.CONNECT_SECONDS, agent.has_term)
        if channel is None:
            return NO_AGENTS
    else:
        channel = Channel(socket.socket(fileno=args.socket), take_key(os.environ), AGENT)
        try:
            channel.greet(contact.own_facts(os.environ), GREET_SECONDS)
        except ChannelError as error:
            return without_coordinator(error)
    if channel.accepted:  # else it asks this agent to leave
        agent.preload()
        if args.connect:
            agent.start_check()
    return agent.serve(channel)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Start the ranks of a run on this node.")
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("module", metavar="MODULE", help="what each rank executes")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", type=int, help="descriptor of the connection to the coordinator")
    where.add_argument("--connect", nargs="+", metavar="HOST", help="addresses of the coordinator's host")
    parser.add_argument("--lifeline", type=int, help="descriptor of a socket that ends with the parent of this process")
    return parser


def find_coordinator(
    run: RunDir, n: int, hosts: Sequence[str], seconds: float, is_ending: Callable[[], bool] = lambda: False
) -> Channel | None:
    """Connect to the coordinator of the job whose first attempt is n, and say hello; None if that fails for
    ``seconds``, or once if ``is_ending``: if Slurm ends the job, this process is killed after KillWait, and its task
    must act before."""
    try:
        return contact.find_coordinator(run.attempt(n) / CONTACT, hosts, os.environ, seconds, is_ending)
    except contact.NoCoordinator as error:
        note(f"the coordinator of this job cannot be reached: {error}")
        return None


class NodeAgent:
    """See the module. ``module``: what each rank executes, as ``python -m MODULE RUN_DIR``. ``lifeline``: descriptor of
    a socket that ends with the parent of this process, if that is to be noticed; it gets COORDINATOR_GONE.
    ``is_local``: whether a later supervisor may adopt the ranks: their pids are recorded."""

    def __init__(self, run: RunDir, module: str, lifeline: int | None = None, is_local: bool = True) -> None:
        self.run = run
        self.module = module
        self._lifeline = lifeline
        self._is_local = is_local
        self._stop_signal = 0
        """The last signal of the cluster."""
        self.attempt = 0
        self.ranks: list[RankProcess] = []
        self.may_fork = False
        self._memory_kills = 0
        """Processes that were killed for memory before the ranks started, or for which a rank has a cause."""
        self._is_killing = False
        """Whether the coordinator has asked to kill the ranks of this attempt."""
        self._channel: Channel
        self._check: check_process.CheckProcess | None = None
        self._health: dict[str, dict[str, Any]] = {}
        """Name of each check of this node that is over -> its result."""
        self._is_ready = False
        """Whether the coordinator knows that ranks can start: the check of this node is over, as ready has its
        results."""
        self._rank_lifeline, self._held_rank_lifeline = os.pipe()
        self._woken, self._wake = os.pipe()
        self._beat_at = 0.0
        self._look_at = time.monotonic()
        self._code = CAUSES["crash"]
        self._end_by = float("inf")
        """When this process ends, with its ranks; set when the coordinator is gone."""

    # -- before the first message --------------------------------------------------------------------------------------

    def catch_signals(self) -> None:
        """Let signals interrupt the wait for messages. Handlers run in this process alone: ranks get their own."""
        os.set_blocking(self._wake, False)
        os.set_blocking(self._woken, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # jobs/host/rank_entry.py blocks them

    def has_term(self) -> bool:
        """Whether TERM was the last signal of the cluster so far."""
        self._forward_signals()
        return self._stop_signal == signal.SIGTERM

    def preload(self) -> None:
        """Import what the ranks need. Without it, or if it cannot be imported, ranks start in new interpreters."""
        before = dict(os.environ)
        # OpenBLAS starts its threads when it is loaded. Training does not use it.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        try:
            with _folder_of_imports():
                for name in preloads(self.module):
                    importlib.import_module(name)
        except ImportError as error:  # a rank reports it as the cause of its end
            note(f"ranks start in new interpreters: {error}")
            return
        finally:
            # Imports set variables: torch._dynamo a folder for compiled code, where ranks would keep theirs.
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
        gc.collect()
        gc.freeze()  # these objects stay shared with the ranks
        self.may_fork = True

    def start_check(self) -> None:
        """Check the health of this node, in a process of its own."""
        try:
            settings = health.HealthSettings(str(self.run.path), self._gpus())
            self._check = health.start(settings, self.may_fork and self._is_safe_to_fork())
        except (OSError, ValueError) as error:
            note(f"this node is not checked: {error}")

    def _gpus(self) -> int:
        """The GPUs of this node that the run has asked for."""
        job = read_record(self.run.path / "job.json") or {}
        return int(job.get("shape", {}).get("gpus", 0))

    # -- the loop ------------------------------------------------------------------------------------------------------

    def serve(self, channel: Channel) -> int:
        """Do what the coordinator asks, until it asks to leave, or is gone; returns the exit code."""
        self._channel = channel
        if self._check is None and channel.accepted:
            self._get_ready()
        while True:
            self._wait()
            if time.monotonic() < self._end_by:
                self._handle_messages()
            self._poll_check()
            self._forward_signals()
            self._reap()
            self._look_for_stopped()
            self._beat()
            if self._end_by < float("inf") and (not self.ranks or time.monotonic() >= self._end_by):
                self._end_check()
                self._kill_ranks()
                return self._code

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if self._end_by == float("inf"):
            events = select.POLLIN
            if self._channel.has_unsent:
                events |= select.POLLOUT
            poll.register(self._channel, events)
            if self._lifeline is not None:
                poll.register(self._lifeline, select.POLLIN)
            if self._check is not None:
                poll.register(self._check.output, select.POLLIN)
        ready = [handle for handle, _ in poll.poll(int(1000 * LOOK_SECONDS))]
        if self._lifeline in ready:
            self._end_without_task()

    def _handle_messages(self) -> None:
        if self._end_by < float("inf"):
            return
        try:
            self._channel.flush()
            messages, ended = self._channel.receive()
            for message in messages:
                if self._end_by == float("inf"):
                    self._obey(message)
        except ChannelError as error:
            ended = error
        if ended is not None and self._end_by == float("inf"):
            self._lose_coordinator(ended)

    def _obey(self, message: Message) -> None:
        """Raises ChannelError for a message that no coordinator of this run sends."""
        kind = message["is"]
        if kind == "network":
            self._start_network_check(message)
        elif kind == "start":
            self._start(message)
        elif kind == "signal":
            if message.get("signal") not in SIGNAL_NAMES:
                raise ChannelError(UNKNOWN_MESSAGE % message)
            self._signal(SIGNAL_NAMES[message["signal"]])
        elif kind == "kill":
            self._is_killing = True
            for rank in self.ranks:
                if message.get("reason"):
                    self._end_hung(rank, str(message["reason"]))
                sessions.kill_group(rank.pid)
        elif kind == "leave":
            self._code = int(message.get("code", 0))
            self._prepare_end(str(message.get("reason") or ""))
        else:
            raise ChannelError(UNKNOWN_MESSAGE % kind)

    def _start_network_check(self, message: Message) -> None:
        """Measure the network together with the other nodes."""
        self._end_check()
        try:
            if not self._is_safe_to_fork():
                raise OSError("this agent cannot fork")
            ranks = [int(rank) for rank in message["ranks"]]
            environments = [self._environment(message, rank, local_rank) for local_rank, rank in enumerate(ranks)]
            device = "cuda" if self._gpus() else "cpu"
            nodes = [str(node) for node in message["nodes"]]
            self._check = network_check.start(network_check.NetworkSettings(environments, device, nodes))
        except (OSError, ValueError) as error:
            self._health[NETWORK] = Check(UNKNOWN, str(error), name=NETWORK).as_json()
            self._send(**{"is": "health"}, health=list(self._health.values()))

    def _poll_check(self) -> None:
        """Report the results of a check when it is over: the first ones in ready."""
        if self._check is None or not self._check.poll():
            return
        self._health.update(self._check.rows())
        self._end_check()
        if self._is_ready:
            self._send(**{"is": "health"}, health=list(self._health.values()))
        else:
            self._get_ready()

    def _get_ready(self) -> None:
        """Report that ranks can start. ``network``: whether this process can measure it. In a new interpreter the
        import of torch takes too long."""
        self._is_ready = True
        can_measure = self.may_fork and "torch" in sys.modules
        self._send(**{"is": "ready"}, network=can_measure, health=list(self._health.values()))

    def _end_check(self) -> None:
        if self._check is not None:
            self._check.close()
            self._check = None

    def _prepare_end(self, reason: str) -> None:
        """Let the ranks save and stop, then end."""
        if reason:
            note(reason)
        self._channel.close()
        os.close(self._held_rank_lifeline)
        self._end_by = time.monotonic() + ORPHAN_GRACE_SECONDS + 5.0

    def _end_without_task(self) -> None:
        """End after the death of the task of this agent. The ranks are killed before the coordinator notices it, and
        starts the next attempt."""
        self._end_by = time.monotonic() + KILL_SECONDS
        self._kill_ranks()
        while self.ranks and time.monotonic() < self._end_by:
            self._reap()
            time.sleep(0.01)
        self._prepare_end("its task is gone")

    def _send(self, **message: Any) -> None:
        if self._end_by < float("inf"):
            return
        try:
            self._channel.send(message)
        except ChannelError as error:
            self._lose_coordinator(error)

    def _lose_coordinator(self, reason: ChannelError) -> None:
        self._code = without_coordinator(reason)
        if self._code == GONE_CODE and self._lifeline is not None:
            with contextlib.suppress(OSError):  # the task has ended
                os.write(self._lifeline, COORDINATOR_GONE)
        self._prepare_end("")

    def _beat(self) -> None:
        if self._is_ready and time.monotonic() >= self._beat_at:
            self._beat_at = time.monotonic() + BEAT_SECONDS
            self._send(**{"is": "beat"})

    # -- ranks ---------------------------------------------------------------------------------------------------------

    def _start(self, message: Message) -> None:
        """Start the ranks of an attempt. Those that cannot be started are reported as ended."""
        attempt = int(message["attempt"])
        if attempt <= self.attempt or self.ranks:
            raise ChannelError(f"attempt {attempt} after {self.attempt}: another coordinator started that")
        self._end_check()  # the coordinator has stopped waiting for it, and it may hold GPUs
        self.attempt = attempt
        self._is_killing = False
        self._memory_kills = memory_kills()
        if self.may_fork:
            self.may_fork = self._is_safe_to_fork()
        numbers = [int(rank) for rank in message["ranks"]]
        logs: list[int] = []
        try:
            self._open_logs(int(message["node"]), logs)
            for local_rank, rank in enumerate(numbers):
                environ = self._environment(message, rank, local_rank)
                cpus = share_of_cpus(local_rank, len(numbers), os.environ)
                self.ranks.append(RankProcess(rank, self._fork(environ, logs, cpus)))
                self._record_pids()  # after each, so that whoever adopts them knows as many as possible
            if self._stop_signal:
                self._signal(self._stop_signal)
        except OSError as error:
            self._report_unstarted(numbers[len(self.ranks) :], error)
        finally:
            for handle in logs:
                os.close(handle)

    def _is_safe_to_fork(self) -> bool:
        reason = why_unsafe_to_fork()
        if reason:
            note(f"ranks start in new interpreters: {reason}")
        return not reason

    def _open_logs(self, node: int, handles: list[int]) -> None:
        """Append descriptors of the files of standard output and error of this node's ranks."""
        folder = self.run.logs / str(self.attempt)
        for name in (f"node{node}.out", f"node{node}.err"):
            with open_append(folder / name) as file:
                handles.append(os.dup(file.fileno()))

    def _environment(self, message: Message, rank: int, local_rank: int) -> dict[str, str]:
        environ = {key: value for key, value in os.environ.items() if key != AGENT_VARIABLE}
        own = {
            "FLIP_RUN": str(self.run.path),
            "FLIP_ATTEMPT": str(self.attempt),
            LIFELINE_VARIABLE: str(self._rank_lifeline),
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "NODE_RANK": str(message["node"]),
            "WORLD_SIZE": str(message["world"]),
            "LOCAL_WORLD_SIZE": str(len(message["ranks"])),
        }
        if "SLURM_PROCID" in environ:  # as in a step with a task per rank
            own |= {"SLURM_PROCID": own["RANK"], "SLURM_LOCALID": own["LOCAL_RANK"], "SLURM_NTASKS": own["WORLD_SIZE"]}
        return {**environ, **{str(k): str(v) for k, v in message.get("environment", {}).items()}, **own}

    def _fork(self, environ: Mapping[str, str], logs: Sequence[int], cpus: Collection[int] = ()) -> int:
        """Start a rank; returns its pid. It starts with the signals that stop a run blocked: they stay pending until
        the rank handles them."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_rank(environ, logs, cpus)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid

    def _become_rank(self, environ: Mapping[str, str], logs: Sequence[int], cpus: Collection[int]) -> NoReturn:
        """In the child: leave all that belongs to the agent, and execute the module."""
        code = 1
        try:
            os.setsid()
            if cpus:
                os.sched_setaffinity(0, cpus)
            signal.set_wakeup_fd(-1)
            for number in (*SIGNALS, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            for handle in (self._held_rank_lifeline, self._woken, self._wake, self._channel.fileno(), self._lifeline):
                if handle is not None:
                    os.close(handle)
            for target, handle in enumerate(logs, 1):
                os.dup2(handle, target)
                os.close(handle)
            if not self.may_fork:
                os.set_inheritable(self._rank_lifeline, True)
                command = [sys.executable, "-m", self.module, str(self.run.path)]
                os.execve(sys.executable, command, dict(environ))
            os.environ.clear()
            os.environ.update(environ)
            code = execute(self.module, str(self.run.path))
        except BaseException:  # whatever happens here must not continue as a second agent
            traceback.print_exc()
        finally:
            os._exit(code)

    def _record_pids(self) -> None:
        if not self._is_local:
            return
        rows = [{"rank": rank.rank, "pid": rank.pid, "start": rank.start} for rank in self.ranks]
        write_json(self.run.attempt(self.attempt) / "pids.json", rows)

    def _report_unstarted(self, numbers: Sequence[int], error: OSError) -> None:
        """A full disk, no more processes: storage, which is tried again. A prepared path: permission."""
        cause = "storage"
        code = unstarted_code(error)
        if isinstance(error, RefusedPath):
            cause = "permission"
            code = CAUSES[cause]
        note(f"ranks {list(numbers)} cannot start: {error}")
        for rank in numbers:
            with contextlib.suppress(OSError):  # the code says enough
                self.run.write_cause(self.attempt, rank, cause, CAUSES[cause], f"it cannot start: {error}")
            self._send(**{"is": "exit"}, attempt=self.attempt, rank=rank, code=code)

    def _forward_signals(self) -> None:
        try:
            numbers = os.read(self._woken, 4096)
        except BlockingIOError:
            return
        for number in dict.fromkeys(numbers):
            if number in SIGNALS:
                self._stop_signal = number
                self._signal(number)

    def _signal(self, number: int) -> None:
        for rank in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)

    def _reap(self) -> None:
        for rank in list(self.ranks):
            if os.waitid(os.P_PID, rank.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                continue
            sessions.kill_group(rank.pid)  # while it is a zombie, no other process can have the number of its group
            _, status = os.waitpid(rank.pid, 0)
            sessions.kill_session(rank.pid, rank.start)
            self.ranks.remove(rank)
            code = os.waitstatus_to_exitcode(status)
            killed = code < 0
            if killed:
                code = 128 - code
            if rank.code is not None:
                code = rank.code
            elif status == signal.SIGKILL and not self._is_killing:
                self._look_for_memory_kill(rank)
            if not self.ranks:  # those that were killed have left theirs
                temporary_folders.delete_left(self.run, self.attempt)
            self._send(**{"is": "exit"}, attempt=self.attempt, rank=rank.rank, code=code, killed=killed)

    def _look_for_memory_kill(self, rank: RankProcess) -> None:
        """Record the cause of a rank that was killed, if the kernel has killed a process for memory.

        srun says so at the end of the job alone, of which this attempt need not be the last one.
        """
        kills = memory_kills()
        if kills <= self._memory_kills:
            return
        self._memory_kills = kills
        evidence = {"host": contact.own_facts(os.environ)["node"], "out_of_memory": True}
        with contextlib.suppress(OSError):
            self.run.write_cause(self.attempt, rank.rank, "crash", CAUSES["crash"], OUT_OF_MEMORY, **evidence)

    def _look_for_stopped(self) -> None:
        """Kill ranks that have been stopped by a signal for a while."""
        now = time.monotonic()
        if now < self._look_at:
            return
        was_stopped = now - self._look_at > STOPPED_SECONDS  # this process, perhaps with the ranks
        self._look_at = now + LOOK_SECONDS
        for rank in self.ranks:
            if was_stopped or not sessions.is_stopped(rank.pid):
                rank.stopped_at = None
            elif rank.stopped_at is None:
                rank.stopped_at = now
            elif now - rank.stopped_at >= STOPPED_SECONDS and rank.code is None:
                self._end_hung(rank, f"its process was stopped by a signal (SIGSTOP) for {STOPPED_SECONDS:g} s")

    def _end_hung(self, rank: RankProcess, reason: str) -> None:
        rank.code = CAUSES["hang"]
        with contextlib.suppress(OSError):  # the code says it too
            self.run.write_cause(self.attempt, rank.rank, "hang", rank.code, reason)
        sessions.kill_group(rank.pid)

    def _kill_ranks(self) -> None:
        for rank in self.ranks:
            sessions.kill_session(rank.pid, rank.start)


@contextlib.contextmanager
def _folder_of_imports() -> Iterator[None]:
    """The folder for compiled code that torch._dynamo creates when it is imported; its default stays for good."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="flip-import-"))
        temporary_folders.claim(folder)
    except OSError:  # a full disk: ranks report it
        yield
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    try:
        yield
    finally:
        deletion.discard_own_folder(folder)


def without_coordinator(reason: ChannelError) -> int:
    """The exit code of an agent that has lost its coordinator; notes why."""
    note(f"the coordinator is gone: {reason}")
    if isinstance(reason, ConnectionLost):
        return GONE_CODE
    return CAUSES["crash"]


def note(text: str) -> None:
    """Print, if possible: the disk may be full."""
    with contextlib.suppress(OSError):
        print(f"node agent: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # the interpreter would take long to unload torch
