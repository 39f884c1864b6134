"""Tests of the coordinator's states, with simulated time and agents."""

import random

import pytest

from jobs.host.agents.channel import ChannelError
from jobs.host.agents.coordinator import Coordinator, State, Timing, code_of_attempt

TIMING = Timing()


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class SimulatedAgent:
    """The node's side: records what it is asked, and answers as a real agent, or as a broken one."""

    def __init__(self, group, node):
        self.group = group
        self.node = node
        self.ranks = {}  # rank -> attempt
        self.messages = []
        self.closed = False
        self.is_silent = False
        self.obeys = True
        self.breaks = False
        self.agent = group.coordinator.connected(self)

    def hello(self):
        self.say("hello", node=self.node)
        return self

    def get_ready(self):
        self.say("ready", health=[])
        return self

    def say(self, kind, **facts):
        self.group.coordinator.received(self.agent, {"is": kind, **facts})

    def end(self, rank, code):
        self.say("exit", attempt=self.ranks.pop(rank), rank=rank, code=code)

    def send(self, message):
        if self.breaks:
            raise ChannelError("connection lost")
        if message["is"] != "accepted":
            self.messages.append(message)
        if message["is"] == "start":
            self.ranks.update({rank: message["attempt"] for rank in message["ranks"]})

    def close(self):
        self.closed = True

    def act(self):
        """What it does in a moment of time."""
        if self.closed or self.is_silent:
            return
        self.say("beat")
        if self.obeys and any(message["is"] == "kill" for message in self.messages[-1:]):
            for rank in list(self.ranks):
                self.end(rank, 137)

    def asked(self):
        return [message["is"] for message in self.messages]


class Group:
    """A coordinator with its simulated agents."""

    def __init__(self, nodes=2, per_node=2, timing=TIMING):
        self.clock = Clock()
        self.lines = []
        self.coordinator = Coordinator(timing, self.clock, self.lines.append)
        self.agents = [SimulatedAgent(self, f"n{i}").hello().get_ready() for i in range(nodes)]
        self.per_node = per_node

    def start(self, n=1, nodes=None):
        count = self.per_node
        ranks = [range(i * count, (i + 1) * count) for i in range(nodes or len(self.agents))]
        self.coordinator.start(n, ranks, {"address": "n0", "port": 12345})

    def wait(self, seconds, until=None):
        """Let time pass; returns how much has passed."""
        start = self.clock.now
        while self.clock.now - start < seconds:
            if until is not None and self.coordinator.state is until:
                break
            self.clock.now += 0.25
            for agent in self.agents:
                agent.act()
            self.coordinator.tick()
        return self.clock.now - start

    @property
    def state(self):
        return self.coordinator.state

    @property
    def outcome(self):
        return self.coordinator.outcome


def test_attempt_runs_from_hello_to_decision():
    group = Group()
    group.start()
    assert [agent.messages for agent in group.agents] == [
        [{"is": "start", "attempt": 1, "world": 4, "node": 0, "ranks": [0, 1], "address": "n0", "port": 12345}],
        [{"is": "start", "attempt": 1, "world": 4, "node": 1, "ranks": [2, 3], "address": "n0", "port": 12345}],
    ]
    for rank in range(4):
        assert group.state is State.RUN
        group.agents[rank // 2].end(rank, 0)
    assert group.state is State.DECIDE
    assert group.outcome == (0, (), False, "", 0.0)
    group.coordinator.leave()
    assert [agent.asked()[-1] for agent in group.agents] == ["leave", "leave"]


@pytest.mark.parametrize(
    ("codes", "code"),
    [([0, 0], 0), ([0, 75], 75), ([75, 70, 137], 70), ([None, 137], 137), ([0, None], None), ([75, None, 0], None)],
)
def test_code_of_attempt(codes, code):
    assert code_of_attempt(codes) == code


@pytest.mark.parametrize(
    ("code", "seconds"), [(137, TIMING.killed_grace), (70, TIMING.peer_grace), (0, TIMING.stragglers)]
)
def test_peers_of_ended_rank_are_killed_after_grace(code, seconds):
    group = Group()
    group.start()
    group.agents[1].end(3, code)
    assert group.wait(2 * seconds, State.KILL) == pytest.approx(seconds, abs=0.5)
    group.wait(5, State.DECIDE)
    assert group.outcome.code == (code or 137)
    if code:  # a good end is no failure
        assert group.outcome.settling == pytest.approx(seconds, abs=0.5)
    assert group.agents[0].asked() == ["start", "kill"]


@pytest.mark.parametrize(
    ("code", "is_stopped", "has_reason"), [(0, False, True), (0, True, False), (75, False, False), (70, False, False)]
)
def test_killed_rank_is_called_hung_only_if_all_others_ended_well(code, is_stopped, has_reason):
    group = Group(nodes=1)
    group.start()
    if is_stopped:
        group.coordinator.stop("TERM", 60.0)
    group.agents[0].end(1, code)
    group.wait(2 * TIMING.stragglers, State.KILL)
    kill = group.agents[0].messages[-1]
    assert kill["is"] == "kill" and ("did not end within 600 s" in kill.get("reason", "")) == has_reason


def test_next_attempt_starts_on_same_agents():
    group = Group()
    for n in (1, 2, 3):
        group.start(n)
        group.agents[0].end(0, 137)
        group.wait(10, State.DECIDE)
        group.coordinator.gather()
        assert group.coordinator.has_gathered(2, 2)
    assert group.agents[0].asked() == ["start", "kill"] * 3


def test_late_exit_of_earlier_attempt_is_ignored():
    group = Group()
    group.start()
    group.agents[0].end(0, 137)
    group.wait(10, State.DECIDE)
    group.coordinator.gather()
    group.start(2)
    for attempt, rank, agent in ((1, 1, 0), (2, 3, 0), (2, 7, 1)):  # of attempt 1, of another node, of none
        group.agents[agent].say("exit", attempt=attempt, rank=rank, code=70)
    assert group.state is State.RUN and len(group.coordinator.running) == 4


@pytest.mark.parametrize("fault", ["closed", "silent", "leaves", "protocol", "exit", "send"])
def test_lost_agent_ends_attempt_with_its_node(fault):
    group = Group()
    group.start()
    agent = group.agents[1]
    if fault == "closed":
        group.coordinator.lost(agent.agent, "connection closed")
    elif fault == "silent":
        agent.is_silent = True
        passed = group.wait(60, State.KILL)
        assert passed == pytest.approx(TIMING.silence + TIMING.killed_grace, abs=1)
    elif fault == "leaves":
        agent.say("leave", reason="its memory is full")
    elif fault == "protocol":
        agent.say("mutiny")
    elif fault == "exit":
        agent.say("exit", attempt=1, rank="2", code=None)
    else:
        agent.breaks = True
        group.coordinator.stop("TERM", 60.0)
    group.wait(70, State.DECIDE)
    assert agent.closed and group.outcome.lost == ("n1",)
    assert group.outcome.code == 137  # of its peers, which were killed
    assert "the agent of n1 was lost" in group.outcome.reason


def test_half_dead_node_that_does_not_kill_is_lost():
    group = Group()
    group.agents[1].obeys = False
    group.start()
    group.agents[0].end(0, 137)
    group.wait(10, State.KILL)
    assert group.wait(60, State.DECIDE) == pytest.approx(TIMING.kill, abs=1)
    assert group.outcome.lost == ("n1",) and group.agents[1].closed


def test_spare_replaces_lost_node():
    group = Group(nodes=3)
    group.start(nodes=2)
    assert group.agents[2].asked() == []
    group.coordinator.lost(group.agents[0].agent, "connection closed")
    group.wait(10, State.DECIDE)
    group.coordinator.gather()
    assert group.coordinator.has_gathered(2, 2)
    group.start(2, nodes=2)
    assert [message["node"] for message in (group.agents[1].messages[-1], group.agents[2].messages[-1])] == [0, 1]


def test_second_fault_during_recovery():
    group = Group(nodes=3)
    group.start(nodes=2)
    group.agents[0].end(0, 137)
    group.wait(10, State.KILL)
    group.agents[1].is_silent = True  # between kill and the ends of its ranks
    group.coordinator.tick()
    group.wait(30, State.DECIDE)
    group.coordinator.gather()
    assert group.coordinator.has_gathered(2, 2)
    group.start(2, nodes=2)
    assert sorted(group.coordinator.running) == [0, 1, 2, 3]


def test_patience_is_long_at_first_and_short_later():
    group = Group(nodes=1)
    assert not group.coordinator.has_gathered(1, 2)
    group.wait(TIMING.first_patience - 1)
    assert not group.coordinator.has_gathered(1, 2)
    group.wait(2)
    assert group.coordinator.has_gathered(1, 2) and not group.coordinator.has_gathered(2, 2)
    group.start(nodes=1)
    group.agents[0].end(0, 0)
    group.agents[0].end(1, 0)
    group.coordinator.gather()
    assert not group.coordinator.has_gathered(1, 2)
    group.wait(TIMING.patience + 0.5)
    assert group.coordinator.has_gathered(1, 2)


def test_stop_is_repeated_until_deadline():
    group = Group()
    group.start()
    for _ in range(16):
        group.coordinator.stop("TERM", 30.0)
        group.wait(0.5)
    assert group.agents[0].asked() == ["start", "signal", "signal", "signal"]
    group.agents[0].end(0, 137)  # while it saved: its peers have their time
    assert group.wait(60, State.KILL) == pytest.approx(TIMING.peer_grace, abs=1)
    group.wait(20, State.DECIDE)
    assert group.outcome.stop_requested and group.outcome.code == 137


def test_agents_are_not_lost_because_the_coordinator_was_stopped():
    """A container may be frozen, with coordinator and agents; time passes."""
    group = Group()
    group.start()
    group.clock.now += 100
    group.coordinator.tick()
    group.wait(TIMING.silence)
    assert group.state is State.RUN
    group.agents[0].is_silent = True
    group.wait(TIMING.silence + 1)
    assert group.agents[0].closed


@pytest.mark.parametrize("answer_seconds", [0.0, 8.0])
@pytest.mark.parametrize("is_taken", [False, True])
def test_silent_agent_is_lost_when_the_scheduler_has_taken_its_node_away(is_taken, answer_seconds):
    """A dead machine closes no connection. An answer that takes long is no pause of the coordinator."""
    group = Group(timing=TIMING._replace(silence=120.0))
    asked = []

    def lost_nodes(nodes):
        asked.append(list(nodes))
        group.clock.now += answer_seconds
        return [node for node in nodes if is_taken and len(asked) == 3]

    group.coordinator.lost_nodes = lost_nodes
    group.start()
    group.wait(20)
    assert asked == []
    group.agents[1].is_silent = True
    passed = group.wait(300, State.KILL) - TIMING.killed_grace
    assert group.agents[1].closed and not group.agents[0].closed and asked[0] == ["n1"]
    if is_taken:
        assert len(asked) == 3 and passed == pytest.approx(3 * (TIMING.query + answer_seconds), abs=1)
    else:
        assert passed == pytest.approx(120, abs=answer_seconds + 1)
    group.wait(20, State.DECIDE)
    assert group.outcome.lost == ("n1",) and ("has taken its node away" in group.outcome.reason) == is_taken


@pytest.mark.parametrize("is_asked", [False, True])
def test_agents_of_suspended_job_are_not_lost_while_they_kill(is_asked):
    """Slurm stops all processes of the job, those of the coordinator's node perhaps a little later and earlier."""
    group = Group()
    suspended = [is_asked]
    group.coordinator.is_suspended = lambda: suspended[0]
    group.start()
    for agent in group.agents:
        agent.is_silent = True
    group.coordinator.shorten_deadline(0.0)
    group.coordinator.tick()
    assert group.state is State.KILL
    if is_asked:
        group.wait(3600)
        suspended[0] = False
    else:
        group.clock.now += 3600
    for agent in group.agents:
        agent.is_silent = False
    group.wait(5)
    assert group.state is State.DECIDE
    assert group.outcome.lost == ()
    assert not any(agent.closed for agent in group.agents)


def test_second_agent_of_a_node_is_refused():
    group = Group()
    group.start()
    other = SimulatedAgent(group, "n1").hello()
    assert other.closed and other.asked() == ["leave"]
    assert not group.agents[1].closed and len(group.coordinator.running) == 4


def test_node_may_return_after_its_agent_was_lost():
    group = Group()
    group.coordinator.lost(group.agents[1].agent, "connection closed")
    again = SimulatedAgent(group, "n1").hello().get_ready()
    assert not again.closed and len(group.coordinator.ready()) == 2


@pytest.mark.parametrize("is_back", [False, True])
def test_excluded_node_does_not_come_back(is_back):
    """Its agent is asked to leave, also one that was lost and is back while the next attempt gathers."""
    group = Group(3)
    group.start(nodes=2)
    if is_back:
        group.coordinator.lost(group.agents[1].agent, "connection closed")
    else:
        for rank in (2, 3):
            group.agents[1].end(rank, 70)
    group.wait(60, State.DECIDE)
    group.coordinator.exclude("n1", "n1 is excluded")
    group.coordinator.gather()
    late = SimulatedAgent(group, "n1").hello()
    for agent in [late] + group.agents[1:2]:
        assert agent.closed
    assert late.messages == [{"is": "leave", "code": 0, "reason": "n1 is excluded"}]
    assert [agent.node for agent in group.coordinator.ready()] == ["n0", "n2"]


@pytest.mark.parametrize("has_said_hello", [False, True])
def test_agent_that_does_not_get_ready_is_dropped(has_said_hello):
    group = Group()
    late = SimulatedAgent(group, "n2")
    if has_said_hello:
        late.hello()
    late.is_silent = True  # it imports the trainer
    group.wait(TIMING.ready - 1)
    assert not late.closed and len(group.coordinator.ready()) == 2
    group.wait(2)
    assert late.closed and len(group.coordinator.agents) == 2
    assert group.coordinator.late_agent == "not ready for 10 s"


def test_silence_counts_only_for_agents_that_are_ready():
    """One that imports the trainer cannot send beats."""
    group = Group(timing=TIMING._replace(ready=600.0))
    group.coordinator.lost_nodes = lambda nodes: pytest.fail(f"the scheduler was asked for {nodes}")
    importing = SimulatedAgent(group, "n2").hello()
    importing.is_silent = True
    group.wait(300)
    assert not importing.closed
    assert len(importing.get_ready().group.coordinator.ready()) == 3


@pytest.mark.parametrize("messages", [["ready"], ["hello", "ready", "ready"], ["hello", "hello"]])
def test_agent_says_hello_and_gets_ready_once(messages):
    group = Group()
    agent = SimulatedAgent(group, "n2")
    for kind in messages:
        assert not agent.closed
        agent.say(kind, node="n2")
    assert agent.closed


@pytest.mark.parametrize("is_before_hello", [False, True])
def test_agent_that_imports_the_trainer_is_asked_to_leave(is_before_hello):
    group = Group(1)
    late = SimulatedAgent(group, "n1")
    if not is_before_hello:
        late.hello()
    group.coordinator.leave(74, "too few agents")
    assert group.agents[0].asked() == ["leave"]
    if is_before_hello:
        assert late.messages == []
        late.hello()
    assert late.messages == [{"is": "leave", "code": 74, "reason": "too few agents"}]


def test_agent_that_comes_after_the_end_is_asked_to_leave():
    group = Group()
    group.coordinator.leave()
    assert SimulatedAgent(group, "n9").hello().asked() == ["leave"]


@pytest.mark.parametrize("n", [0, 1])
def test_attempt_cannot_start_twice(n):
    group = Group()
    group.start(1)
    with pytest.raises(ValueError, match="cannot start"):
        group.start(2)
    for rank in range(4):
        group.agents[rank // 2].end(rank, 70)
    group.coordinator.gather()
    with pytest.raises(ValueError, match="cannot start"):
        group.start(n)


def test_attempt_needs_enough_agents():
    group = Group(nodes=1)
    with pytest.raises(ValueError, match="1 agents are ready, and 2 are needed"):
        group.start(nodes=2)
    assert group.state is State.GATHER and group.coordinator.attempt == 0


@pytest.mark.parametrize("seed", range(40))
def test_any_faults_lead_to_a_decision_in_bounded_time(seed):
    """Agents are lost, stuck, silent and return, and ranks fail, in every state. Each attempt ends, and knows why."""
    draws = random.Random(seed)
    group = Group(nodes=4, timing=TIMING._replace(peer_grace=2.0, stragglers=5.0))
    for n in range(1, 12):
        coordinator = group.coordinator
        group.wait(TIMING.first_patience, None)
        while len(coordinator.ready()) < 2:
            group.agents.append(SimulatedAgent(group, f"n{draws.randrange(99)}").hello().get_ready())
        group.agents = [agent for agent in group.agents if not agent.closed]
        if not coordinator.has_gathered(2, 3):
            group.wait(1)
        group.start(n, nodes=min(3, len(coordinator.ready())))
        start = group.clock.now
        world = len(coordinator.running)
        while coordinator.state is not State.DECIDE:
            assert group.clock.now - start < 60, group.lines
            agent = draws.choice(group.agents)
            fault = draws.choice(["end", "end", "close", "silent", "stuck", "stop", "none", "none", "none"])
            if fault == "end" and agent.ranks and not agent.closed:
                agent.end(draws.choice(list(agent.ranks)), draws.choice([0, 70, 75, 137]))
            elif fault == "close":
                coordinator.lost(agent.agent, "connection closed")
            elif fault == "silent":
                agent.is_silent = True
            elif fault == "stuck":
                agent.obeys = False
            elif fault == "stop":
                coordinator.stop("TERM", 5.0)
            group.wait(draws.choice([0.25, 1.0, 3.0]))
        assert not coordinator.running and len(coordinator._codes) == world
        assert coordinator.outcome.code in (None, 0, 70, 75, 137)
        if coordinator.outcome.code not in (0, 75):
            assert coordinator.outcome.reason
        coordinator.gather()


def test_agents_measure_network_until_they_answer_or_are_lost():
    group = Group(nodes=3)
    group.coordinator.measure_network(group.coordinator.ready(), [[0], [1], [2]], {"port": 9})
    names = ["n0", "n1", "n2"]
    places = [{"is": "network", "world": 3, "node": i, "ranks": [i], "nodes": names, "port": 9} for i in range(3)]
    assert [agent.messages for agent in group.agents] == [[place] for place in places]
    group.agents[0].say("health", health=[{"name": "network"}])
    assert group.coordinator.ready()[0].reported["health"] == [{"name": "network"}]
    assert [agent.node for agent in sorted(group.coordinator.measuring, key=lambda agent: agent.node)] == ["n1", "n2"]
    group.coordinator.lost(group.agents[1].agent, "connection lost")
    group.agents[2].say("health", health=[])
    assert not group.coordinator.measuring
