"""Connections to a coordinator that have not shown that they are agents of its run: ``Strangers``.

Every user of the network may connect to the port of a coordinator. A connection becomes that of an agent by a correct
hello, which an agent sends at once. Until then it is a stranger: it cannot displace an agent, has little time and
memory, and is not logged by itself. Standard library, Python >= 3.6.
"""

import socket
import time
from collections import Counter
from typing import Callable, Dict, List, Optional, Tuple

from jobs.host.agents.channel import COORDINATOR, Channel, ChannelError, Message

HELLO_SECONDS = 10.0
"""From a connection to its hello."""
MOST_STRANGERS = 256
"""If there are more, the oldest one of the address with the most is closed. An agent connects again then."""
LOG_SECONDS = 60.0
"""Between two lines of the log about strangers."""


class Stranger:
    """A connection without a hello."""

    def __init__(self, channel: Channel, address: str, now: float) -> None:
        self.channel = channel
        self.address = address
        self.since = now


class Strangers:
    """``key``: of the run. ``log``: called with a sentence, at most once a minute (``LOG_SECONDS``)."""

    def __init__(self, key: bytes, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._key = key
        self._log = log
        self._clock = clock
        self._strangers: List[Stranger] = []  # the oldest first
        self._closed = 0
        """Since the last line of the log."""
        self._last = ""
        """Address of the stranger that was closed last, and why."""
        self._logged_at = float("-inf")

    def by_descriptor(self) -> Dict[int, Stranger]:
        return {stranger.channel.fileno(): stranger for stranger in self._strangers}

    def add(self, sock: socket.socket, address: str) -> None:
        """Send welcome to a new connection from ``address``."""
        try:
            channel = Channel(sock, self._key, COORDINATOR)
        except ChannelError as error:  # it has gone already
            sock.close()
            self._count(address, str(error))
            return
        self._strangers.append(Stranger(channel, address, self._clock()))
        if len(self._strangers) > MOST_STRANGERS:
            self._close(self._surplus(), "too many connections without a hello")

    def serve(self, stranger: Stranger) -> Optional[Tuple[List[Message], Optional[ChannelError]]]:
        """Read from a connection. None if it is still a stranger, or was closed; else its messages, the first of which
        is hello, and why it has ended or None: from now on it belongs to the caller."""
        if stranger not in self._strangers:
            return None
        messages, ended = stranger.channel.receive()
        if stranger.channel.accepted:
            self._strangers.remove(stranger)
            return messages, ended
        if ended is not None:
            self._close(stranger, str(ended))
        return None

    def tick(self) -> None:
        """Close connections without a hello for too long, and log how many were closed, when that is due."""
        now = self._clock()
        for stranger in list(self._strangers):
            if now - stranger.since > HELLO_SECONDS:
                self._close(stranger, "no hello for %g s" % HELLO_SECONDS)
        if self._closed and now - self._logged_at >= LOG_SECONDS:
            self._write_log(now)

    def close(self) -> None:
        """Close all connections, and log what was not logged yet."""
        for stranger in self._strangers:
            stranger.channel.close()
        self._strangers = []
        if self._closed:
            self._write_log(self._clock())

    def _surplus(self) -> Stranger:
        """The stranger to close: agents have other addresses than a process that opens many connections."""
        counts = Counter(stranger.address for stranger in self._strangers)
        most = max(counts.values())
        return next(stranger for stranger in self._strangers if counts[stranger.address] == most)

    def _close(self, stranger: Stranger, why: str) -> None:
        self._strangers.remove(stranger)
        stranger.channel.close()
        self._count(stranger.address, why)

    def _count(self, address: str, why: str) -> None:
        self._closed += 1
        self._last = "%s: %s" % (address, why)

    def _write_log(self, now: float) -> None:
        text = "%d connections were closed that were no agents of this run, the last one from %s"
        self._log(text % (self._closed, self._last))
        self._closed = 0
        self._logged_at = now
