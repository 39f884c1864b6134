"""What every task of a Slurm step starts: ``python SNAPSHOT/jobs/host/rank_entry.py MODULE``. It becomes the worker of
one rank.

It holds back the signals that tell a run to stop until the worker listens (they stay pending over exec, so none is
lost and none kills), opens the log of its node, puts the names that ranks go by into the environment, and execs.
Standard library alone: nothing here may fail for want of a package, since the log is opened here.
"""

import fcntl
import hashlib
import os
import re
import resource
import signal
import socket
import struct
import sys
from typing import Dict, Mapping, Optional

#: Below the ports that systems give out by themselves.
PORTS = (10000, 30000)
#: Exit code, as in flip.runs.errors.
STORAGE = 69
#: Linux' request for the address of an interface.
SIOCGIFADDR = 0x8915


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
    raise_limits()
    os.environ.update(environment(os.environ))
    os.environ.update(gloo_interface(os.environ))
    try:
        open_log(os.environ)
        os.chdir(os.environ["FLIP_SNAPSHOT"])
    except OSError as error:  # this node's trouble with files, which says nothing against the run
        text = "rank %s on %s: %s\n" % (os.environ["RANK"], os.environ.get("SLURMD_NODENAME"), error)
        try:
            os.write(2, text.encode("utf-8", "replace"))
        finally:  # standard error may lie on the same full disk; that must not change the exit code
            os._exit(STORAGE)
    os.execv(sys.executable, [sys.executable, "-m", sys.argv[1], os.environ["FLIP_RUN"]])


def raise_limits() -> None:
    """Soft limits up to the hard ones: Slurm hands on those of the shell that submits. Of files every rank needs three
    per rank of the run and more, beyond the usual 1024 of a shell; seconds of CPU are few where login nodes count them.
    """
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_CPU):
        hard = resource.getrlimit(kind)[1]
        try:
            resource.setrlimit(kind, (hard, hard))
        except (ValueError, OSError):  # a system that gives less than its hard limit: as before
            continue


def open_log(environ: Mapping[str, str]) -> None:
    """Standard output and error go to the files of this node and attempt."""
    logs = os.path.join(environ["FLIP_RUN"], "logs", environ["FLIP_ATTEMPT"])
    for number, kind in ((1, "out"), (2, "err")):
        name = "node%s.%s" % (environ["NODE_RANK"], kind)
        handle = os.open(os.path.join(logs, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, number)
        os.close(handle)


def environment(given: Mapping[str, str]) -> Dict[str, str]:
    """RANK, LOCAL_RANK, NODE_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, from Slurm's names.

    A MASTER_ADDR that is there already stays. The port follows from job and attempt: the same on all ranks, and another
    one when the job starts again, so that a port that was taken, or a straggler that holds it, is left behind.
    """
    size, nodes = int(given["SLURM_NTASKS"]), int(given["SLURM_NNODES"])
    return {
        "RANK": given["SLURM_PROCID"],
        "LOCAL_RANK": given["SLURM_LOCALID"],
        "NODE_RANK": given["SLURM_NODEID"],
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size // nodes),
        "MASTER_ADDR": given.get("MASTER_ADDR") or address(given),
        "MASTER_PORT": str(port(given["SLURM_JOB_ID"], given["FLIP_ATTEMPT"])),
    }


def port(job: str, attempt: str) -> int:
    digest = hashlib.sha256(("%s/%s" % (job, attempt)).encode()).digest()
    return PORTS[0] + int.from_bytes(digest[:8], "big") % (PORTS[1] - PORTS[0])


def address(given: Mapping[str, str]) -> str:
    """Of rank 0 for the others: the first node's name, or the address from which srun starts where no name service
    knows it (srun runs on the first node)."""
    name = first_host(given["SLURM_JOB_NODELIST"])
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return given.get("SLURM_LAUNCH_NODE_IPADDR") or name
    return name


def first_host(nodes: str) -> str:
    """The first name of a list of Slurm's: ``n[03-07,12],m1`` -> ``n03``. A container has no scontrol to ask."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", first.group(0)) if first else ""


def last_host(nodes: str) -> str:
    """The last name: ``n[03-07,12]`` -> ``n12``."""
    last = re.search(r"(?:[^,\[\]]|\[[^\]]*\])+$", nodes)
    return re.sub(r"\[[^\]]*?([^,\-\]]*)\]", r"\1", last.group(0)) if last else ""


def gloo_interface(given: Mapping[str, str]) -> Dict[str, str]:
    """GLOO_SOCKET_IFNAME for a node that the others could not reach: gloo tells them the address of its own name, which
    is 127.0.1.1 in the /etc/hosts of Debian and Ubuntu.

    It is the interface that leads to rank 0. Rank 0's node, whose name leads to itself, takes that which holds the
    address from which srun starts, or leads to the last node. Where gloo finds an address that is no loopback's, and
    where nothing is found here, all stays as it was.
    """
    if (
        int(given["SLURM_NNODES"]) < 2
        or given.get("GLOO_SOCKET_IFNAME")
        or not resolves_to_loopback(socket.gethostname())
    ):
        return {}
    known = (given["MASTER_ADDR"], given.get("SLURM_LAUNCH_NODE_IPADDR"), last_host(given["SLURM_JOB_NODELIST"]))
    for toward in filter(None, known):
        try:
            name = interface(toward)
        except (OSError, UnicodeError):  # no such name, or no way there: as before
            continue
        if name:
            return {"GLOO_SOCKET_IFNAME": name}
    return {}


def resolves_to_loopback(name: str) -> bool:
    """Whether gloo, which takes the first address of a name that can be bound, and else loopback, takes loopback."""
    try:
        found = socket.getaddrinfo(name, None, 0, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return True
    for family, kind, _, _, place in found:
        try:
            with socket.socket(family, kind) as probe:
                probe.bind(place)
        except OSError:
            continue
        return str(place[0]).startswith("127.") or place[0] == "::1"
    return True


def interface(toward: str) -> Optional[str]:
    """Name of the interface by which packets to a host leave, by IPv4. None where it is the loopback's. OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((toward, 9))  # sends nothing
        mine = probe.getsockname()[0]
        if mine.startswith("127."):
            return None
        for _, name in socket.if_nameindex():  # the way to an address of our own is lo; this finds its holder
            try:
                reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", os.fsencode(name)))
            except OSError:  # it has no such address
                continue
            if socket.inet_ntoa(reply[20:24]) == mine:
                return name
    return None


if __name__ == "__main__":
    main()
