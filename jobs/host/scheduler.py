"""What the owner of a job (``job.py``) needs of a scheduler: ``Scheduler``, and ``SlurmScheduler`` behind it.

Standard library, Python >= 3.6.
"""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from flip.files.creation import open_append
from flip.runs import node_address
from flip.runs.restart_policy import UNKNOWN
from flip.runs.wall_limit import TimeUsed
from jobs.host import failed_starts, own_job, processes, rank_entry, requeue, slurm_cli
from jobs.host.failed_starts import FailedStarts
from jobs.host.node_list import last_host

LOOPBACK = "127.0.0.1"
RUNNING = "RUNNING"
SUSPENDED = "SUSPENDED"  # Slurm has stopped the processes of the job (scontrol suspend, gang scheduling)
LEFT = "left"  # of ``JobSeen.ending``

#: States of a job on which attempts may start: a process of a suspended job that runs is about to be resumed.
ON_ITS_NODES = (RUNNING, SUSPENDED)


class JobSeen(NamedTuple):
    """What the scheduler shows of this start of the job."""

    state: Optional[str] = None
    """As ``restart_policy`` reads it; None: no answer."""
    used: Optional[TimeUsed] = None
    limit: Optional[int] = None
    """The wall limit in seconds; None: none, or unknown."""
    seconds_left: Optional[float] = None
    """Until the wall limit; None: none, or unknown."""
    queued: float = 0.0
    """Seconds for which this start waited in the queue."""
    node_list: str = ""
    """The nodes that the job has now, in the scheduler's words; empty: unknown."""
    node_count: Optional[int] = None
    """Their number; None: unknown."""
    failed: Optional[FailedStarts] = None
    """What earlier starts of the job left; None: no answer."""
    ending: str = ""
    """One of ``own_job.ENDS_AROUND_RANKS`` if the job ends for that; LEFT if it ends otherwise, or was requeued."""

    @property
    def is_ours(self) -> bool:
        """Whether the job runs this start."""
        return self.state in ON_ITS_NODES


class Scheduler:
    """One start of a job, as its scheduler knows it."""

    can_restart = True
    """Whether ``requeue`` can do something."""
    sleep: Optional[Callable[[float], Any]] = None
    """How ``requeue`` waits between two tries, for up to half a day; None: time.sleep. The owner looks at its job
    meanwhile: its wall limit may come."""

    def see(self, deadline: float = slurm_cli.DEADLINE) -> JobSeen:
        """The job now. ``deadline``: seconds for an answer."""
        raise NotImplementedError

    def requeue(
        self,
        delay: float,
        exclude: Optional[Sequence[str]],
        attempt: Optional[int],
        urgent: bool = False,
        failed: Optional[FailedStarts] = None,
    ) -> str:
        """Start the job again in ``delay`` seconds; returns what happened.

        ``exclude``: all nodes that it avoids from now on; None: as before. ``attempt``: the newest of this start.
        ``urgent``: the scheduler is ending the job at this moment. ``failed``: this start counts as a failed one.
        Raises SlurmUnavailable, or SuccessorRefused if the scheduler does not requeue jobs.
        """
        raise NotImplementedError

    def held_nodes(self, seen: JobSeen) -> Optional[Set[str]]:
        """Names of the nodes that the job had when it was seen; None: unknown."""
        raise NotImplementedError

    def lost_nodes(self, nodes: Sequence[str]) -> Sequence[str]:
        """Those of ``nodes`` that the job, which runs, has no longer; empty without an answer in a short time."""
        seen = self.see(slurm_cli.SHORT_DEADLINE)
        if seen.state != RUNNING:
            return ()
        held = self.held_nodes(seen)
        if held is None:
            return ()
        return [node for node in nodes if node not in held]

    def delay_start(self, delay: float) -> str:
        """Let the job, which the scheduler has requeued, start in ``delay`` seconds; returns an error or ""."""
        raise NotImplementedError

    def note_failed_start(self, failed: FailedStarts, patience: float = 0.0) -> None:
        """Keep this for the next start, which reads it as ``JobSeen.failed``."""
        raise NotImplementedError

    def nodes_without(self, node: str, previous: str) -> Optional[Sequence[str]]:
        """What the job excludes if it avoids ``node`` in place of ``previous``; None: as before."""
        raise NotImplementedError

    def end_leftovers(self, path: Path, n: int) -> None:
        """End processes on this host of attempts before ``n`` of the run at ``path``."""
        raise NotImplementedError

    def place_for_agents(self, nodes: int) -> Tuple[str, int]:
        """(address, first port) at which the agents of this many nodes reach this host."""
        raise NotImplementedError

    def pause(self, seconds: float) -> None:
        """Wait for this time, or less if a process of ``start_step`` ends."""
        time.sleep(seconds)

    def start_step(self, argv: Sequence[str], environ: Mapping[str, str], logs: Path, name: str = "job") -> Any:
        """Start a process, as subprocess.Popen, whose output goes to NAME.out and NAME.err in ``logs``.

        Raises OSError.
        """
        raise NotImplementedError


class SlurmScheduler(Scheduler):
    """The Slurm job of this process. Outside of one nothing can be restarted."""

    def __init__(self) -> None:
        self.job = own_job.own_job(os.environ)
        self.restarts = own_job.restart_count(os.environ)
        self.can_restart = bool(self.job)
        self._fields: Dict[str, str] = {}
        """Of the last answer."""

    def see(self, deadline: float = slurm_cli.DEADLINE) -> JobSeen:
        if not self.job:
            return JobSeen(UNKNOWN, failed=FailedStarts())
        fields: Dict[str, str] = {}
        state = own_job.job_state(self.job, self.restarts, deadline, fields)
        self._fields = fields
        if not fields:
            return JobSeen(state)
        elapsed = slurm_cli.parse_duration(fields.get("RunTime", ""))
        limit = slurm_cli.parse_duration(fields.get("TimeLimit", ""))
        left = None
        if elapsed is not None and limit is not None:
            left = float(limit - elapsed)
        return JobSeen(
            state,
            own_job.time_used(fields),
            limit,
            left,
            own_job.seconds_queued(fields),
            fields.get("NodeList", ""),
            slurm_cli.parse_int(fields.get("NumNodes", "")),
            failed_starts.before(fields, self.restarts),
            _ending(fields, state),
        )

    def requeue(
        self,
        delay: float,
        exclude: Optional[Sequence[str]],
        attempt: Optional[int],
        urgent: bool = False,
        failed: Optional[FailedStarts] = None,
    ) -> str:
        return requeue.restart(self.job, self.restarts, delay, exclude, attempt, urgent, failed, self.sleep)

    def held_nodes(self, seen: JobSeen) -> Optional[Set[str]]:
        """A list without the node of this process says nothing of others."""
        if not seen.node_list:
            return None
        try:
            held = set(slurm_cli.host_names(seen.node_list))
        except slurm_cli.SlurmUnavailable:
            return None
        if os.environ.get("SLURMD_NODENAME") not in held:
            return None
        return held

    def delay_start(self, delay: float) -> str:
        return requeue.delay_start(self.job, delay)

    def note_failed_start(self, failed: FailedStarts, patience: float = 0.0) -> None:
        failed_starts.record_failed_starts(self.job, self.restarts, failed, patience)

    def nodes_without(self, node: str, previous: str) -> Optional[Sequence[str]]:
        return requeue.exclude_failed_node(self._fields, node, previous)

    def end_leftovers(self, path: Path, n: int) -> None:
        processes.kill_orphans(str(path), n, self.job, self.restarts)

    def place_for_agents(self, nodes: int) -> Tuple[str, int]:
        return listening_address(nodes, os.environ), rank_entry.port(os.environ.get("SLURM_JOB_ID", ""), "agents")

    def start_step(self, argv: Sequence[str], environ: Mapping[str, str], logs: Path, name: str = "job") -> Any:
        with open_append(logs / (name + ".out")) as output, open_append(logs / (name + ".err")) as errors:
            return subprocess.Popen(
                list(argv),
                env=dict(environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                preexec_fn=_reset_signals,
            )


def _reset_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _ending(fields: Mapping[str, str], state: Optional[str]) -> str:
    """See ``JobSeen.ending``."""
    if state == "PENDING":
        return LEFT
    if fields.get("JobState", "") in slurm_cli.ON_NODES + ("CONFIGURING",):
        return ""
    return own_job.end_around_ranks(fields) or LEFT


def listening_address(nodes: int, environ: Mapping[str, str]) -> str:
    """The address at which agents reach this node, the first of the job. Empty, for all addresses, if it is not known.

    It is that of the profile's master_addr, else the one from which this node reaches the last one.
    """
    if nodes == 1:
        return LOOPBACK
    chosen = node_address.address_here(environ.get("MASTER_ADDR") or "")
    if chosen and not rank_entry.is_loopback(chosen):
        return chosen
    peer = last_host(environ.get("SLURM_JOB_NODELIST", ""))
    if not peer:
        return ""
    for find in (str, _node_address):  # Slurm may have another name for a node than the network
        try:
            return rank_entry.own_address(find(peer))
        except (slurm_cli.SlurmUnavailable, OSError, UnicodeError):
            continue
    return ""


def _node_address(node: str) -> str:
    """Slurm's address of a node. Raises SlurmUnavailable."""
    text = slurm_cli.call("scontrol", "show", "node", node, deadline=slurm_cli.SHORT_DEADLINE)
    return slurm_cli.fields_of(text).get("NodeAddr", node)
