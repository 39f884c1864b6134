"""Tests of connections to a coordinator that are no agents', over real sockets."""

import socket

import pytest

from jobs.host.agents import strangers
from jobs.host.agents.channel import AGENT, Channel, new_key
from jobs.host.agents.strangers import HELLO_SECONDS, LOG_SECONDS, MOST_STRANGERS, Strangers


class Place:
    """Strangers with simulated time; the other ends of their connections stay open."""

    def __init__(self):
        self.now = 1000.0
        self.lines = []
        self.key = new_key()
        self.strangers = Strangers(self.key, self.lines.append, lambda: self.now)
        self.ends = []

    def connect(self, address="10.0.0.9"):
        own, other = socket.socketpair()
        self.ends.append(other)
        self.strangers.add(own, address)
        return other

    def wait(self, seconds):
        self.now += seconds
        self.strangers.tick()

    def close(self):
        self.strangers.close()
        for end in self.ends:
            end.close()


@pytest.fixture
def place():
    place = Place()
    yield place
    place.close()


def is_closed(end):
    end.setblocking(False)
    try:
        while end.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    return True


def serve(place):
    return [place.strangers.serve(stranger) for stranger in place.strangers.by_descriptor().values()]


def test_connection_without_hello_is_closed_after_ten_seconds(place):
    end = place.connect()
    assert HELLO_SECONDS == 10.0
    place.wait(9.0)
    assert not is_closed(end)
    place.wait(2.0)
    assert is_closed(end) and not place.strangers.by_descriptor()


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.0\r\n\r\n", b"x" * (1 << 14), b"\0\n"])
def test_noise_is_no_hello(place, noise):
    end = place.connect()
    end.sendall(noise)
    assert serve(place) == [None] and is_closed(end)


def test_connection_with_hello_is_no_stranger(place):
    agent = Channel(place.connect(), place.key, AGENT)
    (welcome,), _ = agent.receive()
    agent.hello(welcome, {"node": "n1"})
    agent.send({"is": "ready"})
    (stranger,) = place.strangers.by_descriptor().values()
    messages, ended = place.strangers.serve(stranger)
    assert [message["is"] for message in messages] == ["hello", "ready"] and ended is None
    place.wait(3600.0)
    assert not is_closed(agent.socket) and place.lines == []


def test_too_many_connections_close_the_oldest_of_the_address_with_the_most(place):
    """Nodes of the job have other addresses than a stranger who opens many."""
    agents = [place.connect(f"10.0.0.{number}") for number in range(1, 9)]
    flood = [place.connect("10.0.7.7") for _ in range(MOST_STRANGERS)]
    assert not any(map(is_closed, agents))
    assert [is_closed(end) for end in flood] == [True] * 8 + [False] * (MOST_STRANGERS - 8)


def test_strangers_are_counted_in_a_line_per_minute(place):
    for second in range(int(LOG_SECONDS)):
        place.connect()
        place.connect("10.0.0.8").close()
        serve(place)
        place.wait(1.0)
        assert len(place.lines) == 1, second
    place.wait(1.0)
    assert len(place.lines) == 2
    assert place.lines[0].startswith("1 connections were closed that were no agents of this run, ")
    assert "from 10.0.0.8: connection " in place.lines[0]
    place.wait(LOG_SECONDS)
    total = sum(int(line.split()[0]) for line in place.lines)
    assert total == 2 * LOG_SECONDS and "no hello for 10 s" in place.lines[-1]
    place.wait(LOG_SECONDS)
    assert len(place.lines) == 3, "without strangers no line"


def test_connection_that_ends_at_once_is_no_error(place, monkeypatch):
    own, other = socket.socketpair()
    other.close()
    place.strangers.add(own, "10.0.0.8")
    assert own.fileno() == -1 or serve(place) == [None]
    monkeypatch.setattr(strangers, "LOG_SECONDS", 0.0)
    place.wait(1.0)
    assert len(place.lines) == 1
