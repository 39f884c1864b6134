"""Connections between the coordinator of a run and its node agents: lines of JSON that both sides sign.

A line is ``MAC JSON``: the HMAC-SHA256 in hexadecimal digits, a space, and an object with ``is``, the kind of message:

    welcome  coordinator  protocol (AGENT_NUMBER), number: the first line of a connection; the agent answers with hello
    hello    agent        protocol, number, node, index: at once, before the agent imports the trainer. A connection
                          without hello for 10 s is closed (``strangers.py``)
    accepted coordinator  the agent belongs to the run. Without this answer it connects again. A second agent of a node
                          is asked to leave instead while the first is connected
    ready    agent        health: the agent can start ranks. ``network``: whether it can be asked to measure that
    network  coordinator  world, node, ranks, nodes; environment: measure the network with the agents of all ``nodes``
    health   agent        health: as in ready, with the result of network
    start    coordinator  attempt, world, node, ranks; environment: start these ranks. ``attempt`` must be above all
                          that the agent has started
    exit     agent        attempt, rank, code, killed: a rank has ended; 128 + n if signal n has ended it. Ends of an
                          earlier attempt are ignored
    beat     agent        each second after ready. After 120 s without any message the agent is lost, and its ranks
                          with it; after 5 s if Slurm has taken its node out of the job
    signal   coordinator  attempt, signal: send the signal TERM or USR2 to the ranks
    kill     coordinator  attempt: SIGKILL the ranks with all their processes, and report their ends; after 120 s
                          without these the agent is lost. With a ``reason`` the ranks are recorded as hung
    leave    coordinator  reason; code: the agent ends, with this exit code. An agent whose connection ends lets its
                          ranks save for 90 s, kills the remaining ones, and ends

Both sides have the key of the run, 32 random bytes that the coordinator draws, from ``KEY_VARIABLE`` (on one machine,
until the agent starts ranks; never on a command line) or from the file that ``publish`` writes (mode 0600). It is never
sent. The key of a line is the run's key, then HMAC(key, number of welcome), then, after hello, HMAC(that key, number of
hello). The MAC is of ``ROLE POSITION JSON``: coordinator or agent, and the number of lines that this side has sent
before. So a line can neither be forged, repeated nor sent back, in this connection or in another one. A wrong MAC, a
line above ``LONGEST_LINE`` (before hello: ``LONGEST_HELLO``), an unknown message or another protocol ends the
connection. Nothing is encrypted, and nothing that was received is executed.

Coordinator and agents share this file: standard library, Python >= 3.6. docs/node_agents.md has the rules.
"""

import hashlib
import hmac
import json
import os
import select
import socket
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, MutableMapping, Optional, Tuple

from flip.files.creation import RefusedPath, atomic_write
from flip.runs.formats import AGENT_NUMBER
from flip.runs.rundir import SUBMIT_AGAIN, read_trusted_record

KEY_VARIABLE = "FLIP_AGENT_KEY"
"""Environment variable with the key in hexadecimal digits. An agent removes it before it starts ranks."""

KEY_BYTES = 32
CONTACT = "coordinator.json"
"""File of ``publish`` in the folder of the first attempt of a job."""

LONGEST_LINE = 1 << 20
"""Bytes. A longer line, or more than this that the other side has not read, ends the connection."""

LONGEST_HELLO = 1 << 12
"""Bytes of a line that comes before a correct hello."""

RECEIVE_BYTES = 1 << 16

COORDINATOR_GONE = b"gone"
"""What an agent without a coordinator writes to its task, before its ranks have saved."""

GONE_CODE = 79
"""Exit code of an agent whose coordinator is gone."""

NO_AGENTS = 74
"""Exit code of an agent that has reached no coordinator, or is not used (sysexits' EX_IOERR, of no other process): srun
then starts the ranks."""

UNANSWERED_SECONDS = 60.0
"""For which the coordinator's host may acknowledge nothing. Without a limit Linux tries for a quarter of an hour."""

COORDINATOR = "coordinator"
AGENT = "agent"

Message = Dict[str, Any]


class ChannelError(Exception):
    """A connection that can no longer be used, and why: closed, silent, or a line that was not signed with its key."""


class ConnectionLost(ChannelError):
    """The other side has ended, or cannot be reached any more."""


class PortTaken(OSError):
    """No port of a range is free."""


def new_key() -> bytes:
    """A random key for one run."""
    return os.urandom(KEY_BYTES)


def take_key(environ: MutableMapping[str, str]) -> bytes:
    """Remove the key from the environment and return it. Raises ChannelError if there is none."""
    try:
        key = bytes.fromhex(environ.pop(KEY_VARIABLE, ""))
    except ValueError as error:
        raise ChannelError("%s is damaged: %s" % (KEY_VARIABLE, error)) from error
    if len(key) != KEY_BYTES:
        raise ChannelError("%s has %d bytes instead of %d" % (KEY_VARIABLE, len(key), KEY_BYTES))
    return key


def publish(path: Path, host: str, port: int, key: bytes) -> None:
    """Write the address and the key of a coordinator for its agents, which only this user may read. Raises OSError."""
    with atomic_write(path, 0o600, "ascii") as file:
        json.dump({"host": host, "port": port, "key": key.hex()}, file)


def read_contact(path: Path) -> Optional[Tuple[str, int, bytes]]:
    """(host, port, key) that ``publish`` wrote; None if the file does not exist yet. The host is empty if the
    coordinator listens at all addresses: agents then know it from the scheduler.

    The opened file is checked. Raises ChannelError if another user may have written it, ValueError if it is damaged.
    """
    try:
        record = read_trusted_record(path, SUBMIT_AGAIN)
    except RefusedPath as error:
        raise ChannelError(str(error)) from error
    if record is None:
        return None
    return record["host"], record["port"], take_key({KEY_VARIABLE: record["key"]})


class Signer:
    """Signs the lines of one side of a connection, and checks those of the other side."""

    def __init__(self, key: bytes, own: str, other: str) -> None:
        self._secret = key
        self._own = own
        self._other = other
        self._sent = 0
        self._received = 0

    def bind(self, number: str) -> None:
        """Derive the key of all further lines from ``number``, which one of the sides has drawn."""
        self._secret = hmac.new(self._secret, number.encode("ascii", "replace"), hashlib.sha256).digest()

    def sign(self, message: Mapping[str, Any]) -> bytes:
        body = json.dumps(message, sort_keys=True).encode("ascii")
        mac = self._mac(self._own, self._sent, body)
        self._sent += 1
        return mac + b" " + body + b"\n"

    def check(self, line: bytes) -> Message:
        """The message of a line without its end. Raises ChannelError."""
        mac, _, body = line.partition(b" ")
        if not hmac.compare_digest(mac, self._mac(self._other, self._received, body)):
            raise ChannelError("a line that was not signed with the key of this run")
        self._received += 1
        try:
            message = json.loads(body.decode("ascii"))
        except ValueError as error:
            raise ChannelError("a line that is not JSON: %s" % error) from error
        if not isinstance(message, dict) or not isinstance(message.get("is"), str):
            raise ChannelError("a message without its kind")
        return message

    def _mac(self, sender: str, position: int, body: bytes) -> bytes:
        head = ("%s %d " % (sender, position)).encode("ascii")
        return hmac.new(self._secret, head + body, hashlib.sha256).hexdigest().encode("ascii")


class Channel:
    """One side of a connection. It never blocks; ``flush`` sends what the other side was not ready for.

    The coordinator sends ``welcome`` with its random number, the agent answers ``hello`` with its own (``greet``).
    ``accepted``: for the coordinator, whether a correct hello has come; for the agent, whether ``accepted`` has.
    """

    def __init__(self, sock: socket.socket, key: bytes, role: str) -> None:
        self.socket = sock
        self.accepted = False
        self._role = role
        self._signer = Signer(key, role, AGENT if role == COORDINATOR else COORDINATOR)
        self._unread = b""
        self._unsent = b""
        self._early: List[Message] = []
        """Messages that came while ``greet`` waited for others."""
        sock.setblocking(False)
        if role == COORDINATOR:
            number = os.urandom(16).hex()
            self.send({"is": "welcome", "protocol": AGENT_NUMBER, "number": number})
            self._signer.bind(number)

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def greet(self, fields: Mapping[str, Any], seconds: float) -> None:
        """As an agent, answer ``welcome`` with ``fields`` about this node, and wait for the answer of the coordinator.

        If this is not ``accepted``, but ``leave``, it is the next message. Raises ChannelError, also after ``seconds``.
        """
        deadline = time.monotonic() + seconds
        self.hello(self._next(deadline), fields)
        answer = self._next(deadline)
        if answer["is"] == "accepted":
            self.accepted = True
        else:
            self._early.insert(0, answer)

    def hello(self, welcome: Message, fields: Mapping[str, Any]) -> None:
        """The first part of ``greet``."""
        _check_protocol(welcome)
        self._signer.bind(str(welcome.get("number")))
        number = os.urandom(16).hex()
        self.send(dict(fields, **{"is": "hello", "protocol": AGENT_NUMBER, "number": number}))
        self._signer.bind(number)

    def _next(self, deadline: float) -> Message:
        """The next message, for which this call waits."""
        while not self._early:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise ChannelError("the coordinator does not answer")
            poll = select.poll()
            poll.register(self.socket, select.POLLIN)
            poll.poll(int(1000 * remaining) + 1)
            self._early, ended = self.receive()
            if ended is not None and not self._early:
                raise ended
        return self._early.pop(0)

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises ChannelError."""
        self._unsent += self._signer.sign(message)
        if len(self._unsent) > LONGEST_LINE:
            raise ChannelError("it reads nothing")
        self.flush()

    def flush(self) -> None:
        """Send as much as the other side is ready for. Raises ChannelError."""
        while self._unsent:
            try:
                sent = self.socket.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise ConnectionLost("connection lost: %s" % error) from error
            self._unsent = self._unsent[sent:]

    def receive(self) -> Tuple[List[Message], Optional[ChannelError]]:
        """(the messages that have come, why the connection has ended or None)."""
        messages = self._early
        self._early = []
        try:
            ended = self._read()
            while b"\n" in self._unread:
                line, _, self._unread = self._unread.partition(b"\n")
                messages.append(self._check(line))
            if len(self._unread) > self._longest_line:
                raise ChannelError("a line without end")
        except ChannelError as error:
            return messages, error
        return messages, ended

    def _read(self) -> Optional[ChannelError]:
        """Read what has come; returns why the connection has ended."""
        while len(self._unread) <= self._longest_line:
            try:
                data = self.socket.recv(RECEIVE_BYTES)
            except (BlockingIOError, InterruptedError):
                return None
            except OSError as error:
                return ConnectionLost("connection lost: %s" % error)
            if not data:
                return ConnectionLost("connection closed")
            self._unread += data
        return None

    @property
    def _longest_line(self) -> int:
        if self._role == COORDINATOR and not self.accepted:
            return LONGEST_HELLO
        return LONGEST_LINE

    def _check(self, line: bytes) -> Message:
        message = self._signer.check(line)
        if self._role == COORDINATOR and not self.accepted:
            if message["is"] != "hello":
                raise ChannelError("it says %s before hello" % message["is"])
            _check_protocol(message)
            self._signer.bind(str(message.get("number")))
            self.accepted = True
        return message


def _check_protocol(message: Message) -> None:
    if message.get("protocol") != AGENT_NUMBER:
        raise ChannelError(
            "it has version %r of the messages, and this side %d" % (message.get("protocol"), AGENT_NUMBER)
        )


def listen(host: str, first: int, last: int) -> socket.socket:
    """A listening socket on the first free port of a range. Raises PortTaken if none is free.

    ``host``: an address of this machine; empty: all addresses, of IPv4 and IPv6.
    """
    for port in range(first, last + 1):
        server = _open(host)
        try:
            server.bind((host, port))
            server.listen(128)
        except OSError:
            server.close()
            continue
        server.setblocking(False)
        return server
    raise PortTaken("no free port on %s from %d to %d" % (host, first, last))


def _open(host: str) -> socket.socket:
    if ":" not in host and (host or not _has_ipv6()):
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    if not host:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return server


def _has_ipv6() -> bool:
    """Whether this machine can listen at an address of IPv6: the kernel or a container may lack it."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("", 0))
    except OSError:
        return False
    return True


def peer_address(channel: Any) -> str:
    """The address from which the other side of a connection between two machines has connected."""
    return plain_address(channel.socket.getpeername()[0])


def plain_address(address: str) -> str:
    """An address as IPv4 writes it, if a socket of IPv6 was reached by IPv4."""
    if address.startswith("::ffff:"):
        return address[7:]
    return address


def connect(host: str, port: int, seconds: float) -> socket.socket:
    """Connect to a coordinator. Raises OSError."""
    sock = socket.create_connection((host, port), seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNANSWERED_SECONDS))
    return sock
