"""The sockets of a coordinator: passes what agents send to it, and notices connections that end.

On one machine the only connection is one end of a socket pair; between nodes, agents connect to a listening port.
Standard library, Python >= 3.6.
"""

import errno
import select
import socket
from typing import Dict, Optional

from jobs.host.agents.channel import COORDINATOR, Channel, ChannelError
from jobs.host.agents.coordinator import Agent, Coordinator


class AgentServer:
    """Connects a coordinator with its agents. ``listener``: a listening socket (``channel.listen``), or None."""

    def __init__(self, coordinator: Coordinator, key: bytes, listener: Optional[socket.socket] = None) -> None:
        self._coordinator = coordinator
        self._key = key
        self._listener = listener
        self._may_accept = True
        """Cleared for one call of ``poll`` when no descriptor is free: the listener stays readable."""

    def add(self, sock: socket.socket) -> None:
        """Talk to an agent over a connected socket."""
        try:
            channel = Channel(sock, self._key, COORDINATOR)
        except ChannelError:  # it has gone already
            sock.close()
            return
        self._coordinator.connected(channel)

    def poll(self, seconds: float = 0.0) -> None:
        """Handle what has come, or comes within ``seconds``, and what is due by the clock."""
        for agent in self._wait(seconds):
            self._serve(agent)
        self._coordinator.tick()

    def close(self) -> None:
        """End all connections; agents then let their ranks save, and end."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for agent in list(self._coordinator.agents):
            self._coordinator.lost(agent, "the coordinator ends")

    def _wait(self, seconds: float) -> Dict[Agent, int]:
        """The agents whose connections are ready, after new connections were accepted."""
        poll = select.poll()
        agents = {agent.channel.fileno(): agent for agent in self._coordinator.agents}
        for number, agent in agents.items():
            events = select.POLLIN
            if agent.channel.has_unsent:
                events |= select.POLLOUT
            poll.register(number, events)
        if self._listener is not None and self._may_accept:
            poll.register(self._listener, select.POLLIN)
        self._may_accept = True
        ready = dict(poll.poll(int(1000 * seconds)))
        if self._listener is not None and self._listener.fileno() in ready:
            self._accept()
        return {agents[number]: event for number, event in ready.items() if number in agents}

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as error:  # it has gone already, or it waits for a free descriptor
            self._may_accept = error.errno not in (errno.EMFILE, errno.ENFILE)
            return
        self.add(sock)

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
