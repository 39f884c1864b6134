"""Tests of the signed lines between coordinator and agents, over real sockets."""

import json
import os
import resource
import socket
import threading
import time

import pytest

from flip.runs import records
from flip.runs.formats import AGENT_NUMBER
from jobs.host.agents import node_pool
from jobs.host.agents.channel import (
    AGENT,
    COORDINATOR,
    KEY_VARIABLE,
    LONGEST_HELLO,
    LONGEST_LINE,
    Channel,
    ChannelError,
    ConnectionLost,
    PortTaken,
    Signer,
    connect,
    listen,
    new_key,
    publish,
    read_contact,
    take_key,
)
from jobs.host.agents.coordinator import Coordinator, State
from jobs.host.agents.server import AgentServer


class Ends:
    """Both ends of a connection after their handshake, with what crosses it."""

    def __init__(self, key=None, other_key=None):
        self.key = key or new_key()
        self.sockets = socket.socketpair()
        self.coordinator = Channel(self.sockets[0], self.key, COORDINATOR)
        self.agent = Channel(self.sockets[1], other_key or self.key, AGENT)

    def shake_hands(self):
        (welcome,), ended = self.agent.receive()
        assert ended is None
        self.agent.hello(welcome, {"node": "n0"})
        (hello,), ended = self.coordinator.receive()
        assert ended is None and hello["node"] == "n0"
        return self

    def close(self):
        for end in self.sockets:
            end.close()


@pytest.fixture
def make_ends():
    made = []

    def make(*keys):
        made.append(Ends(*keys))
        return made[-1]

    yield make
    for ends in made:
        ends.close()


def wait_for(condition, server, seconds=10.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        server.poll(0.02)


def say_hello(channel, server, node="n0"):
    """Connect an agent to a server that this process polls."""
    messages = []
    wait_for(lambda: messages.extend(channel.receive()[0]) or messages, server)
    channel.hello(messages[0], {"node": node})
    wait_for(lambda: any(agent.node == node for agent in server._coordinator.agents), server)


def raw_line(sock, line):
    sock.setblocking(True)
    sock.sendall(line)
    sock.setblocking(False)


def test_messages_pass_in_both_directions(make_ends):
    ends = make_ends().shake_hands()
    for i in range(3):
        ends.coordinator.send({"is": "start", "attempt": i})
        ends.agent.send({"is": "exit", "rank": i})
    assert ends.agent.receive() == ([{"is": "start", "attempt": i} for i in range(3)], None)
    assert ends.coordinator.receive() == ([{"is": "exit", "rank": i} for i in range(3)], None)


def test_wrong_key_is_refused_by_both_sides(make_ends):
    ends = make_ends(new_key(), new_key())
    messages, error = ends.agent.receive()
    assert messages == [] and "not signed with the key" in str(error)
    stranger = Signer(new_key(), AGENT, COORDINATOR)
    raw_line(ends.sockets[1], stranger.sign({"is": "hello", "protocol": AGENT_NUMBER, "number": "0"}))
    messages, error = ends.coordinator.receive()
    assert messages == [] and "not signed with the key" in str(error) and not ends.coordinator.accepted


@pytest.mark.parametrize("kind", ["repeated", "reflected", "changed", "of an earlier connection", "not an object"])
def test_line_that_was_not_signed_for_this_place_is_refused(make_ends, kind):
    ends = make_ends().shake_hands()
    earlier = make_ends(ends.key).shake_hands()
    sign = ends.agent._signer.sign
    if kind == "repeated":
        line = sign({"is": "exit", "rank": 1})
        raw_line(ends.sockets[1], line + line)
    elif kind == "reflected":
        raw_line(ends.sockets[1], ends.coordinator._signer.sign({"is": "kill"}))
    elif kind == "changed":
        raw_line(ends.sockets[1], sign({"is": "exit", "rank": 1}).replace(b"1}", b"2}"))
    elif kind == "of an earlier connection":
        raw_line(ends.sockets[1], earlier.agent._signer.sign({"is": "beat"}))
    else:
        raw_line(ends.sockets[1], sign([1]))
    messages, error = ends.coordinator.receive()
    assert len(messages) == (kind == "repeated") and error is not None


@pytest.mark.parametrize("message", [{"is": "exit", "rank": 0}, {"is": "hello", "protocol": 1, "number": "1"}])
def test_first_message_must_be_a_hello_of_this_protocol(make_ends, message):
    ends = make_ends()
    (welcome,), _ = ends.agent.receive()
    ends.agent._signer.bind(welcome["number"])
    ends.agent.send(message)
    messages, error = ends.coordinator.receive()
    assert messages == [] and ("before hello" in str(error) or "version 1" in str(error))


def test_agent_refuses_coordinator_of_another_protocol(make_ends):
    ends = make_ends()
    with pytest.raises(ChannelError, match="version None"):
        ends.agent.hello({"is": "welcome"}, {})


def test_end_of_connection_is_reported_after_its_last_messages(make_ends):
    ends = make_ends().shake_hands()
    ends.agent.send({"is": "beat"})
    ends.agent.close()
    messages, error = ends.coordinator.receive()
    assert messages == [{"is": "beat"}] and str(error) == "connection closed"


def test_line_without_end_is_refused(make_ends):
    ends = make_ends().shake_hands()
    error = None
    for _ in range(LONGEST_LINE // 1000):
        ends.sockets[1].send(b"x" * 2000)
        _, error = ends.coordinator.receive()
        if error is not None:
            break
    assert str(error) == "a line without end"


def test_line_without_end_before_hello_is_refused_after_a_few_bytes(make_ends):
    ends = make_ends()
    ends.sockets[1].send(b"x" * (LONGEST_HELLO + 1))
    messages, error = ends.coordinator.receive()
    assert messages == [] and str(error) == "a line without end"


@pytest.mark.parametrize("answer", ["accepted", "leave"])
def test_agent_waits_for_the_answer_to_its_hello(make_ends, answer):
    """``leave`` is left to the caller, and so is whatever follows."""
    ends = make_ends()

    def answer_hello():
        deadline = time.monotonic() + 10.0
        while not ends.coordinator.accepted and time.monotonic() < deadline:
            ends.coordinator.receive()
        ends.coordinator.send({"is": answer})
        ends.coordinator.send({"is": "start"})

    thread = threading.Thread(target=answer_hello)
    thread.start()
    ends.agent.greet({"node": "n0"}, 10.0)
    thread.join()
    assert ends.agent.accepted == (answer == "accepted")
    messages, error = ends.agent.receive()
    assert error is None and [message["is"] for message in messages] == ["leave", "start"][ends.agent.accepted :]


def test_agent_gives_up_a_coordinator_that_closes_or_does_not_answer(make_ends):
    with pytest.raises(ChannelError, match="does not answer"):
        make_ends().agent.greet({"node": "n0"}, 0.05)
    ends = make_ends()
    ends.coordinator.close()
    with pytest.raises(ConnectionLost):
        ends.agent.greet({"node": "n0"}, 10.0)


def test_peer_that_reads_nothing_is_given_up_without_blocking(make_ends):
    ends = make_ends().shake_hands()
    with pytest.raises(ChannelError, match="it reads nothing"):
        for _ in range(10_000):
            ends.coordinator.send({"is": "start", "text": "x" * 1000})


def test_key_is_removed_from_environment():
    key = new_key()
    environ = {KEY_VARIABLE: key.hex(), "HOME": "/"}
    assert take_key(environ) == key and environ == {"HOME": "/"}
    for text in ("", "zz", "00ff"):
        with pytest.raises(ChannelError, match=KEY_VARIABLE):
            take_key({KEY_VARIABLE: text})


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no such limit")
def test_contact_is_refused_although_file_is_exchanged_after_it_was_read(tmp_path, monkeypatch):
    """A member of the group puts a file of its own in place of the coordinator's, and then puts that back."""
    path = tmp_path / "coordinator.json"
    publish(path, "coordinator", 1, new_key())
    path.rename(tmp_path / "own")
    publish(path, "other", 2, new_key())
    path.chmod(0o666)
    parse = records.parse

    def exchange(data):
        (tmp_path / "own").rename(path)
        return parse(data)

    monkeypatch.setattr(records, "parse", exchange)
    with pytest.raises(ChannelError, match="every user may write to it"):
        read_contact(path)
    assert (tmp_path / "own").exists(), "nothing of the other file is parsed"


def test_agent_gives_up_a_host_that_acknowledges_nothing():
    """The kernel ends the connection then, since the agent sends beats. Here only that it was asked to."""
    with listen("127.0.0.1", 20000, 29999) as listener, connect(*listener.getsockname(), 5.0) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


def test_listener_takes_next_free_port_of_range():
    with listen("127.0.0.1", 20000, 29999) as first:
        port = first.getsockname()[1]
        with listen("127.0.0.1", port, port + 50) as second:
            assert port < second.getsockname()[1] <= port + 50
        with pytest.raises(PortTaken, match=f"from {port} to {port}"):
            listen("127.0.0.1", port, port)


def test_server_admits_agents_with_the_key_alone():
    """A stranger that sends noise, or another run's agent, is dropped; the others are not affected."""
    key = new_key()
    coordinator = Coordinator()
    listener = listen("127.0.0.1", 20000, 29999)
    port = listener.getsockname()[1]
    server = AgentServer(coordinator, key, listener)
    try:
        noise = connect("127.0.0.1", port, 5.0)
        noise.sendall(b"GET / HTTP/1.0\r\n\r\n")
        good = Channel(connect("127.0.0.1", port, 5.0), key, AGENT)
        say_hello(good, server)
        assert good.receive() == ([{"is": "accepted"}], None)
        assert [agent.node for agent in coordinator.agents] == ["n0"] and not coordinator.ready()
        good.send({"is": "ready", "health": []})
        wait_for(coordinator.ready, server)
        coordinator.start(1, [[0]], {"address": "n0"})
        started = []
        wait_for(lambda: started.extend(good.receive()[0]) or started, server)
        assert started[0]["is"] == "start" and started[0]["ranks"] == [0]
        good.close()
        wait_for(lambda: coordinator.state is State.DECIDE, server)
        assert coordinator.outcome.lost == ("n0",)
        noise.close()
    finally:
        server.close()
    assert coordinator.agents == []


def test_server_at_its_limit_of_open_files_serves_others_and_accepts_when_one_is_free():
    """It waits in between, and does not spin: the listening socket stays readable."""
    key = new_key()
    coordinator = Coordinator()
    listener = listen("127.0.0.1", 20000, 29999)
    server = AgentServer(coordinator, key, listener)
    first = connect("127.0.0.1", listener.getsockname()[1], 5.0)
    clients = [first]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        say_hello(Channel(first, key, AGENT), server)
        clients.append(connect("127.0.0.1", listener.getsockname()[1], 5.0))
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        asked = [server._may_accept]
        for _ in range(4):
            server.poll()
            asked.append(server._may_accept)
        assert len(coordinator.agents) == 1 and asked == [True, False, True, False, True]
        first.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        say_hello(Channel(clients[1], key, AGENT), server, "n1")
        assert [agent.node for agent in coordinator.agents] == ["n1"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        server.close()
        for client in clients:
            client.close()


def test_second_coordinator_cannot_command_agents_of_the_first():
    """It has another key: a run's key is drawn for each start of its job."""
    first, second = socket.socketpair()
    agent = Channel(second, new_key(), AGENT)
    server = AgentServer(Coordinator(), new_key())
    server.add(first)
    messages, error = agent.receive()
    assert messages == [] and isinstance(error, ChannelError)
    agent.close()
    server.poll()
    assert server._coordinator.agents == []


def test_key_and_lines_are_not_the_same_twice():
    assert new_key() != new_key()
    left = Signer(b"0" * 32, AGENT, COORDINATOR)
    lines = {left.sign({"is": "beat"}) for _ in range(3)}
    assert len(lines) == 3
    mac, _, body = lines.pop().partition(b" ")
    assert len(mac) == 64 and json.loads(body) == {"is": "beat"}


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


FAMILIES = ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here"))]


@pytest.mark.parametrize("host", FAMILIES)
def test_agents_connect_by_ipv4_and_ipv6_and_ranks_get_an_address_that_works(host, monkeypatch):
    """The name of the node is Slurm's alone, unless a name service knows it."""
    key = new_key()
    listener = listen("", 20000, 30000)
    server = AgentServer(Coordinator(), key, listener)
    with connect(host, listener.getsockname()[1], 5.0) as sock:
        say_hello(Channel(sock, key, AGENT), server)
        (agent,) = server._coordinator.agents
        agent.node = "node-of-slurm.invalid"
        assert node_pool.address_of(agent) == host
        agent.node = "localhost"
        assert node_pool.address_of(agent) == "localhost"
        server.close()
