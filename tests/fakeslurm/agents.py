"""Simulated node agents of a job, for the real coordinator in its real owner (``jobs.host.job``).

The owner has, in place of sockets, an ``AgentServer`` to which simulated agents post their messages. A connection ends
as soon as one of its sides has ended, or later if its node is lost.
"""

from __future__ import annotations

import functools
import os

from flip.runs.errors import CAUSES
from jobs.host.agents import orphaned_task
from jobs.host.agents.channel import GONE_CODE, NO_AGENTS, UNANSWERED_SECONDS
from jobs.host.agents.coordinator import State
from jobs.host.agents.entry import ASK_SECONDS, MOST_STARTS
from tests.fakeslurm.scripted import Rank, Scripted
from tests.slurm.scripted import STOP

HELLO = 0.5
"""Seconds until an agent says hello."""
IMPORTS = 1.5
"""Seconds after that until it is ready: it imports the trainer, and its node is checked."""
CONNECT = 60.0
"""Seconds for which an agent looks for its coordinator."""
GRACE = 95.0
"""Seconds that the ranks of an agent without a coordinator get to save."""
RESTART = 0.2
"""Seconds until the task of a killed agent has killed its ranks."""
MOST_SECONDS = 3600.0
"""Between two looks of a coordinator to which nothing happens."""


class AgentServer:
    """In place of ``jobs.host.agents.server.AgentServer``."""

    def __init__(self, life, coordinator):
        self._life = life
        self._clock = life.clock
        self.coordinator = coordinator
        self._events = []
        life.listener.server = self

    def post(self, handle, *arguments):
        """Let the coordinator handle an event: a method of it with arguments."""
        self._events.append((handle, arguments))
        if self._life._owner_process.alive:
            self._life._owner_process.look_up()

    def poll(self, seconds=0.0):
        if seconds and not self._events:
            self._wait(seconds)
        events = self._events
        self._events = []
        for handle, arguments in events:
            handle(*arguments)
        for agent in self.coordinator.agents:
            if agent.channel.is_heard:
                agent.heard = self._clock.now
        self.coordinator.tick()

    def _wait(self, seconds):
        """Wait for an event. While there are ranks, polls without one are left out until something is due."""
        if self.coordinator.state in (State.RUN, State.KILL):
            due = min(self._due(), self._life.owner.next_due())
            seconds = max(seconds, due - self._clock.now)
        self._clock.current.doze(seconds)
        self.coordinator._ticked = self._clock.now  # as if it had polled

    def _due(self):
        """When the coordinator next does something without an event."""
        coordinator = self.coordinator
        due = [self._clock.now + MOST_SECONDS, coordinator._deadline]
        for agent in coordinator.agents:
            due.append(agent.kill_by)
            if not agent.channel.is_heard:
                due.append(agent.heard + coordinator.timing.silence + 0.1)
                due.append(max(agent.heard + coordinator.timing.query, coordinator._query_at) + 0.1)
        return min(due)

    def close(self):
        self._life.listener.server = None
        for agent in list(self.coordinator.agents):
            self.coordinator.lost(agent, "the coordinator ends")

    def vanish(self):
        """The owner is gone: all connections end."""
        self._life.listener.server = None
        for agent in self.coordinator.agents:
            agent.channel.close()


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

    @property
    def over(self):
        return self._over is None

    def start(self, attempt):
        """The ranks of an attempt, to which each agent adds its own."""
        if self.ranks is None or self.ranks.n != attempt:
            self.ranks = self.life.agent_ranks(self.life, self.run, attempt)
        return self.ranks

    # -- what comes from outside -------------------------------------------------------------------------------------

    def signal(self, name, nodes):
        for agent in self._on(nodes):
            agent.hear(name)

    def kill(self, nodes):
        """Kill all processes on nodes."""
        for agent in self._on(nodes):
            agent.kill_task()

    def kill_ranks(self, nodes):
        """Kill the ranks on nodes alone."""
        for agent in self._on(nodes):
            agent.kill_ranks()

    def lose(self, node):
        self._lost.add(node)
        if node == self.life.host.name:  # with srun
            self._over = None
        for agent in self._on({node}):
            agent.vanish()

    def node_down(self, nodes):
        """srun learns from the controller that nodes are down."""
        for agent in self.agents:
            if agent.node.name in nodes & self._lost:
                agent.code = 1
        self._lost -= nodes
        self.ended()

    def kill_srun(self):
        """SIGKILL to srun; returns its pids, of which there are none if it has ended."""
        if self._over is None:
            return []
        over = self._over
        self._over = None
        self.clock.at(0.0, over, 137)
        return [1]

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


class Connection:
    """The coordinator's end of the connection to an agent."""

    def __init__(self, owner, server):
        self._owner = owner
        self._server = server
        self._agent = None
        self.is_heard = True
        """Whether its beats reach the coordinator."""

    # -- for the coordinator -----------------------------------------------------------------------------------------

    def send(self, message):
        self._owner.clock.at(0.0, self._owner.obey, self, message)

    def close(self):
        """The coordinator has ended the connection, or has ended itself. A lost node does not say so."""
        self.is_heard = False
        delay = 0.0
        if not self._owner.step.life.host.alive:
            delay = UNANSWERED_SECONDS
        self._owner.clock.at(delay, self._owner.closed, self)

    # -- for the agent -----------------------------------------------------------------------------------------------

    def open(self, hello):
        self._server.post(self._open, hello)

    def _open(self, hello):
        self._agent = self._server.coordinator.connected(self)
        self._server.coordinator.received(self._agent, hello)

    def say(self, message):
        self._server.post(lambda: self._server.coordinator.received(self._agent, message))

    def end(self, delay=0.0):
        """Nothing more comes from the agent. The connection ends after a delay; until then the agent is silent."""
        self.is_heard = False
        if delay and self._agent is not None:
            self._agent.heard = self._owner.clock.now
            self._server.post(lambda: None)  # a new date is due
        self._owner.clock.at(delay, self._server.post, self._end)

    def _end(self):
        if self._agent is not None:
            self._server.coordinator.lost(self._agent, "connection closed")


class NodeAgent:
    """The task of a node, with its agent."""

    def __init__(self, step, index, node):
        self.step = step
        self.index = index
        self.node = node
        self.clock = step.clock
        self.code = None
        """Exit code of the task."""
        self._stop_signal = ""
        self._starts = 0
        self._ranks = None
        """Those of the newest attempt of which it has started some."""
        self._connection = None
        self._is_leaving = False
        """Whether its connection has ended, and its ranks save."""
        self._is_over = False
        """Whether the agent has ended for good."""
        self._asking = None
        """The process of the task that waits for an answer of Slurm."""
        self._start()

    def _start(self):
        self._starts += 1
        self._event = self.clock.at(HELLO, self._connect)

    def _connect(self):
        server = self.step.life.listener.server
        if server is None:
            self._event = self.clock.at(CONNECT, self.end, NO_AGENTS)
            self._give_up_at_term()
            return
        self._connection = Connection(self, server)
        self._connection.open({"is": "hello", "node": self.node.name, "index": self.index})
        self._event = self.clock.at(IMPORTS, self._get_ready, self._connection)

    def _give_up_at_term(self):
        """Slurm ends the job, and no coordinator can be reached."""
        if self._stop_signal == "TERM" and self._connection is None and self.step.life.listener.server is None:
            self.clock.cancel(self._event)
            self._event = self.clock.at(0.2, self.end, NO_AGENTS)

    def _get_ready(self, connection):
        if not self._is_over and connection is self._connection:
            connection.say({"is": "ready"})

    # -- from the coordinator ----------------------------------------------------------------------------------------

    def obey(self, connection, message):
        if self._is_over or connection is not self._connection:
            return
        if message["is"] == "start":
            self._ranks = self.step.start(message["attempt"])
            for number in message["ranks"]:
                self._ranks.add(number, self, message["world"])
            if self._stop_signal:
                self.hear(self._stop_signal)
        elif message["is"] == "signal":
            self.hear(message["signal"])
        elif message["is"] == "kill":
            self.kill_ranks()
        elif message["is"] == "leave":
            self.end(message.get("code", 0))

    def closed(self, connection):
        """The connection has ended: the ranks save, then the agent ends."""
        if self._is_over or connection is not self._connection:
            return
        self._is_leaving = True
        self._event = self.clock.at(GRACE, self.end, GONE_CODE)
        self._restart_early()
        if self._ranks is not None:
            self._ranks.lifeline_ended({self.node.name})
        self._end_without_ranks()

    # -- its ranks ---------------------------------------------------------------------------------------------------

    @property
    def has_ranks(self):
        return self._ranks is not None and bool(self._ranks.on({self.node.name}))

    def hear(self, name):
        if name in STOP:
            self._stop_signal = name
            self._give_up_at_term()
        if name == "TERM":
            self._wake()
            self._restart_early()
        if self._ranks is not None:
            self._ranks.signal(name, {self.node.name})

    def kill_ranks(self):
        if self._ranks is not None:
            self._ranks.kill({self.node.name})

    def report(self, attempt, number, code, killed):
        """A rank has ended."""
        if self._is_leaving:
            self._end_without_ranks()
        elif self._connection is not None:
            message = {"is": "exit", "attempt": attempt, "rank": number, "code": code, "killed": killed}
            self._connection.say(message)

    def _end_without_ranks(self):
        if not self.has_ranks:
            self.clock.cancel(self._event)
            self._event = self.clock.at(0.2, self.end, GONE_CODE)

    # -- its end -----------------------------------------------------------------------------------------------------

    def kill(self):
        """Kill the agent alone: its task kills the ranks, and starts another one."""
        if self._is_over or self.code is not None:
            return
        self._disconnect()
        self._is_leaving = False
        if self._starts < MOST_STARTS:
            self._event = self.clock.at(RESTART, self._start)
        else:
            self._end_task(137)

    def kill_task(self):
        """Kill the task with all its processes."""
        self._disconnect()
        self._end_task(137)

    def end(self, code):
        """End with all ranks."""
        if self._is_over:
            return
        self._disconnect()
        self._is_over = True
        task_code = code
        if code == GONE_CODE:
            task_code = CAUSES["crash"]
        if code in (GONE_CODE, NO_AGENTS):
            over = functools.partial(self._asked_slurm, task_code)
            self.step.life.task_process(self.node, self._restart_if_orphaned, over)
        else:
            self._end_task(task_code)

    def _restart_if_orphaned(self):
        print(orphaned_task.restart_if_orphaned(os.environ, self._sleep_until_term))

    def _restart_early(self):
        """``entry.EarlyRestart``."""
        if self._is_leaving and self._stop_signal == "TERM" and not self._is_over:
            self.step.life.task_process(self.node, self._restart_if_ending, self._restarted_early)

    def _restart_if_ending(self):
        what = orphaned_task.restart_if_ending(os.environ, self.clock.sleep)
        if not what:
            return 1
        print(what)
        return 0

    def _restarted_early(self, code, out):
        if code:
            self.clock.at(ASK_SECONDS, self._restart_early)

    def _sleep_until_term(self, seconds):
        """``orphaned_task.sleep_until_term``."""
        self._asking = self.clock.current
        self._asking.wait(seconds)
        is_woken = self._asking is None
        self._asking = None
        return is_woken

    def _wake(self):
        asking = self._asking
        if asking is not None and asking.alive:
            self._asking = None
            asking.wake()

    def _asked_slurm(self, task_code, code, out):
        self._end_task(task_code)

    def vanish(self):
        """End without an exit code: the node is lost."""
        self._disconnect(self.step.life.loss_seconds())
        self._is_over = True

    def _disconnect(self, delay=0.0):
        """End the ranks, then the connection: the coordinator learns nothing more of them."""
        self.clock.cancel(self._event)
        if self._ranks is not None:
            self._ranks.drop({self.node.name})
        if self._connection is not None:
            self._connection.end(delay)
        self._connection = None

    def _end_task(self, code):
        self._is_over = True
        if self.code is None:
            self.code = code
            self.step.ended()


class AgentRanks(Scripted):
    """The ranks of an attempt that agents have started."""

    def __init__(self, life, run, n):
        super().__init__(life, run, n, over=None, nodes=())

    def add(self, number, agent, world):
        def report(rank):
            agent.report(self.n, rank.rank, rank.code, killed=rank.code == 137)

        self.ranks.append(Rank(self, number, agent.node, report))

    def drop(self, nodes):
        """End the ranks on nodes; nobody reports it."""
        for rank in self.on(nodes):
            rank.drop()
            rank.code = 137

    def lifeline_ended(self, nodes):
        """These do not save."""
