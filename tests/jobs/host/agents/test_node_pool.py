"""Tests of the nodes of a job through their agents, with stand-ins for the sockets; tests/jobs/host/test_job.py and
test_kill_at_every_state.py have real agents."""

import socket
import time
from types import SimpleNamespace

import pytest

from flip.runs import attempts
from flip.runs.errors import NODE_LOST
from flip.runs.next_step import Allocation
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, read_json
from jobs.host.agents import node_pool
from jobs.host.agents.channel import CONTACT, NO_AGENTS, PortTaken, read_contact
from jobs.host.agents.coordinator import AttemptOutcome, Coordinator, State
from jobs.host.agents.node_pool import NodePool
from jobs.host.job_nodes import JobNodes


class AgentConnection:
    """In place of the connection to an agent."""

    def __init__(self):
        self.messages = []
        self.is_closed = False

    def send(self, message):
        if message["is"] != "accepted":
            self.messages.append(message)

    def close(self):
        self.is_closed = True


class Agents:
    """In place of the sockets: what agents send, and a clock that waits advance.

    ``events``: (second, function of the pool). ``answers``: node -> its check of the network, at once.
    """

    def __init__(self, pool):
        self.pool = pool
        self.coordinator = pool.coordinator
        self.now = 0.0
        self.events = []
        self.answers = {}
        self.step_ends = float("inf")
        """When the step of the agents has ended."""
        self.is_closed = False

    def poll(self, seconds=0.0):
        self.now += seconds
        for event in [event for event in self.events if event[0] <= self.now]:
            self.events.remove(event)
            event[1]()
        for agent in self.coordinator.ready():
            self.coordinator.received(agent, {"is": "beat"})
        for agent in list(self.coordinator.measuring):
            message = {"is": "health", "health": [self.answers[agent.node]]}
            self.coordinator.received(agent, message)
        self.coordinator.tick()

    def close(self):
        self.is_closed = True

    def connect(self, index, node=None):
        """An agent says hello; returns it."""
        agent = self.coordinator.connected(AgentConnection())
        self.coordinator.received(agent, {"is": "hello", "node": node or f"n{index}", "index": index})
        return agent

    def ready(self, agent, **facts):
        self.coordinator.received(agent, {"is": "ready", **facts})

    def at(self, second, do, *arguments):
        self.events.append((second, lambda: do(*arguments)))


@pytest.fixture
def make_pool(tmp_path, monkeypatch):
    """``make_pool(total, usable, ranks_per_node)``: the pool of attempt 1. Its agents are ``.server``, its log
    ``.lines``."""
    monkeypatch.setenv("SLURM_JOB_ID", "57")
    clock = []
    monotonic = lambda: clock[-1].now if clock else 0.0  # noqa: E731
    monkeypatch.setattr(node_pool, "time", SimpleNamespace(monotonic=monotonic, time=time.time))

    def make(total=1, usable=None, ranks_per_node=1, peer_seconds=20.0):
        run = RunDir(tmp_path / "sweep" / "run")
        attempts.start_attempt(run, {})
        lines = []
        pool = NodePool(
            run,
            JobNodes(total, usable or [total], ranks_per_node),
            lambda seconds: pool.poll(seconds),
            lambda text: lines.append(str(text)),
            lambda: False,
            lambda nodes: (),
            lambda: agents.now >= agents.step_ends,
            peer_seconds,
            lambda *_: agents,
        )
        agents = Agents(pool)
        clock.append(agents)
        pool.lines = lines
        pool.open(1, ("127.0.0.1", 10000))
        return pool

    return make


@pytest.mark.parametrize("seconds, graces", [(20.0, (20.0, 2.0)), (120, (20.0, 2.0)), (5, (5, 2.0)), (1, (1, 1))])
def test_profile_limits_the_time_of_peers(make_pool, seconds, graces):
    timing = make_pool(peer_seconds=seconds).coordinator.timing
    assert (timing.peer_grace, timing.killed_grace) == graces


@pytest.mark.parametrize(
    "code, lost, expected", [(70, (), 70), (70, ("n8",), NODE_LOST), (None, ("n8",), NODE_LOST), (75, (), 75)]
)
def test_code_of_attempt_with_lost_node_says_so(code, lost, expected):
    assert node_pool.exit_code(AttemptOutcome(code, lost, False, "")) == expected


# -- gathering ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ready, gathers", [((90.0, 100.0), 100.0), ((90.0,), None), ((1.0, 2.0, 110.0), 110.0)])
def test_first_start_waits_for_agents_that_import_although_a_spare_node_has_none(make_pool, ready, gathers):
    pool = make_pool(3, [2])
    for index, second in enumerate(ready):
        pool.server.at(second, pool.server.ready, pool.server.connect(index))
    assert pool.gather_first() == bool(gathers)
    assert pool.server.now == pytest.approx(gathers or node_pool.CONNECT_SECONDS, abs=0.5)


def test_first_start_waits_ten_minutes_for_an_import(make_pool):
    pool = make_pool(2, [2])
    for index, second in enumerate((90.0, 5000.0)):
        pool.server.at(second, pool.server.ready, pool.server.connect(index))
    assert not pool.gather_first()
    assert pool.server.now == pytest.approx(node_pool.IMPORT_SECONDS, abs=1.0)


def test_first_start_waits_without_limit_for_the_first_agent_while_the_step_lives(make_pool):
    """Its images may be loaded."""
    pool = make_pool(1)
    pool.server.step_ends = 3 * node_pool.IMPORT_SECONDS
    assert not pool.gather_first() and pool.server.now >= pool.server.step_ends


@pytest.mark.parametrize("returns, ready, seconds", [(20.0, 2, 20.0), (300.0, 1, node_pool.RETURN_SECONDS)])
def test_next_attempt_waits_for_an_agent_that_was_killed(make_pool, returns, ready, seconds):
    pool = make_pool(2)
    first, second = pool.server.connect(0), pool.server.connect(1)
    pool.server.ready(first)
    pool.server.ready(second)
    pool.coordinator.lost(second, "killed")
    pool.server.at(returns, lambda: pool.server.ready(pool.server.connect(1)))
    pool.open_gathering()
    assert pool.gather(2) == ready and pool.server.now == pytest.approx(seconds, abs=0.5)


def test_agent_that_died_while_the_scheduler_was_asked_is_not_counted(make_pool):
    pool = make_pool(2)
    agents = [pool.server.connect(index) for index in (0, 1)]
    for agent in agents:
        pool.server.ready(agent)
    pool.server.at(0.0, pool.coordinator.lost, agents[1], "killed")
    pool.open_gathering()
    assert pool.gather(2) == 1


def test_no_agent_is_awaited_after_the_end_of_their_step(make_pool):
    pool = make_pool(2)
    pool.server.ready(pool.server.connect(0))
    pool.open_gathering()
    pool.server.step_ends = 3.0
    assert pool.gather(2) == 1 and pool.server.now == pytest.approx(3.0, abs=0.5)


def test_allocation_of_ready_nodes_counts_a_node_that_was_excluded_and_lost_once(make_pool):
    """Of n0 to n3, n3 was excluded, and Slurm has dropped n2 and n3."""
    pool = make_pool(4, [2])
    for index in (1, 0):
        pool.server.ready(pool.server.connect(index))
    pool.coordinator.excluded = {"n3": "it is excluded"}
    before = Allocation(3, [2], 600.0, 2, held={"n0", "n1", "n2"}, excluded=("n3",))
    allocation = pool.allocation_of_ready(before)
    assert (allocation.nodes, allocation.held, allocation.excluded) == (2, ["n0", "n1"], ())
    assert allocation._replace(nodes=3, held=before.held, excluded=("n3",)) == before


@pytest.mark.parametrize("code, seconds", [(0, node_pool.LEAVE_SECONDS), (NO_AGENTS, node_pool.IMPORT_SECONDS)])
def test_agents_are_asked_to_leave_and_get_time_for_it(make_pool, code, seconds):
    """If srun is to start the ranks, those that import the trainer must learn that."""
    pool = make_pool(1)
    agent = pool.server.connect(0)
    pool.leave(code)
    assert agent.channel.messages == [{"is": "leave", "code": code, "reason": ""}]
    assert pool.server.is_closed and pool.server.now == pytest.approx(seconds, abs=0.5)


def test_leaving_ends_with_the_last_agent(make_pool):
    pool = make_pool(1)
    pool.server.at(3.0, pool.coordinator.lost, pool.server.connect(0), "connection closed")
    pool.leave(0)
    assert pool.server.is_closed and pool.server.now == pytest.approx(3.0, abs=0.5)


# -- an attempt --------------------------------------------------------------------------------------------------------


def test_attempt_runs_on_the_first_nodes_and_ranks_meet_on_the_first_of_them(make_pool):
    """The first node of the job, whose address all agents have, is left out."""
    pool = make_pool(3, [2], ranks_per_node=2)
    agents = [pool.server.connect(index, node="localhost" if index == 1 else None) for index in range(3)]
    for agent in agents:
        pool.server.ready(agent)
    pool.coordinator.exclude("n0", "unhealthy")

    def end_ranks():
        for agent, ranks in ((agents[1], (0, 1)), (agents[2], (2, 3))):
            for rank in ranks:
                pool.coordinator.received(agent, {"is": "exit", "attempt": 4, "rank": rank, "code": 0})

    pool.server.at(5.0, end_ranks)
    outcome = pool.run_attempt(4, 2)
    assert (outcome.code, outcome.lost, pool.coordinator.state) == (0, (), State.DECIDE)
    starts = [agent.channel.messages[-1] for agent in agents[1:]]
    assert [(each["attempt"], each["world"], each["node"], each["ranks"]) for each in starts] == [
        (4, 4, 0, [0, 1]),
        (4, 4, 1, [2, 3]),
    ]
    assert all(each["environment"]["MASTER_ADDR"] == "localhost" for each in starts)
    ports = {each["environment"]["MASTER_PORT"] for each in starts}
    assert len(ports) == 1
    assert [message["is"] for message in agents[0].channel.messages] == ["leave"]


def test_ranks_on_the_first_node_of_the_job_have_its_address_already(make_pool):
    pool = make_pool(1)
    agent = pool.server.connect(0)
    pool.server.ready(agent)
    pool.server.at(1.0, pool.coordinator.lost, agent, "killed")
    outcome = pool.run_attempt(1, 1)
    assert (outcome.code, outcome.lost) == (None, ("n0",))
    assert list(agent.channel.messages[0]["environment"]) == ["MASTER_PORT"]


# -- health and network ------------------------------------------------------------------------------------------------


SLOW_LINKS = "network: links, to its peers: 2 GB/s over the faster one; the median of all nodes is 10"


@pytest.fixture
def measuring(make_pool):
    """Make the pool of a job whose nodes n0, n1, ... have these rates of the faster of their links, in GB/s."""

    def make(rates, can=True):
        pool = make_pool(len(rates))
        for i, rate in enumerate(rates):
            pool.server.ready(pool.server.connect(i), network=can)
            result = {"text": f"all-reduce: {rate} GB/s", "rates": {"links, to its peers": 1e9 * rate}}
            pool.server.answers[f"n{i}"] = {"name": "network", "state": "ok", **result}
        pool.lines.clear()
        return pool

    return make


def test_node_with_slow_links_is_left_out_if_a_spare_is_there(measuring):
    pool = measuring([10, 2, 10])
    pool.measure_network()
    assert pool.lines == ["network: all-reduce: 10 GB/s"]
    assert pool.exclude_unhealthy(2) == {} and pool.coordinator.excluded == {"n1": SLOW_LINKS}
    assert f"health of n1: {SLOW_LINKS}" in pool.lines


def test_node_with_slow_links_without_a_spare_stops_the_start(measuring):
    pool = measuring([10, 2, 10])
    pool.measure_network()
    assert pool.exclude_unhealthy(3) == {"n1": SLOW_LINKS}
    assert pool.coordinator.excluded == {} and len(pool.coordinator.ready()) == 3


def test_unhealthy_node_that_slurm_gives_although_it_is_excluded_is_used(measuring):
    """No other node is free."""
    pool = measuring([10, 2, 10])
    pool.measure_network()
    attempts.end_attempt(pool.run, 1, EndFacts(NODE_LOST, "RUNNING", unhealthy={"n1": SLOW_LINKS}))
    assert read_json(pool.run.attempt(1) / "end.json")["exclude"] == ["n1"]
    assert pool.exclude_unhealthy(3) == {}


def test_health_is_logged_once(measuring):
    pool = measuring([10, 2, 10])
    pool.measure_network()
    for _ in range(2):
        pool.exclude_unhealthy(3)
    assert pool.lines.count(f"health of n1: {SLOW_LINKS}") == 1


def test_checks_that_cannot_be_read_are_logged_and_stop_nothing(make_pool):
    pool = make_pool(1)
    pool.server.ready(pool.server.connect(0), health=[{"name": 1}, 7])
    assert pool.exclude_unhealthy(1) == {} and any(line.startswith("n0: ") for line in pool.lines)


def test_network_is_measured_again_only_with_a_new_node(measuring):
    pool = measuring([10, 10, 10])
    pool.measure_network()
    channels = [agent.channel for agent in pool.coordinator.ready()]
    assert [message["is"] for channel in channels for message in channel.messages] == ["network"] * 3
    pool.coordinator.lost(pool.coordinator.ready()[2], "killed")
    pool.measure_network()
    assert [len(channel.messages) for channel in channels] == [1, 1, 1]
    agent = pool.server.connect(9)
    pool.server.ready(agent, network=True)
    pool.server.answers["n9"] = pool.server.answers["n0"]
    pool.measure_network()
    assert [len(channel.messages) for channel in channels] == [2, 2, 1] and len(agent.channel.messages) == 1


@pytest.mark.parametrize(("rates", "can", "logged"), [([10], True, []), ([10, 10], False, ["network: not measured: "])])
def test_single_rank_and_agents_without_torch_measure_no_network(measuring, rates, can, logged):
    pool = measuring(rates, can)
    pool.measure_network()
    assert [line[:23] for line in pool.lines] == logged
    assert not any(agent.channel.messages for agent in pool.coordinator.ready())


def test_measurement_that_does_not_end_is_given_up(measuring, monkeypatch):
    pool = measuring([10, 10])
    monkeypatch.setattr(Agents, "poll", lambda self, seconds=0.0: setattr(self, "now", self.now + seconds))
    pool.measure_network()
    assert pool.server.now == pytest.approx(node_pool.NETWORK_SECONDS, abs=0.5)
    assert pool.exclude_unhealthy(2) == {} and pool.lines


# -- the port ----------------------------------------------------------------------------------------------------------


def test_server_listens_at_its_place_and_publishes_it_with_a_key(tmp_path):
    (tmp_path / "attempts").mkdir()
    contact = tmp_path / "attempts" / CONTACT
    servers = []
    try:
        for _ in range(2):
            servers.append(node_pool.open_server(Coordinator(), contact, ("127.0.0.1", 20000), print))
            host, port, key = read_contact(contact)
            assert (host, len(key)) == ("127.0.0.1", 32) and 20000 + len(servers) - 1 <= port < 30000
            socket.create_connection((host, port), 10).close()
    finally:
        for server in servers:
            server.close()


def test_port_is_free_again_if_the_contact_cannot_be_written(tmp_path):
    opened = []

    def listen(*place):
        opened.append(node_pool_listen(*place))
        return opened[0]

    node_pool_listen = node_pool.listen
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(node_pool, "listen", listen)
        node_pool.open_server(Coordinator(), tmp_path / "absent" / CONTACT, ("127.0.0.1", 20000), print)
    assert opened[0].fileno() == -1


def test_pool_without_a_port_is_an_error_of_its_own(make_pool, monkeypatch):
    def refuse(*_):
        raise PortTaken("no free port")

    pool = make_pool(1)
    pool._open_server = refuse
    with pytest.raises(OSError, match="no free port"):
        pool.open(1, ("127.0.0.1", 10000))
