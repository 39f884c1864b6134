"""Tries whether node agents connect on a site: ``python -I probe.py FOLDER SECONDS``, the task of a node.

The task of the first node serves a coordinator that starts no ranks. Every task searches for it as a node agent does
(``contact.py``), says hello, waits until it is accepted, and prints one line: ``MARK`` and a JSON object with

    node, nodes   the name of its node, and Slurm's list of all nodes of the step
    problem       empty if it was accepted, else why not
    kind          of the problem: listen, folder, name or network
    store         the first of several nodes: the address at which the store of rank 0 would listen; empty: all
    coordinator   the same of the coordinator of node agents

FOLDER: all nodes share it, for coordinator.json. SECONDS: for which a node searches. `flip doctor --try-agents`
starts a Slurm step of these tasks and reads the lines (``jobs/slurm/agents_trial.py``). No run is needed, and torch is
not imported. Standard library, Python >= 3.6.
"""

import json
import os
import select
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Dict, List, Mapping, MutableMapping, Set

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from flip.runs.node_address import address_for_others
from jobs.host import rank_entry
from jobs.host.agents import contact
from jobs.host.agents.channel import CONTACT, Channel
from jobs.host.agents.coordinator import TIMING, Coordinator
from jobs.host.agents.node_pool import open_server
from jobs.host.scheduler import listening_address

MARK = "result of a node agent: "
"""Start of the line of a task. A TaskProlog may print others."""

LISTEN = "listen"
"""The first node cannot listen or publish its address."""
FOLDER = "folder"
"""The node does not see the address that the first node has published."""
NAME = "name"
"""The node does not know the name of the first node."""
NETWORK = "network"
"""The node does not reach a port of the first node."""

LEAVE_SECONDS = 10.0
"""For agents to end their connections."""


class ProbeCoordinator:
    """The coordinator on the first node: accepts an agent of each node, then asks all to leave."""

    def __init__(self, folder: Path, environ: MutableMapping[str, str], seconds: float) -> None:
        self.problem = ""
        """Why it does not listen."""
        self._nodes = int(environ["SLURM_NNODES"])
        self._deadline = time.monotonic() + seconds
        self._coordinator = Coordinator(TIMING._replace(ready=seconds))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        place = (listening_address(self._nodes, environ), rank_entry.port(environ["SLURM_JOB_ID"], "agents"))
        try:
            self._server = open_server(self._coordinator, folder / CONTACT, place, print_error)
        except OSError as error:
            self.problem = str(error)
            return
        self._thread.start()

    def join(self) -> None:
        """Wait until all agents have left."""
        if self._thread.is_alive():
            self._thread.join()

    def _serve(self) -> None:
        seen: Set[str] = set()
        while len(seen) < self._nodes and time.monotonic() < self._deadline:
            self._server.poll(contact.POLL_SECONDS)
            seen.update(agent.node for agent in self._coordinator.agents if agent.node)
        self._coordinator.leave()
        end = time.monotonic() + LEAVE_SECONDS
        while self._coordinator.agents and time.monotonic() < end:
            self._server.poll(contact.POLL_SECONDS)
        self._server.close()


def main(arguments: List[str]) -> int:
    folder = Path(arguments[0])
    seconds = float(arguments[1])
    os.environ.pop("SLURM_LAUNCH_NODE_IPADDR", "")  # srun of a job is on its first node; here it is on another machine
    if not os.environ.get("MASTER_ADDR"):
        os.environ["MASTER_ADDR"] = rank_entry.address(os.environ)
    coordinator = None
    if os.environ["SLURM_NODEID"] == "0":
        coordinator = ProbeCoordinator(folder, os.environ, seconds)
        if coordinator.problem:
            report({"problem": coordinator.problem, "kind": LISTEN})
            return 0
    report(dict(try_agent(folder, seconds), **listens(os.environ)))
    if coordinator is not None:
        coordinator.join()
    return 0


def listens(environ: Mapping[str, str]) -> Dict[str, str]:
    """The addresses at which the store of rank 0 and the coordinator listen; none but on the first of several nodes."""
    nodes = int(environ["SLURM_NNODES"])
    if nodes < 2 or environ["SLURM_NODEID"] != "0":
        return {}
    store = address_for_others(environ.get("MASTER_ADDR", ""))
    return {"store": store, "coordinator": listening_address(nodes, environ)}


def try_agent(folder: Path, seconds: float) -> Dict[str, str]:
    """Connect as the agent of this node, and stay until the coordinator asks it to leave. Returns problem and kind."""
    hosts = rank_entry.coordinator_hosts(os.environ)
    try:
        channel = contact.find_coordinator(folder / CONTACT, hosts, os.environ, seconds)
    except contact.NoCoordinator as error:
        return {"problem": str(error), "kind": kind_of(error)}
    if not channel.accepted:
        return {"problem": "the coordinator does not accept this node", "kind": NETWORK}
    wait_for_leave(channel, seconds)
    return {"problem": "", "kind": ""}


def kind_of(error: contact.NoCoordinator) -> str:
    """The kind of problem of a search that has failed."""
    if not error.errors:
        return FOLDER
    if all(isinstance(each, (socket.gaierror, UnicodeError)) for each in error.errors.values()):
        return NAME
    return NETWORK


def wait_for_leave(channel: Channel, seconds: float) -> None:
    """Return when the coordinator asks this agent to leave, or ends."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        select.select([channel], [], [], contact.POLL_SECONDS)
        messages, ended = channel.receive()
        if ended is not None or any(message["is"] == "leave" for message in messages):
            break
    channel.close()


def print_error(text: object) -> None:
    print(text, file=sys.stderr, flush=True)


def report(result: Dict[str, str]) -> None:
    """Print the line of this task."""
    place = {"node": contact.own_facts(os.environ)["node"], "nodes": os.environ.get("SLURM_JOB_NODELIST", "")}
    print(MARK + json.dumps(dict(result, **place), sort_keys=True), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
