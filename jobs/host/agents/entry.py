"""Starts the node agent of a Slurm task, again if it is killed, and leaves no process behind.

A task of an agents' step runs ``rank_entry.py``, which calls ``supervise``. The task must outlive its agent: Slurm does
not start it again. It inherits the orphans of its agent (PR_SET_CHILD_SUBREAPER), so that it can kill the ranks of a
killed agent before the next agent starts: two attempts never run at once. Standard library, Python >= 3.6.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from typing import Callable, Dict, List, Mapping, Optional, Sequence

from flip.runs.errors import CRASH
from jobs.host import processes, sessions
from jobs.host.agents.channel import COORDINATOR_GONE, GONE_CODE, NO_AGENTS

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
MOST_STARTS = 10
"""Starts of an agent in one job."""

POLL_SECONDS = 0.2
ASK_SECONDS = 2.0  # between two queries of a job that Slurm may be ending
KILL_SECONDS = 60.0  # for killed processes to end; one that waits for a dead disk or GPU is left to Slurm
STOPPED_SECONDS = 2.0  # a suspended job continues this process and the agent within an instant, not at the same time


def supervise(module: str, hosts: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run the agent of this node until it ends; returns its exit code. The signals of the cluster are blocked here.

    ``module``: what each rank executes. ``hosts``: addresses of the coordinator. ``environ``: of the agent.
    """
    own = dict(environ, **{processes.AGENT_VARIABLE: "1"})
    may_restart = processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)  # become the parent of orphans
    stop: List[int] = []  # the last signal of the cluster
    starts = 0
    while True:
        lifeline, held_lifeline = socket.socketpair()
        command = agent_command(module, hosts, own) + ["--lifeline", str(lifeline.fileno())]
        agent = subprocess.Popen(command, env=own, stdin=subprocess.DEVNULL, pass_fds=[lifeline.fileno()])
        lifeline.close()
        starts += 1
        for number in stop:  # it stays pending until the agent handles it
            agent.send_signal(number)
        code = _wait(agent, stop, EarlyRestart(held_lifeline, stop, own).poll)
        held_lifeline.close()
        are_gone = may_restart and kill_children()
        if code in (GONE_CODE, NO_AGENTS):
            _restart_if_orphaned(own)
        if code == GONE_CODE:
            return CRASH
        if code >= 0:
            return code
        _note("the node agent was killed by signal %d" % -code)
        if not are_gone or starts >= MOST_STARTS:
            return 128 - code


class EarlyRestart:
    """Restarts the job at TERM if the coordinator is gone and nothing else restarts the job, while the ranks save:
    Slurm kills this process after KillWait.

    ``lifeline``: the agent writes COORDINATOR_GONE to it. ``stop``: the last signal of the cluster.
    """

    def __init__(self, lifeline: socket.socket, stop: Sequence[int], environ: Mapping[str, str]) -> None:
        self._lifeline = lifeline
        self._lifeline.setblocking(False)
        self._stop = stop
        self._environ = environ
        self._ask_at = 0.0
        """When to ask Slurm, by the monotonic clock."""

    def poll(self) -> None:
        """Look for TERM and for the end of the coordinator, and act once both have come."""
        if signal.SIGTERM not in self._stop or time.monotonic() < self._ask_at or not self._has_lost_coordinator():
            return
        from jobs.host.agents import orphaned_task

        what = orphaned_task.restart_if_ending(self._environ)
        if what:
            _note(what)
            self._ask_at = float("inf")
        else:
            self._ask_at = time.monotonic() + ASK_SECONDS

    def _has_lost_coordinator(self) -> bool:
        try:
            return self._lifeline.recv(len(COORDINATOR_GONE), socket.MSG_PEEK) == COORDINATOR_GONE
        except OSError:  # nothing was written, or the agent has ended
            return False


def _restart_if_orphaned(environ: Mapping[str, str]) -> None:
    """Restart the job if the coordinator is gone, or cannot be reached, and nothing else restarts the job."""
    from jobs.host.agents import orphaned_task  # here, so that no other start of a rank imports the queries of Slurm

    _note(orphaned_task.restart_if_orphaned(environ))
    what = orphaned_task.restart_if_forgotten(environ)
    if what:
        _note(what)


def agent_command(module: str, hosts: Sequence[str], environ: Mapping[str, str]) -> List[str]:
    """The command line of the agent, which is of the run's code."""
    return [sys.executable, "-m", "jobs.runtime.node_agent", environ["FLIP_RUN"], module, "--connect"] + list(hosts)


def _wait(agent: "subprocess.Popen[bytes]", stop: List[int], poll: Callable[[], None] = lambda: None) -> int:
    """Wait for the end of the agent, pass signals of the cluster on to it, and kill it if it is stopped (SIGSTOP).

    Returns its exit code, or minus the number of the signal that killed it. ``poll`` is called all the time.
    """
    stopped_at: Optional[float] = None
    looked_at = time.monotonic()
    while True:
        received = signal.sigtimedwait(SIGNALS, POLL_SECONDS)
        code = agent.poll()
        # Python returns without a signal, and with arbitrary numbers, if this process was stopped during the call
        if received is not None and received.si_signo in SIGNALS:
            stop[:] = [received.si_signo]
            if code is None:
                agent.send_signal(received.si_signo)
        if code is not None:
            return code
        poll()
        now = time.monotonic()
        was_stopped = now - looked_at > STOPPED_SECONDS  # this process, perhaps with the agent
        looked_at = now
        if was_stopped or not sessions.is_stopped(agent.pid):
            stopped_at = None
        elif stopped_at is None:
            stopped_at = now
        elif now - stopped_at > STOPPED_SECONDS:
            agent.kill()


def kill_children(seconds: float = KILL_SECONDS) -> bool:
    """SIGKILL all descendants of this process, and wait for their ends; returns whether none is left."""
    deadline = time.monotonic() + seconds
    while True:
        for pid, start in _children().items():
            sessions.kill_session(pid, start)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)


def _children() -> Dict[int, str]:
    """Pid of each child of this process -> its start time."""
    children = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and processes.read_stat(int(name))[1][1:2] == [str(os.getpid())]:
            children[int(name)] = processes.start_time(int(name))
    return children


def _note(text: str) -> None:
    try:
        print("%s: %s" % (os.environ.get("SLURMD_NODENAME", ""), text), file=sys.stderr, flush=True)
    except OSError:  # the disk may be full
        pass
