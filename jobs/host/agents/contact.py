"""How a node agent of a Slurm job searches for the coordinator of the job.

The coordinator publishes its address and the key of the run (``channel.publish``). An agent tries that address and
those that Slurm gives for the first node. Standard library, Python >= 3.6.
"""

import os
import socket
import time
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Sequence

from jobs.host.agents.channel import AGENT, Channel, ChannelError, connect, read_contact

CONNECT_SECONDS = 60.0
"""For which an agent searches for the coordinator of its job."""
TRY_SECONDS = 5.0
"""For one address."""
POLL_SECONDS = 0.2
UNPUBLISHED = "it has not published its port"


class NoCoordinator(Exception):
    """The coordinator of a job cannot be reached. ``errors``: address -> the last error there; empty if no address was
    published, or if the published one cannot be read."""

    def __init__(self, text: str, errors: Mapping[str, Exception]) -> None:
        super().__init__(text)
        self.errors = dict(errors)


def own_facts(environ: Mapping[str, str]) -> Dict[str, Any]:
    """What an agent says of itself: its node, by the scheduler's name, and the number of it in the allocation."""
    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    return {"node": node, "index": int(environ.get("SLURM_NODEID", 0)), "pid": os.getpid()}


def find_coordinator(
    path: Path,
    hosts: Sequence[str],
    environ: Mapping[str, str],
    seconds: float,
    is_ending: Callable[[], bool] = lambda: False,
) -> Channel:
    """Connect to the coordinator that publishes its address in the file ``path``, and say hello.

    ``hosts``: further addresses of its node. Many strangers at its port may have displaced a connection before its
    hello: it is made again. Raises NoCoordinator after ``seconds``, or after one try if ``is_ending``.
    """
    deadline = time.monotonic() + seconds
    problem = UNPUBLISHED
    errors: Dict[str, Exception] = {}
    while time.monotonic() < deadline:
        try:
            contact = read_contact(path)
        except (ChannelError, ValueError, OSError) as error:
            contact = None
            problem = str(error)
        if contact is not None:
            own_host, port, key = contact
            errors = {}
            for host in _addresses(own_host, hosts):
                try:
                    return _greeted(host, port, key, environ, deadline)
                except (ChannelError, OSError) as error:
                    errors[host] = error
            problem = "; ".join("%s, port %d: %s" % (host, port, error) for host, error in errors.items())
        if is_ending():
            problem += "; Slurm ends the job"
            break
        time.sleep(POLL_SECONDS)
    raise NoCoordinator(problem, errors)


def _addresses(own_host: str, hosts: Sequence[str]) -> Sequence[str]:
    """The published address first, and each once."""
    if not own_host:
        return hosts
    return [own_host] + [host for host in hosts if host != own_host]


def _greeted(host: str, port: int, key: bytes, environ: Mapping[str, str], deadline: float) -> Channel:
    """The channel of a new connection, after hello. Raises ChannelError, OSError."""
    sock = connect(host, port, TRY_SECONDS)
    try:
        channel = Channel(sock, key, AGENT)
        channel.greet(own_facts(environ), deadline - time.monotonic())
    except ChannelError:
        sock.close()
        raise
    return channel
