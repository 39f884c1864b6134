"""The coordinator of the node agents of a Slurm job: starts the attempts of its run, and restarts it in the same job.

It runs in a thread of the watcher (``batch_hooks.py watch --agents``), on the first node. `begin` has won the first
attempt; the coordinator wins the others, by the same records and with the same policy as the exit trap. What it does
not decide it leaves to the trap, as ever: attempts that were asked to stop, a job that Slurm ends, a run that ends.

The next attempt starts when all ranks of the last one have ended or their agent is lost, when each of its nodes has an
agent (a killed agent is replaced after its ranks were killed: ``entry.py``), when Slurm still runs this start of the
job, and if no other process has won an attempt since. Ranks that are only cut off see its start, stop and commit
nothing (``flip.distributed.shutdown``, ``flip.checkpoint.saver``).
"""

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Set, Tuple

from flip.files.creation import open_append
from flip.runs import attempts, wall_limit
from flip.runs.errors import STORAGE
from flip.runs.next_step import HERE, Allocation, Step, too_slow
from flip.runs.restart_policy import NODE_LOST
from flip.runs.rundir import RunDir, exists, read_record
from jobs.host import attempt_end, lost_step, own_job, rank_entry, slurm_cli
from jobs.host.agents import node_health
from jobs.host.agents.channel import CONTACT, listen, new_key, peer_address, publish
from jobs.host.agents.coordinator import NO_AGENTS, SUCCESS, TIMING, Agent, AttemptOutcome, Coordinator, State
from jobs.host.agents.server import AgentServer
from jobs.host.node_list import last_host

LOOPBACK = "127.0.0.1"
POLL_SECONDS = 0.2
CONNECT_SECONDS = 75.0  # from the first agent to the last one; an agent tries for 60 s
IMPORT_SECONDS = 600.0  # for agents to import torch and the trainer, from a cold file system
RETURN_SECONDS = 60.0  # for a killed agent to be replaced
STALL_SECONDS = 120.0  # for which an agent may wait for a disk; its death is seen at once, by the end of its connection
STATE_SECONDS = 5.0  # for which an answer of Slurm counts; a wait and the return of an agent may take minutes
NETWORK_SECONDS = 9.5  # for agents to measure the network; their processes end after 8 s
LEAVE_SECONDS = 10.0  # for agents without ranks to end
SUSPENDED = "SUSPENDED"  # state of a job whose processes Slurm has stopped (scontrol suspend, gang scheduling)
NO_ANSWER = "Slurm does not show the state of the job"

TIMINGS = TIMING._replace(
    first_patience=IMPORT_SECONDS,
    patience=RETURN_SECONDS,
    ready=IMPORT_SECONDS,
    silence=STALL_SECONDS,
    kill=STALL_SECONDS,
)


class JobCoordinator:
    """Serves the agents of this start of this job.

    ``log``: prints what cannot be written to job.err of the attempt.
    ``find``: returns the first attempt of this start, 0 while there is none. ``on_attempt``: called with the number of
    each further attempt. ``on_end``: called with the exit code of the agents before they are asked to leave.
    ``facts``: what start.json says of the job. ``peer_seconds``: the most that the peers of a failed rank get; None: as
    ``TIMING``.
    """

    def __init__(
        self,
        run: RunDir,
        start: attempt_end.Start,
        find: Callable[[], int],
        on_attempt: Callable[[int], None],
        on_end: Callable[[int], None],
        facts: Callable[[], Dict[str, str]],
        log: Callable[[object], None],
        peer_seconds: Optional[float] = None,
    ) -> None:
        self.run = run
        self.start = start
        self.nodes = int(os.environ.get("SLURM_JOB_NUM_NODES") or 1)
        self.usable = [self.nodes]
        """Numbers of nodes with which the run can go on, ascending: one, or those of its range. Others are spares."""
        self.is_elastic = False
        """Whether the job goes on without a lost node (--no-kill): it has spare nodes, or a range."""
        self.ranks_per_node = int(os.environ.get("SLURM_NTASKS") or 1) // self.nodes
        self.may_restart = True
        """Cleared when the batch shell is gone, and its watcher requeues the job."""
        self.has_started = False
        """Whether agents have started an attempt."""
        self.attempt = 0
        self._find = find
        self._on_attempt = on_attempt
        self._on_end = on_end
        self._facts = facts
        self._print = log
        self._fields: Dict[str, str] = {}
        """What Slurm has said of the job at the end of the last attempt."""
        self._asked_at = float("-inf")
        self._suspended = False
        self._timing = TIMINGS
        if peer_seconds is not None:
            self._timing = TIMINGS._replace(
                peer_grace=min(TIMINGS.peer_grace, peer_seconds), killed_grace=min(TIMINGS.killed_grace, peer_seconds)
            )
        self._health: Dict[str, Sequence[node_health.NodeCheck]] = {}
        """The results of all nodes of this start, also of those that were left out or lost."""
        self._verdict = node_health.judge({})
        """The last one that was logged."""
        self._on_network: Set[str] = set()
        """Nodes that have measured the network together."""
        self._thread = threading.Thread(target=self._serve, name="coordinator", daemon=True)

    def start_thread(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Return when all agents were asked to leave, and the exit trap decides."""
        self._thread.join()

    @property
    def is_active(self) -> bool:
        """Whether ranks are started by agents, and may still be."""
        return self.has_started and self._thread.is_alive()

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        self.attempt = self._find()
        while not self.attempt:
            time.sleep(POLL_SECONDS)
            self.attempt = self._find()
        try:
            self._read_job()
        except (OSError, ValueError) as error:
            self._log("no node agents: %s" % error)
            return
        first = self.attempt
        self.coordinator = Coordinator(
            self._timing,
            log=self._log,
            is_suspended=self._is_suspended,
            lost_nodes=self._lost_nodes,
        )
        key = new_key()
        host = listening_address(self.nodes, os.environ)
        first_port = rank_entry.port(os.environ.get("SLURM_JOB_ID", ""), "agents")
        try:
            listener = listen(host, first_port, rank_entry.PORTS[1])
        except OSError as error:
            self._log("no node agents: %s" % error)
            return
        self.server = AgentServer(self.coordinator, key, listener, self._log)
        try:
            self._publish(self.run.attempt(self.attempt) / CONTACT, host, listener.getsockname()[1], key)
            code, reason = self._run_attempts()
            self._log("%s: node agents end: %s" % (self.run.path, reason))
            self._on_end(code)
            self.coordinator.leave(code)
            seconds = LEAVE_SECONDS
            if code == NO_AGENTS:  # agents that import the trainer must learn that srun is to start the ranks
                seconds = IMPORT_SECONDS
            deadline = time.monotonic() + seconds
            while self.coordinator.agents and time.monotonic() < deadline:
                self.server.poll(POLL_SECONDS)
            # without agents, srun goes on with the ranks
            is_over = not self.coordinator.agents and code != NO_AGENTS
        finally:  # after an error, agents let their ranks save
            self.server.close()
        if is_over:
            self._end_step(first)

    def _end_step(self, first: int) -> None:
        """End the srun of the agents, unless it ends, and this process with it, shortly after they have left.

        It waits for the task of a lost node until Slurm notices the loss, for ever if the node is back before that.
        ``first``: the attempt that has started it.
        """
        time.sleep(lost_step.AFTER_AGENTS_SECONDS)
        if lost_step.kill_srun(self.run, first):
            self._log("srun was killed: all node agents have left, and Slurm did not notice the end of a lost one")

    def _read_job(self) -> None:
        """Read which numbers of nodes can be used. Records of older releases say nothing: all nodes of the job."""
        job = self.run.read_job()
        usable = job.get("usable", [])
        self.usable = [nodes for nodes in usable if nodes <= self.nodes] or [self.nodes]
        self.is_elastic = len(usable) > 1 or self.nodes > self.usable[-1]
        self.ranks_per_node = job.get("shape", {}).get("processes", self.ranks_per_node)

    def _publish(self, path: Path, host: str, port: int, key: bytes) -> None:
        try:
            publish(path, host, port, key)
        except OSError as error:  # the script then starts the ranks without agents
            self._log("no node agents: %s" % error)

    def _run_attempts(self) -> Tuple[int, str]:
        """Start attempts until the exit trap is to decide. Returns the exit code of the agents, and why they leave."""
        if not self._gather_first():
            return self._without_agents()
        nodes = self.usable[-1]
        unhealthy = self._exclude_unhealthy(nodes)
        if not unhealthy:
            self._measure_network()
            if not self._gather_again(nodes):
                return self._without_agents()
            unhealthy = self._exclude_unhealthy(nodes)
        while True:
            if unhealthy:  # too many for the attempt that was won: no rank starts
                outcome = AttemptOutcome(None, (), False, "nodes have failed their health check")
            else:
                outcome = self._run_attempt(nodes)
            code = exit_code(outcome)
            try:
                nodes, reason = self._prepare_next(outcome, unhealthy)
            except (OSError, ValueError) as error:
                return code, str(error)
            if not nodes:
                return code, reason
            try:
                if not self._win_next(nodes):
                    return code, "another process has continued the run, or it ends"
                unhealthy = self._exclude_unhealthy(nodes)
            except (OSError, ValueError) as error:
                return STORAGE, str(error)

    def _gather_first(self) -> bool:
        """Whether all agents have come for the first start, or some time after the first one as many as are used."""
        first: Optional[float] = None
        while len(self.coordinator.ready()) < self.nodes:
            self.server.poll(POLL_SECONDS)
            connected = len(self.coordinator.agents)  # each has shown that it has the key
            ready = len(self.coordinator.ready())
            if first is None and connected:
                first = time.monotonic()
            if first is None:
                continue
            waited = time.monotonic() - first
            is_settled = ready == connected or connected < self.usable[-1]  # others import the trainer
            if waited > IMPORT_SECONDS or (waited > CONNECT_SECONDS and is_settled):
                return ready >= self.usable[-1]
        return True

    def _gather_again(self, nodes: int) -> bool:
        """Whether ``nodes`` agents are ready, as before: one may have been killed meanwhile, and comes back."""
        self.coordinator.gather()
        while not self.coordinator.has_gathered(nodes, nodes):
            self.server.poll(POLL_SECONDS)
            if not self.coordinator.is_patient():
                return False
        return True

    def _without_agents(self) -> Tuple[int, str]:
        return NO_AGENTS, "%d of %d node agents are ready" % (len(self.coordinator.ready()), self.nodes)

    def _measure_network(self) -> None:
        """Let the agents that are ready measure the network between their nodes, if one of these is new.

        Its result is one of their health checks. Whatever fails here is logged, and the ranks start all the same.
        """
        agents = self.coordinator.ready()
        nodes = [agent.node for agent in agents]
        if len(agents) * self.ranks_per_node < 2 or self._on_network.issuperset(nodes):
            return
        self._on_network.update(nodes)
        unable = [agent.node for agent in agents if not agent.facts.get("network")]
        if unable:
            self._log("network: not measured: the agent of %s has not imported torch, or cannot fork" % unable[0])
            return
        environ = self._meeting_point("network")
        self.coordinator.measure_network(agents, self._ranks(len(agents)), {"environment": environ})
        deadline = time.monotonic() + NETWORK_SECONDS
        while self.coordinator.measuring and time.monotonic() < deadline:
            self.server.poll(POLL_SECONDS)
        self._read_health()
        self._log(node_health.network_summary(nodes, self._health))

    def _exclude_unhealthy(self, nodes: int) -> Dict[str, str]:
        """Leave out nodes that have failed their health check; log the evidence.

        Returns node -> evidence if fewer than ``nodes`` would be left without them: the attempt cannot start then.
        """
        unhealthy = self._unhealthy()
        if len(self.coordinator.ready()) - len(unhealthy) < nodes:
            return unhealthy
        for node, evidence in unhealthy.items():
            self.coordinator.exclude(node, evidence)
        return {}

    def _unhealthy(self) -> Dict[str, str]:
        """Node -> evidence, of the agents that are ready.

        A node that Slurm gives although an earlier end excludes it counts as healthy: there is no other.
        """
        ready = {agent.node for agent in self.coordinator.ready()}
        self._read_health()
        verdict = node_health.judge(self._health)  # also with nodes that have left: what failed on most is no node's
        if verdict != self._verdict:
            self._verdict = verdict
            self._log_health(verdict)
        failed = {node: evidence for node, evidence in verdict.excluded.items() if node in ready}
        if not failed:
            return {}
        try:
            avoided = attempts.excluded_nodes(self.run, time.time()) or ()
        except (OSError, ValueError) as error:
            self._log(error)
            return {}
        return {node: evidence for node, evidence in failed.items() if node not in avoided}

    def _read_health(self) -> None:
        """Read the results of the agents that are ready."""
        for agent in self.coordinator.ready():
            try:
                self._health[agent.node] = [node_health.parse(row) for row in agent.facts.get("health", [])]
            except (AttributeError, TypeError, ValueError) as error:
                self._log("%s: %s" % (agent.node, error))

    def _log_health(self, verdict: node_health.NodeVerdict) -> None:
        for evidence in verdict.common.values():
            self._log("health of most nodes: %s" % evidence)
        for node, evidence in verdict.excluded.items():
            self._log("health of %s: %s" % (node, evidence))

    def _run_attempt(self, nodes: int) -> AttemptOutcome:
        """Run the attempt that was won, on this number of nodes."""
        environ = self._meeting_point(str(self.attempt))
        self.coordinator.start(self.attempt, self._ranks(nodes), {"environment": environ})
        self.has_started = True
        while self.coordinator.state is not State.DECIDE:
            self.server.poll(POLL_SECONDS)
        assert self.coordinator.outcome is not None
        return self.coordinator.outcome

    def _ranks(self, nodes: int) -> List[range]:
        """The ranks of each of the first nodes."""
        each = self.ranks_per_node
        return [range(node * each, (node + 1) * each) for node in range(nodes)]

    def _meeting_point(self, name: str) -> Dict[str, str]:
        """Where ranks meet: on the node of the first agent. ``name``: for what; the port depends on it."""
        environ = {"MASTER_PORT": str(rank_entry.port(os.environ.get("SLURM_JOB_ID", ""), name))}
        first = self.coordinator.ready()[0]
        if first.index:  # agents have the address of the first node
            environ["MASTER_ADDR"] = address_of(first)
        return environ

    # -- between attempts ----------------------------------------------------------------------------------------------

    def _prepare_next(self, outcome: AttemptOutcome, unhealthy: Dict[str, str]) -> Tuple[int, str]:
        """(on how many nodes the next attempt starts here, 0 if the exit trap is to decide; why).

        Raises OSError and ValueError of the records of the run.
        """
        n = self.attempt
        code = exit_code(outcome)
        reason = self._reason_for_trap(outcome)
        if reason == NO_ANSWER and unhealthy:  # the trap does not know that, and would exclude no node
            attempt_end.record_end(self.run, n, code, None, {}, unhealthy=unhealthy)
        if reason:
            return 0, reason
        noticed = time.time() - outcome.settling
        allocation = Allocation(
            min(self.nodes, slurm_cli.parse_int(self._fields.get("NumNodes", "")) or self.nodes),
            self.usable,
            self._seconds_left(),
            self.usable[-1],
            own_job.seconds_queued(self._fields),
            held=held_nodes(self._fields),
            excluded=self.coordinator.excluded,
        )
        step = attempt_end.record_end(self.run, n, code, "RUNNING", self._fields, None, noticed, unhealthy, allocation)
        self._log_step(n, step)
        self._log("%s: attempt %d: %s: %s" % (self.run.path, n, step.do, step.place))
        if step.do != HERE:
            return 0, step.place or step.reason
        for node in step.exclude:
            self.coordinator.exclude(node, "%s is excluded" % node)
        self.coordinator.gather()
        self._wait(step.delay)
        self._measure_network()
        return self._gather(step.nodes, allocation)

    def _gather(self, most: int, allocation: Allocation) -> Tuple[int, str]:
        """Wait for the agents of ``most`` nodes. Returns (on how many nodes the next attempt starts, 0 if too few came;
        why)."""
        self.server.poll()  # an agent may have died while Slurm was asked
        while not self.coordinator.has_gathered(most, most):
            self.server.poll(POLL_SECONDS)
            if not self.coordinator.is_patient():
                ready = len(self.coordinator.ready())
                nodes = max((nodes for nodes in self.usable if nodes <= ready), default=0)
                reason = too_slow(nodes, allocation)
                if nodes and reason:
                    return 0, reason
                return nodes, "a node agent does not come back"
        return most, ""

    def _reason_for_trap(self, outcome: AttemptOutcome) -> str:
        """Why the exit trap decides, as without agents; empty if the run may go on in this job."""
        request = read_record(self.run.attempt(self.attempt) / "told.json") or {}
        if outcome.code in SUCCESS:
            return "the attempt has ended"
        if request.get("signal"):  # a lifeline that ends leaves none
            return "the run was asked to stop"
        if not self.may_restart or exists(self.run.cancel) or exists(self.run.result):
            return "the run ends"
        return self._reason_of_job()

    def _reason_of_job(self) -> str:
        """Why no attempt starts in this job, by its state; empty if it runs. Slurm is asked for as long as by the exit
        trap: a short outage costs less than a requeue."""
        self._fields = {}
        state = own_job.wait_for_state(*self.start, seen=self._fields)
        self._asked_at = time.monotonic()
        if state is None:
            return NO_ANSWER
        if state not in ("RUNNING", SUSPENDED):  # this process runs, so the job is about to be resumed
            return "the state of the job: %s" % state
        return ""

    def _is_suspended(self) -> bool:
        """Whether Slurm has stopped the processes of the job, or has continued them since the last call."""
        before = self._suspended
        self._suspended = own_job.job_state(*self.start) == SUSPENDED
        return before or self._suspended

    def _lost_nodes(self, nodes: Sequence[str]) -> Sequence[str]:
        """Those of ``nodes`` that Slurm has taken out of the job. It is not asked if they would end the job."""
        if not self.is_elastic:
            return ()
        fields: Dict[str, str] = {}
        state = own_job.job_state(*self.start, deadline=slurm_cli.SHORT_DEADLINE, seen=fields)
        if state != "RUNNING":
            return ()
        held = held_nodes(fields)
        if held is None:
            return ()
        return [node for node in nodes if node not in held]

    def _seconds_left(self) -> Optional[float]:
        elapsed = slurm_cli.parse_duration(self._fields.get("RunTime", ""))
        limit = slurm_cli.parse_duration(self._fields.get("TimeLimit", ""))
        if elapsed is None or limit is None:
            return None
        return limit - elapsed

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.server.poll(POLL_SECONDS)

    def _win_next(self, nodes: int) -> bool:
        """Win the attempt that follows, on this number of nodes; False if another process has won one, the run was
        cancelled, or the job no longer runs."""
        if not self.may_restart or exists(self.run.cancel):
            return False
        if time.monotonic() - self._asked_at > STATE_SECONDS and self._reason_of_job():
            return False
        facts = dict(self._facts(), world=str(nodes * self.ranks_per_node))
        n = attempts.start_attempt(self.run, facts, after=self.attempt)
        if not n:
            return False
        self.attempt = n
        self._on_attempt(n)
        self.run.open_logs(n)
        limit = slurm_cli.parse_duration(self._fields.get("TimeLimit", ""))
        if limit is not None:
            wall_limit.record_limit(self.run, n, limit)
        return True

    def _log(self, text: object) -> None:
        """Write to the log of the attempt, which `flip logs` shows."""
        try:
            with open_append(self.run.logs / str(self.attempt) / "job.err", "utf-8") as file:
                file.write("%s\n" % text)
        except OSError:  # no attempt has started, or the disk is full
            self._print(text)

    def _log_step(self, n: int, step: Step) -> None:
        """Write the step to the log of the attempt, as the exit trap does."""
        try:
            with open_append(self.run.logs / str(n) / "job.out", "utf-8") as file:
                file.write(json.dumps(step._asdict(), sort_keys=True) + "\n")
        except OSError as error:
            self._log(error)


def held_nodes(fields: Mapping[str, str]) -> Optional[Set[str]]:
    """The nodes that a job has now, of its ``fields``; None if they are unknown: a list without the node of this
    process says nothing of others."""
    if not fields.get("NodeList"):
        return None
    try:
        held = set(slurm_cli.host_names(fields["NodeList"]))
    except slurm_cli.SlurmUnavailable:
        return None
    if os.environ.get("SLURMD_NODENAME") not in held:
        return None
    return held


def exit_code(outcome: AttemptOutcome) -> int:
    """The exit code of an attempt. Codes of ranks whose peers were lost are echoes, and no rank may have started."""
    if outcome.lost or outcome.code is None:
        return NODE_LOST
    return outcome.code


def listening_address(nodes: int, environ: Mapping[str, str]) -> str:
    """The address at which agents reach this node, the first of the job. Empty, for all addresses, if it is not known.

    It is that of the profile's master_addr, else the one from which this node reaches the last one.
    """
    if nodes == 1:
        return LOOPBACK
    chosen = rank_entry.address_here(environ.get("MASTER_ADDR") or "")
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


def address_of(agent: Agent) -> str:
    """An address of the node of an agent for its peers: its name or, if no name service knows it, the address from
    which the agent has connected. Slurm may have another name for a node than the network (NodeAddr)."""
    try:
        socket.getaddrinfo(agent.node, None)
        return agent.node
    except (OSError, UnicodeError):
        pass
    try:
        return peer_address(agent.channel)
    except OSError:  # it has just gone: the attempt ends when the coordinator notices that
        return agent.node
