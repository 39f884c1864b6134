"""The nodes of a job through their agents: gathers them, checks them, and runs attempts on them.

The owner of the job (``jobs/host/job.py``) decides which attempt starts; ``NodePool`` knows which nodes can start
ranks. Each wait goes through the owner, which looks at its job meanwhile. Standard library, Python >= 3.6.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

from flip.runs import attempts
from flip.runs.checks import Check, check_of
from flip.runs.errors import NODE_LOST
from flip.runs.next_step import Allocation
from flip.runs.rundir import RunDir
from jobs.host import rank_entry
from jobs.host.agents import node_health
from jobs.host.agents.channel import CONTACT, NO_AGENTS, listen, new_key, peer_address, publish
from jobs.host.agents.coordinator import TIMING, Agent, AttemptOutcome, Coordinator, State
from jobs.host.agents.server import AgentServer
from jobs.host.job_nodes import JobNodes

POLL_SECONDS = 0.2
CONNECT_SECONDS = 75.0  # from the first agent to the last one; an agent tries for 60 s
IMPORT_SECONDS = 600.0  # for agents to import torch and the trainer, from a cold file system
RETURN_SECONDS = 60.0  # for a killed agent to be replaced
STALL_SECONDS = 120.0  # for which an agent may wait for a disk; its death is seen at once, by the end of its connection
NETWORK_SECONDS = 9.5  # for agents to measure the network; their processes end after 8 s
LEAVE_SECONDS = 10.0  # for agents without ranks to end

TIMINGS = TIMING._replace(
    first_patience=IMPORT_SECONDS,
    patience=RETURN_SECONDS,
    ready=IMPORT_SECONDS,
    silence=STALL_SECONDS,
    kill=STALL_SECONDS,
)


class NodePool:
    """The agents of one start of a job.

    ``wait``: of the owner; it calls ``poll``. ``log``: writes to the log of the attempt. ``is_suspended``,
    ``lost_nodes``: see ``Coordinator``. ``has_ended``: whether the step of the agents has ended.
    ``peer_seconds``: the most that the peers of a failed rank get. ``open_server``: as the function of this name.
    """

    def __init__(
        self,
        run: RunDir,
        nodes: JobNodes,
        wait: Callable[[float], None],
        log: Callable[[object], None],
        is_suspended: Callable[[], bool],
        lost_nodes: Callable[[Sequence[str]], Sequence[str]],
        has_ended: Callable[[], bool],
        peer_seconds: float,
        open_server: Callable[..., Any],
    ) -> None:
        self.run = run
        self.nodes = nodes
        self._wait = wait
        self._log = log
        self._has_ended = has_ended
        self._open_server = open_server
        self._health: Dict[str, Sequence[Check]] = {}
        """The results of all nodes of this start, also of those that were left out or lost."""
        self._verdict = node_health.judge({})
        """The last one that was logged."""
        self._on_network: Set[str] = set()
        """Nodes that have measured the network together."""
        timing = TIMINGS._replace(
            peer_grace=min(TIMINGS.peer_grace, peer_seconds), killed_grace=min(TIMINGS.killed_grace, peer_seconds)
        )
        self.coordinator = Coordinator(timing, lambda: time.monotonic(), log, is_suspended, lost_nodes)

    def open(self, n: int, place: Tuple[str, int]) -> None:
        """Listen for the agents of this start, whose first attempt is n. ``place``: address and first port.

        Raises OSError.
        """
        self.server = self._open_server(self.coordinator, self.run.attempt(n) / CONTACT, place, self._log)

    def poll(self, seconds: float) -> None:
        """Handle what has come from agents, or comes within ``seconds``."""
        self.server.poll(seconds)

    def leave(self, code: int) -> None:
        """Ask all agents to end with this exit code, and wait for that for a while."""
        self.coordinator.leave(code)
        seconds = LEAVE_SECONDS
        if code == NO_AGENTS:  # agents that import the trainer must learn that srun is to start the ranks
            seconds = IMPORT_SECONDS
        deadline = time.monotonic() + seconds
        while self.coordinator.agents and time.monotonic() < deadline:
            self._wait(POLL_SECONDS)
        self.close()

    def close(self) -> None:
        """End all connections: agents that are connected let their ranks save."""
        self.server.close()

    # -- gathering -----------------------------------------------------------------------------------------------------

    def gather_first(self) -> bool:
        """Whether all agents have come for the first start, or some time after the first one as many as are used."""
        first: Optional[float] = None
        while len(self.coordinator.ready()) < self.nodes.total:
            self._wait(POLL_SECONDS)
            if self._has_ended():
                return False
            connected = len(self.coordinator.agents)  # each has shown that it has the key
            ready = len(self.coordinator.ready())
            if first is None and connected:
                first = time.monotonic()
            if first is None:
                continue
            waited = time.monotonic() - first
            is_settled = ready == connected or connected < self.nodes.most  # others import the trainer
            if waited > IMPORT_SECONDS or (waited > CONNECT_SECONDS and is_settled):
                return ready >= self.nodes.most
        return True

    def open_gathering(self) -> None:
        """Get ready for the next attempt: agents may come back from now on."""
        self.coordinator.gather()

    def gather(self, nodes: int) -> int:
        """Wait for the agents of this number of nodes, for as long as a killed agent needs to come back; returns how
        many are ready."""
        self.server.poll()  # an agent may have died while the scheduler was asked
        while self.coordinator.is_patient() and not self.coordinator.has_gathered(nodes, nodes):
            if self._has_ended():
                break
            self._wait(POLL_SECONDS)
        return len(self.coordinator.ready())

    def allocation_of_ready(self, allocation: Allocation) -> Allocation:
        """What is left of an allocation if only the nodes whose agents are ready count."""
        names = [agent.node for agent in self.coordinator.ready()]
        return allocation._replace(nodes=len(names), held=names, excluded=())

    # -- health --------------------------------------------------------------------------------------------------------

    def measure_network(self) -> None:
        """Let the agents that are ready measure the network between their nodes, if one of these is new.

        Its result is one of their health checks. Whatever fails here is logged, and the ranks start all the same.
        """
        agents = self.coordinator.ready()
        nodes = [agent.node for agent in agents]
        if len(agents) * self.nodes.ranks_per_node < 2 or self._on_network.issuperset(nodes):
            return
        self._on_network.update(nodes)
        unable = [agent.node for agent in agents if not agent.reported.get("network")]
        if unable:
            self._log("network: not measured: the agent of %s has not imported torch, or cannot fork" % unable[0])
            return
        environ = self._meeting_point("network")
        self.coordinator.measure_network(agents, self._ranks(len(agents)), {"environment": environ})
        deadline = time.monotonic() + NETWORK_SECONDS
        while self.coordinator.measuring and time.monotonic() < deadline:
            self._wait(POLL_SECONDS)
        self._read_health()
        self._log(node_health.network_summary(nodes, self._health))

    def exclude_unhealthy(self, nodes: int) -> Dict[str, str]:
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
                self._health[agent.node] = [check_of(row) for row in agent.reported.get("health", [])]
            except (AttributeError, TypeError, ValueError) as error:
                self._log("%s: %s" % (agent.node, error))

    def _log_health(self, verdict: node_health.NodeVerdict) -> None:
        for evidence in verdict.common.values():
            self._log("health of most nodes: %s" % evidence)
        for node, evidence in verdict.excluded.items():
            self._log("health of %s: %s" % (node, evidence))

    # -- an attempt ----------------------------------------------------------------------------------------------------

    def run_attempt(self, n: int, nodes: int) -> AttemptOutcome:
        """Run the attempt that was won, on this number of nodes."""
        environ = self._meeting_point(str(n))
        self.coordinator.start(n, self._ranks(nodes), {"environment": environ})
        while self.coordinator.state is not State.DECIDE:
            self._wait(POLL_SECONDS)
        assert self.coordinator.outcome is not None
        return self.coordinator.outcome

    def _ranks(self, nodes: int) -> List[range]:
        """The ranks of each of the first nodes."""
        each = self.nodes.ranks_per_node
        return [range(node * each, (node + 1) * each) for node in range(nodes)]

    def _meeting_point(self, name: str) -> Dict[str, str]:
        """Where ranks meet: on the node of the first agent. ``name``: for what; the port depends on it."""
        environ = {"MASTER_PORT": str(rank_entry.port(os.environ.get("SLURM_JOB_ID", ""), name))}
        first = self.coordinator.ready()[0]
        if first.index:  # agents have the address of the first node
            environ["MASTER_ADDR"] = address_of(first)
        return environ


def open_server(
    coordinator: Coordinator, contact: Path, place: Tuple[str, int], log: Callable[[object], None]
) -> AgentServer:
    """The server that agents find by the file ``contact``. ``place``: address and first port. Raises OSError."""
    key = new_key()
    host, first_port = place
    listener = listen(host, first_port, rank_entry.PORTS[1])
    try:
        publish(contact, host, listener.getsockname()[1], key)
    except OSError:
        listener.close()
        raise
    return AgentServer(coordinator, key, listener, log)


def exit_code(outcome: AttemptOutcome) -> int:
    """The exit code of an attempt. Codes of ranks whose peers were lost are echoes, and no rank may have started."""
    if outcome.lost or outcome.code is None:
        return NODE_LOST
    return outcome.code


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
