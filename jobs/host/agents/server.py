"""The sockets of a coordinator: passes what agents send to it, and notices connections that end.

On one machine the only connection is one end of a socket pair; between nodes, agents connect to a listening port, to
which others may connect, too: a connection without a correct hello never reaches the coordinator (``strangers.py``).
Standard library, Python >= 3.6.
"""

import errno
import select
import socket
from typing import Callable, Dict, Optional, Union

from jobs.host.agents.channel import COORDINATOR, Channel, ChannelError, plain_address
from jobs.host.agents.coordinator import Agent, Coordinator
from jobs.host.agents.strangers import Stranger, Strangers

MOST_ACCEPTED = 32
"""New connections in one call of ``poll``: agents are served in between."""


class AgentServer:
    """Connects a coordinator with its agents.

    ``listener``: a listening socket (``channel.listen``), or None. ``log``: called with a sentence about connections
    that were no agents.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        key: bytes,
        listener: Optional[socket.socket] = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._coordinator = coordinator
        self._key = key
        self._listener = listener
        self._strangers = Strangers(key, log)
        self._may_accept = True
        """Cleared for one call of ``poll`` when no descriptor is free: the listener stays readable."""

    def add(self, sock: socket.socket) -> None:
        """Talk to an agent over a connected socket that no other process has."""
        try:
            channel = Channel(sock, self._key, COORDINATOR)
        except ChannelError:  # it has gone already
            sock.close()
            return
        self._coordinator.connected(channel)

    def poll(self, seconds: float = 0.0) -> None:
        """Handle what has come, or comes within ``seconds``, and what is due by the clock."""
        for connection in self._wait(seconds):
            if isinstance(connection, Stranger):
                self._serve_stranger(connection)
            else:
                self._serve(connection)
        self._strangers.tick()
        self._coordinator.tick()

    def close(self) -> None:
        """End all connections; agents then let their ranks save, and end."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._strangers.close()
        for agent in list(self._coordinator.agents):
            self._coordinator.lost(agent, "the coordinator ends")

    def _wait(self, seconds: float) -> Dict[Union[Agent, Stranger], int]:
        """The agents and strangers whose connections are ready, after new connections were accepted."""
        poll = select.poll()
        connections: Dict[int, Union[Agent, Stranger]] = {}
        connections.update(self._strangers.by_descriptor())
        connections.update((agent.channel.fileno(), agent) for agent in self._coordinator.agents)
        for number, connection in connections.items():
            events = select.POLLIN
            if connection.channel.has_unsent:
                events |= select.POLLOUT
            poll.register(number, events)
        if self._listener is not None and self._may_accept:
            poll.register(self._listener, select.POLLIN)
        self._may_accept = True
        ready = dict(poll.poll(int(1000 * seconds)))
        served = {connections[number]: event for number, event in ready.items() if number in connections}
        if self._listener is not None and self._listener.fileno() in ready:
            self._accept(self._listener)
        return served

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(MOST_ACCEPTED):
            try:
                sock, address = listener.accept()
            except OSError as error:  # no more, it has gone already, or it waits for a free descriptor
                self._may_accept = error.errno not in (errno.EMFILE, errno.ENFILE)
                return
            self._strangers.add(sock, plain_address(address[0]))

    def _serve_stranger(self, stranger: Stranger) -> None:
        greeting = self._strangers.serve(stranger)
        if greeting is None:
            return
        messages, ended = greeting
        agent = self._coordinator.connected(stranger.channel)
        for message in messages:
            self._coordinator.received(agent, message)
        if ended is not None:
            self._coordinator.lost(agent, str(ended))

    def _serve(self, agent: Agent) -> None:
        try:
            agent.channel.flush()
        except ChannelError as error:
            self._coordinator.lost(agent, str(error))
            return
        messages, ended = agent.channel.receive()
        for message in messages:
            self._coordinator.received(agent, message)
        if ended is not None:
            self._coordinator.lost(agent, str(ended))
