"""Simulated node agents of a job, for the real coordinator (``jobs.host.agents.job_coordinator``).

The coordinator runs in the simulated watcher. ``seams.in_place`` gives it, in place of a thread and sockets, a process
of the simulated clock and an ``AgentServer`` to which simulated agents post their messages. A connection ends as soon
as one of its sides has ended.
"""

from __future__ import annotations

from flip.runs.errors import CAUSES
from jobs.host.agents.channel import GONE_CODE
from jobs.host.agents.coordinator import NO_AGENTS
from tests.fakeslurm.scripted import Rank, Scripted
from tests.slurm.scripted import STOP

IMPORTS = 2.0
"""Seconds until an agent says hello: it imports the trainer, and its node is checked."""
GRACE = 95.0
"""Seconds that the ranks of an agent without a coordinator get to save."""
JOIN_POLL = 1.0


class SimulatedThread:
    """In place of threading.Thread. It ends with the process that has started it."""

    def __init__(self, clock, target, name="", daemon=True):
        self._clock = clock
        self._target = target
        self._process = None

    def start(self):
        self._process = self._clock.current.start_thread(self._target)

    def is_alive(self):
        return self._process is not None and self._process.alive

    def join(self):
        while self.is_alive():
            self._clock.sleep(JOIN_POLL)


class Listener:
    """In place of a listening socket: the agents of the life that has opened it find its server."""

    def __init__(self, life):
        self.server = None
        life.listener = self

    @staticmethod
    def getsockname():
        return "", 10000

    def close(self):
        self.server = None


class AgentServer:
    """In place of ``jobs.host.agents.server.AgentServer``."""

    def __init__(self, clock, coordinator, key, listener):
        self._clock = clock
        self.coordinator = coordinator
        self._listener = listener
        self._events = []
        self._waiting = None
        listener.server = self

    def post(self, handle, *arguments):
        """Let the coordinator handle an event: a method of it with arguments."""
        self._events.append((handle, arguments))
        if self._waiting is not None:
            self._waiting.wake()
            self._waiting = None

    def poll(self, seconds=0.0):
        if seconds and not self._events:
            self._waiting = self._clock.current
            self._waiting.wait(seconds)
            self._waiting = None
        events = self._events
        self._events = []
        for handle, arguments in events:
            handle(*arguments)
        for agent in self.coordinator.agents:
            if agent.channel.is_heard:
                agent.heard = self._clock.now
        self.coordinator.tick()

    def close(self):
        self._listener.close()
        for agent in list(self.coordinator.agents):
            self.coordinator.lost(agent, "the coordinator ends")


class AgentsStep:
    """The step of a job's agents, one per node, and srun: ``over(code)`` is called when all agents have ended."""

    def __init__(self, life, run, over):
        self.life = life
        self.run = run
        self.clock = life.clock
        self.ranks = None
        """Those of the newest attempt that was started."""
        self._over = over
        self._lost = set()
        self.agents = [NodeAgent(self, index, node) for index, node in enumerate(life.nodes)]

    def start(self, attempt):
        """The ranks of an attempt, to which each agent adds its own."""
        if self.ranks is None or self.ranks.n != attempt:
            self.ranks = AgentRanks(self.life, self.run, attempt)
        return self.ranks

    # -- what comes from outside -------------------------------------------------------------------------------------

    def signal(self, name, nodes):
        for agent in self._on(nodes):
            agent.hear(name)

    def kill(self, nodes):
        """Kill all processes on nodes."""
        for agent in self._on(nodes):
            agent.end(137)

    def kill_ranks(self, nodes):
        """Kill the ranks on nodes alone."""
        for agent in self._on(nodes):
            agent.kill_ranks()

    def lose(self, node):
        self._lost.add(node)
        for agent in self._on({node}):
            agent.vanish()

    def node_down(self, nodes):
        """srun learns from the controller that nodes are down."""
        for agent in self.agents:
            if agent.node.name in nodes & self._lost:
                agent.code = 1
        self._lost -= nodes
        self.ended()

    def ended(self):
        """Called after the end of an agent. srun waits for all others without a limit (``--wait=0``)."""
        codes = [agent.code for agent in self.agents]
        if self._over is None or self._lost or None in codes:
            return
        over = self._over
        self._over = None
        over(max(codes))

    def _on(self, nodes):
        return [agent for agent in self.agents if agent.node.name in nodes and agent.code is None]


class NodeAgent:
    """The agent of a node, and the coordinator's end of its connection: ``send`` and ``close``."""

    def __init__(self, step, index, node):
        self.step = step
        self.index = index
        self.node = node
        self.clock = step.clock
        self.code = None
        self.is_heard = True
        """Whether its beats reach the coordinator."""
        self._stop_signal = ""
        self._agent = None
        self._server = None
        self._event = self.clock.at(IMPORTS, self._connect)

    def _connect(self):
        self._server = self.step.life.listener.server
        if self._server is None:
            self.end(NO_AGENTS)
        else:
            self._server.post(self._say_hello)

    def _say_hello(self):
        coordinator = self._server.coordinator
        self._agent = coordinator.connected(self)
        coordinator.received(self._agent, {"is": "hello", "node": self.node.name, "index": self.index})

    # -- from the coordinator ----------------------------------------------------------------------------------------

    def send(self, message):
        self.clock.at(0.0, self._obey, message)

    def close(self):
        """The coordinator has ended the connection, or has ended itself."""
        self.is_heard = False
        self.clock.at(GRACE, self.end, GONE_CODE)

    def _obey(self, message):
        if self.code is not None:
            return
        if message["is"] == "start":
            ranks = self.step.start(message["attempt"])
            for number in message["ranks"]:
                ranks.add(number, self)
            if self._stop_signal:
                self.hear(self._stop_signal)
        elif message["is"] == "signal":
            self.hear(message["signal"])
        elif message["is"] == "kill":
            self.kill_ranks()
        elif message["is"] == "leave":
            self.end(message.get("code", 0))

    # -- its ranks ---------------------------------------------------------------------------------------------------

    def hear(self, name):
        if name in STOP:
            self._stop_signal = name
        for rank in self._ranks():
            rank.hear(name)

    def kill_ranks(self):
        for rank in self._ranks():
            rank.end(137)

    def report(self, rank):
        """A rank has ended."""
        if self._agent is not None and self.is_heard:
            message = {"is": "exit", "attempt": rank.step.n, "rank": rank.rank, "code": rank.code}
            self._server.post(self._server.coordinator.received, self._agent, {**message, "killed": rank.code == 137})

    def _ranks(self):
        if self.step.ranks is None:
            return []
        return self.step.ranks.on({self.node.name})

    # -- its end -----------------------------------------------------------------------------------------------------

    def end(self, code):
        """End with all ranks."""
        if self.code is not None:
            return
        if code == GONE_CODE:
            code = CAUSES["crash"]  # of its task
        self._disconnect()
        self.code = code
        self.step.ended()

    def vanish(self):
        """End without an exit code: the node is lost."""
        self._disconnect()

    def _disconnect(self):
        """End the connection, then the ranks, of which the coordinator learns nothing more."""
        self.clock.cancel(self._event)
        self.is_heard = False
        if self._agent is not None:
            self._server.post(self._server.coordinator.lost, self._agent, "connection closed")
        for rank in self._ranks():
            rank.drop()
            rank.code = 137


class AgentRanks(Scripted):
    """The ranks of an attempt that agents have started."""

    def __init__(self, life, run, n):
        super().__init__(life, run, n, over=None, nodes=())

    def add(self, number, agent):
        self.ranks.append(Rank(self, number, agent.node, agent.report))
