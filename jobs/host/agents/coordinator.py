"""Starts and ends the attempts of a run on its node agents, without a scheduler: a state machine.

| state | what happens | ends |
|---|---|---|
| GATHER | agents connect and get ready | the owner calls ``start`` with the agents that it has |
| RUN | ranks run; agents report their ends | all ranks have ended: DECIDE; the deadline: KILL |
| KILL | agents kill their ranks | all ranks have ended, or their agents are lost: DECIDE |
| DECIDE | the owner reads ``outcome``, records the end and decides | ``gather``: GATHER; ``leave``: LEFT |
| LEFT | agents were asked to end | - |

The owner decides which attempt starts, and what follows from its end (``flip.runs.attempts``). On one machine this is
the supervisor, with one agent. The coordinator measures time by the clock that it is given, and reads neither files nor
the scheduler. Standard library, Python >= 3.6.

The elastic agent of torch (2.13) is not used. From a killed rank to the next step of a tiny model it took 10.8 to 56 s,
an early version of these agents 3.5 to 6.8 s. It did not notice a stopped rank within 150 s. It does not restart a
group when a node vanishes (pytorch issue 111646), loses its store with its host (67742), restarts without end while a
spare node waits, and reads pickles from an open port.
"""

import time
from enum import Enum
from typing import Any, Callable, Collection, Dict, List, NamedTuple, Optional, Sequence, Set

from flip.runs.errors import COMPLETE, STOPPED
from jobs.host.agents.channel import ChannelError, Message

SUCCESS = (COMPLETE, STOPPED)
SIGNAL_CODES = range(129, 160)
"""Exit codes of ranks that a signal has ended, as a shell writes them."""

PAUSE_SECONDS = 5.0
"""A longer time between two calls of ``tick``: this process was stopped, and perhaps the agents, too."""


class State(Enum):
    GATHER = "gather"
    RUN = "run"
    KILL = "kill"
    DECIDE = "decide"
    LEFT = "left"


class Timing(NamedTuple):
    """Seconds."""

    first_patience: float = 60.0
    """For agents at the first start of an allocation: images, cold file systems."""
    patience: float = 5.0
    """For agents at later starts."""
    silence: float = 10.0
    """An agent without any message for so long is lost. It sends a beat each second."""
    query: float = 5.0
    """An agent without any message for so long is lost if the scheduler has taken its node away. Also between two
    queries."""
    ready: float = 10.0
    """From the connection of an agent until it is ready: it imports the trainer in between."""
    peer_grace: float = 20.0
    """For the peers of a rank that has failed: they may have to save the cause of their own end."""
    killed_grace: float = 2.0
    """For the peers of a rank that a signal has killed: they can only wait for it."""
    stragglers: float = 600.0
    """For the peers of a rank that ended well: they agreed on the end, and only a hang takes longer."""
    kill: float = 15.0
    """For an agent to report the ends of ranks that it was asked to kill; then it is lost."""
    repeat: float = 3.0
    """Between two signals: one that comes while a rank starts may be lost."""


TIMING = Timing()


class AttemptOutcome(NamedTuple):
    """How an attempt ended."""

    code: Optional[int]
    """The first bad exit code of a rank, else 75 if there is one, else 0; None if ranks were lost and none is known."""
    lost: Sequence[str]
    """Nodes whose agents were lost while they had ranks."""
    stop_requested: bool
    """Whether ranks were asked to save and stop."""
    reason: str
    """The first event that ended it, as a sentence; empty if all ranks ended well."""
    settling: float = 0.0
    """Seconds from that event to the end of the last rank."""


class Agent:
    """A node agent, as the coordinator knows it."""

    def __init__(self, channel: Any, now: float) -> None:
        self.channel = channel
        self.node = ""
        """Name of its node; empty before its hello."""
        self.reported: Message = {}
        self.index = 0
        """Number of its node in the allocation."""
        self.is_ready = False
        """Whether it can start ranks: it has imported the trainer."""
        self.order = 0
        """Its position among the agents that became ready."""
        self.heard = now
        self.kill_by = float("inf")
        """When it is lost if it has not reported the ends of its ranks."""


class Coordinator:
    """The state machine. All times are of ``clock``. Methods of this class never block."""

    def __init__(
        self,
        timing: Timing = TIMING,
        clock: Callable[[], float] = time.monotonic,
        log: Callable[[str], None] = lambda text: None,
        is_suspended: Callable[[], bool] = lambda: False,
        lost_nodes: Callable[[Sequence[str]], Collection[str]] = lambda nodes: (),
    ) -> None:
        self.timing = timing
        self.is_suspended = is_suspended
        """Called before silent agents are lost: whether the scheduler has stopped all processes of the job."""
        self.lost_nodes = lost_nodes
        """Called with the nodes of silent agents: which of them the scheduler has taken away."""
        self.state = State.GATHER
        self.attempt = 0
        self.agents: List[Agent] = []
        self.outcome: Optional[AttemptOutcome] = None
        self.late_agent = ""
        """Why an agent was given up before it was ready; empty: none was."""
        self.excluded: Dict[str, str] = {}
        """Nodes that are not used any more -> the reason. Their agents are asked to leave, also if they come back."""
        self.measuring: Set[Agent] = set()
        """Agents that were asked to measure the network and have not answered."""
        self._clock = clock
        self._log = log
        self._ready_agents = 0
        """How many agents have become ready so far."""
        self._farewell: Message = {"is": "leave"}
        self._patient_until = clock() + timing.first_patience
        self._ticked = clock()
        self._query_at = float("-inf")
        """When the scheduler may be asked again for the nodes of silent agents."""
        self._clear()

    def _clear(self) -> None:
        """Forget the ranks of the last attempt."""
        self.running: Dict[int, Agent] = {}
        self._codes: List[Optional[int]] = []  # in the order of the ends; None: of a lost agent
        self._lost: List[str] = []
        self._reason = ""
        self._failed_at = float("inf")
        self._deadline = float("inf")
        self._stop_requested = False
        self._next_signal = float("-inf")

    # -- for the owner -------------------------------------------------------------------------------------------------

    def ready(self) -> List[Agent]:
        """Agents that can start ranks, by the numbers of their nodes in the allocation, then in the order in which they
        became ready."""
        return sorted((agent for agent in self.agents if agent.is_ready), key=lambda agent: (agent.index, agent.order))

    def has_gathered(self, least: int, most: int) -> bool:
        """Whether to start now: ``most`` agents are ready or, when patience is over, at least ``least``."""
        count = len(self.ready())
        return count >= most or (count >= least and not self.is_patient())

    def is_patient(self) -> bool:
        """Whether agents may still come."""
        return self._clock() < self._patient_until

    def start(self, attempt: int, ranks: Sequence[Sequence[int]], fields: Message) -> None:
        """Start an attempt. ``ranks``: those of each of the first ready agents. ``fields``: for each ``start`` message,
        as the address of rank 0."""
        if self.state is not State.GATHER or attempt <= self.attempt:
            raise ValueError("attempt %d cannot start after %d, in state %s" % (attempt, self.attempt, self.state))
        agents = self.ready()[: len(ranks)]
        if len(agents) < len(ranks):
            raise ValueError("%d agents are ready, and %d are needed" % (len(agents), len(ranks)))
        self._clear()
        self.state = State.RUN
        self.attempt = attempt
        for node, agent in enumerate(agents):
            self.running.update((rank, agent) for rank in ranks[node])
        self._send_places(agents, ranks, dict(fields, **{"is": "start", "attempt": attempt}))

    def measure_network(self, agents: Sequence[Agent], ranks: Sequence[Sequence[int]], fields: Message) -> None:
        """Ask agents without ranks to measure the network between them; each adds the result to its ``health``.

        ``ranks``: those of each agent. ``fields``: for each message.
        """
        self.measuring = set(agents)
        nodes = [agent.node for agent in agents]
        self._send_places(agents, ranks, dict(fields, **{"is": "network", "nodes": nodes}))

    def _send_places(self, agents: Sequence[Agent], ranks: Sequence[Sequence[int]], fields: Message) -> None:
        world = sum(len(own) for own in ranks)
        for node, agent in enumerate(agents):
            self._send(agent, dict(fields, world=world, node=node, ranks=list(ranks[node])))

    def stop(self, signal_name: str, seconds: float) -> None:
        """Ask all ranks to save and stop; they are killed after ``seconds``. Repeated until they have ended."""
        if self.state is not State.RUN or self._clock() < self._next_signal:
            return
        self._stop_requested = True
        self._next_signal = self._clock() + self.timing.repeat
        self.shorten_deadline(seconds)
        for agent in self._agents_with_ranks():
            self._send(agent, {"is": "signal", "attempt": self.attempt, "signal": signal_name})

    def shorten_deadline(self, seconds: float) -> None:
        """Kill ranks that live longer than this from now on."""
        self._deadline = min(self._deadline, self._clock() + seconds)

    def gather(self) -> None:
        """Get ready for the next attempt."""
        if self.state not in (State.GATHER, State.DECIDE):  # GATHER: no rank was started
            raise ValueError("no attempt has ended: %s" % self.state)
        self.state = State.GATHER
        self._patient_until = self._clock() + self.timing.patience

    def leave(self, code: int = COMPLETE, reason: str = "") -> None:
        """Ask all agents to end with this exit code, with the ranks that they have. One that still imports the trainer
        reads this when it is ready; one that has not sent hello is asked then."""
        self.state = State.LEFT
        self._farewell = {"is": "leave", "code": code, "reason": reason}
        for agent in list(self.agents):
            if agent.node:
                self._send(agent, self._farewell)

    def exclude(self, node: str, reason: str) -> None:
        """Do not use a node any more, which has no ranks. Its agent is asked to end, now or when it comes back."""
        self.excluded[node] = reason
        for agent in self.agents:
            if agent.node == node:
                self._dismiss(agent, reason)
                return

    def _dismiss(self, agent: Agent, reason: str) -> None:
        self._send(agent, {"is": "leave", "code": COMPLETE, "reason": reason})
        self.lost(agent, reason)

    # -- events --------------------------------------------------------------------------------------------------------

    def connected(self, channel: Any) -> Agent:
        """An agent has connected: its connection is private, or has brought a correct hello. ``channel``: has ``send``
        and ``close``."""
        agent = Agent(channel, self._clock())
        self.agents.append(agent)
        return agent

    def received(self, agent: Agent, message: Message) -> None:
        """A message whose signature is correct."""
        if agent not in self.agents:  # lost by an earlier message
            return
        agent.heard = self._clock()
        kind = message["is"]
        if kind == "hello":
            self._on_hello(agent, message)
        elif kind == "ready":
            self._on_ready(agent, message)
        elif kind == "exit":
            self._on_exit(agent, message)
        elif kind == "health":
            agent.reported = dict(agent.reported, health=message.get("health"))
            self.measuring.discard(agent)
        elif kind != "beat":
            self.lost(agent, "it says %s, which is not known here" % kind)

    def lost(self, agent: Agent, why: str) -> None:
        """The connection to an agent has ended, or is ended now."""
        if agent not in self.agents:
            return
        self.agents.remove(agent)
        self.measuring.discard(agent)
        agent.channel.close()
        if self.state is not State.LEFT:
            self._log("lost %s: %s" % (agent.node or "a connection", why))
        ranks = [rank for rank, owner in self.running.items() if owner is agent]
        if ranks:
            self._lost.append(agent.node)
            for rank in ranks:
                self._ended(rank, None, "the agent of %s was lost: %s" % (agent.node, why))

    def tick(self) -> None:
        """Do what is due. Call it a few times per second."""
        now = self._clock()
        if now - self._ticked > PAUSE_SECONDS:
            self._skip(now - self._ticked)
        elif self._late_agents() and self.is_suspended():
            self._skip(self.timing.silence)
        for agent in self._agents_of_lost_nodes():
            self.lost(agent, "silent, and the scheduler has taken its node away")
        self._ticked = self._clock()  # the scheduler may have answered late, which is no pause of this process
        for agent in list(self.agents):
            if agent.is_ready and now - agent.heard > self.timing.silence:
                self.lost(agent, "silent for %g s" % self.timing.silence)
            elif not agent.is_ready and now - agent.heard > self.timing.ready:
                self.late_agent = "not ready for %g s" % self.timing.ready
                self.lost(agent, self.late_agent)
            elif now >= agent.kill_by:
                self.lost(agent, "it did not end its ranks within %g s" % self.timing.kill)
        if self.state is State.RUN and now >= self._deadline:
            self._kill()

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _late_agents(self) -> List[Agent]:
        """Agents from which a message is due."""
        now = self._clock()
        return [a for a in self.agents if a.is_ready and (now - a.heard > self.timing.silence or now >= a.kill_by)]

    def _agents_of_lost_nodes(self) -> List[Agent]:
        """Silent agents whose nodes the scheduler has taken away: no connection of a dead machine ends by itself."""
        now = self._clock()
        silent = [agent for agent in self.agents if agent.is_ready and now - agent.heard > self.timing.query]
        if not silent or now < self._query_at:
            return []
        gone = self.lost_nodes([agent.node for agent in silent])
        self._query_at = self._clock() + self.timing.query
        return [agent for agent in silent if agent.node in gone]

    def _skip(self, seconds: float) -> None:
        """Do not count this time, which ends now."""
        now = self._clock()
        for agent in self.agents:
            agent.heard = min(now, max(agent.heard + seconds, now - self.timing.silence / 2))
            agent.kill_by += seconds
        self._deadline += seconds
        self._patient_until += seconds

    def _on_hello(self, agent: Agent, message: Message) -> None:
        node = str(message.get("node") or "")
        index = message.get("index", 0)
        if not node or agent.node or not isinstance(index, int):
            self.lost(agent, "a wrong hello")
            return
        if any(other.node == node for other in self.agents):  # the first one may have ranks
            self._dismiss(agent, "%s has an agent" % node)
            return
        if node in self.excluded:
            self._dismiss(agent, self.excluded[node])
            return
        agent.index = index
        agent.node = node
        agent.reported = message
        self._send(agent, {"is": "accepted"})
        if self.state is State.LEFT:
            self._send(agent, self._farewell)

    def _on_ready(self, agent: Agent, message: Message) -> None:
        if not agent.node or agent.is_ready:
            self.lost(agent, "a wrong ready")
            return
        self._ready_agents += 1
        agent.order = self._ready_agents
        agent.is_ready = True
        agent.reported = dict(agent.reported, **message)
        self._log("the agent of %s is ready" % agent.node)

    def _on_exit(self, agent: Agent, message: Message) -> None:
        rank = message.get("rank")
        code = message.get("code")
        if not isinstance(rank, int) or not isinstance(code, int):
            self.lost(agent, "a wrong exit")
            return
        if message.get("attempt") != self.attempt or self.running.get(rank) is not agent:
            return  # of an earlier attempt
        self._ended(rank, code, "rank %d ended with %d" % (rank, code), message.get("killed") is True)

    def _ended(self, rank: int, code: Optional[int], reason: str, killed: bool = False) -> None:
        agent = self.running.pop(rank)
        self._codes.append(code)
        if agent not in self.running.values():
            agent.kill_by = float("inf")
        if code in SUCCESS:
            self.shorten_deadline(self.timing.stragglers)
        else:
            self._on_bad_end(code, reason, killed)
        if not self.running:
            self.state = State.DECIDE
            code = code_of_attempt(self._codes)
            settling = max(0.0, self._clock() - self._failed_at)
            self.outcome = AttemptOutcome(code, tuple(self._lost), self._stop_requested, self._reason, settling)

    def _on_bad_end(self, code: Optional[int], reason: str, killed: bool) -> None:
        if not self._reason:
            self._reason = reason
            self._failed_at = self._clock()
            self._log(reason)
        was_killed = killed or code is None or code in SIGNAL_CODES
        if was_killed and not self._stop_requested:
            self.shorten_deadline(self.timing.killed_grace)
        else:
            self.shorten_deadline(self.timing.peer_grace)

    def _agents_with_ranks(self) -> List[Agent]:
        having = set(self.running.values())
        return [agent for agent in self.agents if agent in having]

    def _kill(self) -> None:
        self.state = State.KILL
        self._log("attempt %d: its remaining ranks are killed" % self.attempt)
        message: Message = {"is": "kill", "attempt": self.attempt}
        if self._codes and set(self._codes) == {COMPLETE} and not self._stop_requested:
            message["reason"] = "it did not end within %g s after its peers had ended well" % self.timing.stragglers
        for agent in self._agents_with_ranks():
            agent.kill_by = self._clock() + self.timing.kill
            self._send(agent, message)

    def _send(self, agent: Agent, message: Message) -> None:
        try:
            agent.channel.send(message)
        except ChannelError as error:
            self.lost(agent, str(error))


def code_of_attempt(codes: Sequence[Optional[int]]) -> Optional[int]:
    """The exit code of an attempt by those of its ranks, see ``AttemptOutcome``."""
    for code in codes:
        if code is not None and code not in SUCCESS:
            return code
    if None in codes:
        return None
    if STOPPED in codes:
        return STOPPED
    return COMPLETE
