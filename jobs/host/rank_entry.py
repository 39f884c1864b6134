"""The start of a rank: every task of a Slurm step runs ``python -I SNAPSHOT/jobs/host/rank_entry.py MODULE``.

It blocks the signals that stop a run until the rank process handles them (they stay pending over exec, so none is lost
and none kills), opens the log of its node, sets the environment variables of its rank, and executes the module.
In a step of agents (``AGENTS_VARIABLE``), which has one task per node, it runs the agent of its node instead.
Standard library alone: a missing package must not fail here, before the log is open. ``-I``: the PYTHONPATH of a
TaskProlog, which may hide modules, has no effect here.
"""

import fcntl
import hashlib
import os
import resource
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Dict, List, Mapping, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from jobs.host.node_list import first_host, last_host

PORTS = (10000, 30000)  # below the ephemeral ports
AGENTS_VARIABLE = "FLIP_AGENTS"  # in the environment of a step of agents (jobs/slurm/batch_script.py)
GPUS = ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS")  # set and not empty if the job has GPUs
MALLOC = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0"  # huge pages by madvise, for the heap alone
    ":glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=67108864"  # bytes
)
INTERFACES_6 = Path("/proc/net/if_inet6")  # a line per address: its hexadecimal digits first, its interface last
SIOCGIFADDR = 0x8915  # Linux' ioctl for the address of an interface


def main() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
    from flip.files.creation import RefusedPath  # after the signals are blocked
    from flip.files.python_path import standard_library_first, variables
    from flip.runs.errors import CONFIG, PERMISSION

    raise_limits()
    os.environ.update(environment(os.environ))
    os.environ.update(gloo_interface(os.environ))
    os.environ.update(allocator(os.environ))
    is_agent = bool(os.environ.pop(AGENTS_VARIABLE, ""))
    try:
        if not is_agent:  # an agent opens a log for each attempt
            open_log(os.environ)
        os.chdir(os.environ["FLIP_SNAPSHOT"])
    except OSError as error:  # a file problem of this node, no fault of the run, or a prepared link
        text = "rank %s on %s: %s\n" % (os.environ["RANK"], os.environ.get("SLURMD_NODENAME"), error)
        code = unstarted_code(error)
        if isinstance(error, RefusedPath):
            code = PERMISSION
        try:
            os.write(2, text.encode("utf-8", "replace"))
        finally:  # standard error may lie on the same full disk; that must not change the exit code
            os._exit(code)
    # a TaskProlog may have replaced the value of the batch script
    inherited = standard_library_first(os.environ.get("PYTHONPATH", ""))
    os.environ.update(variables(os.environ["FLIP_SNAPSHOT"], inherited))
    problem = missing_module(sys.argv[1], os.environ)
    if problem:
        try:
            os.write(2, problem.encode("utf-8", "replace"))
        finally:  # as above
            os._exit(CONFIG)
    if is_agent:
        from jobs.host.agents.entry import supervise

        os._exit(supervise(sys.argv[1], coordinator_hosts(os.environ), os.environ))
    os.execv(sys.executable, [sys.executable, "-m", sys.argv[1], os.environ["FLIP_RUN"]])


def missing_module(module: str, environ: Mapping[str, str]) -> str:
    """The error text if a rank would not find its module; empty if it does. Nothing is imported."""
    places = environ["PYTHONPATH"].split(os.pathsep) + sys.path[1:]  # the first is the folder of this code
    paths = [os.path.join(place, *module.split(".")) for place in places]
    if any(os.path.isfile(path + ".py") or os.path.isdir(path) for path in paths):
        return ""
    text = "rank %s on %s: no module %s in PYTHONPATH=%s, whose first folder is the code of the run. "
    remedy = (
        "Restore that code, or submit the run again. If the module belongs to the site, a TaskProlog that exports"
        " PYTHONPATH may have replaced its folder: ask for one that extends the value.\n"
    )
    values = (environ["RANK"], environ.get("SLURMD_NODENAME"), module, environ["PYTHONPATH"])
    return text % values + remedy


def unstarted_code(error: OSError) -> int:
    """The exit code of a rank that cannot open a file of its run. On a full disk, which all nodes share, it is no fault
    of this node: the code of storage. Else the node may lack the mount."""
    from flip.runs.errors import FULL_DISK_ERRNOS, STORAGE, UNSTARTED  # `main` has loaded it

    if error.errno in FULL_DISK_ERRNOS:
        return STORAGE
    return UNSTARTED


def raise_limits() -> None:
    """Raise soft limits to the hard ones: Slurm passes on those of the submitting shell.

    A rank opens more than three files per rank of the run, beyond the usual 1024, login nodes limit CPU time, and
    InfiniBand locks the memory that it sends.
    """
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_CPU, resource.RLIMIT_MEMLOCK):
        hard = resource.getrlimit(kind)[1]
        try:
            resource.setrlimit(kind, (hard, hard))
        except (ValueError, OSError):  # a system that grants less than its hard limit: unchanged
            continue


def allocator(environ: Mapping[str, str]) -> Dict[str, str]:
    """Settings for the allocators of torch and of glibc that the user has not configured.

    PYTORCH_ALLOC_CONF: expandable segments. Packed texts change the shapes of tensors in every step, which fragments
    memory in segments of fixed size. GLIBC_TUNABLES, without GPUs: freed memory stays in the process, in huge pages.
    Otherwise each step returns it to the kernel, which clears it again page by page: 11 % of the processor time of a
    step of 2M/8.
    """
    settings = {}
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & set(environ):
        settings["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    has_gpus = any(environ.get(name) for name in GPUS)
    if not has_gpus and "GLIBC_TUNABLES" not in environ and not any(name.startswith("MALLOC_") for name in environ):
        settings["GLIBC_TUNABLES"] = MALLOC
    return settings


def open_log(environ: Mapping[str, str]) -> None:
    """Redirect standard output and error to the files of this node and attempt."""
    from flip.files.creation import open_append

    logs = os.path.join(environ["FLIP_RUN"], "logs", environ["FLIP_ATTEMPT"])
    for number, kind in ((1, "out"), (2, "err")):
        name = "node%s.%s" % (environ["NODE_RANK"], kind)
        with open_append(os.path.join(logs, name)) as file:
            os.dup2(file.fileno(), number)


def environment(environ: Mapping[str, str]) -> Dict[str, str]:
    """RANK, LOCAL_RANK, NODE_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT from Slurm's variables.

    An existing MASTER_ADDR is kept. The port depends on job and attempt: it is the same on all ranks, and a restart
    uses another, in case the port was taken or a process of the earlier start holds it.
    """
    size = int(environ["SLURM_NTASKS"])
    nodes = int(environ["SLURM_NNODES"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "NODE_RANK": environ["SLURM_NODEID"],
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size // nodes),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or address(environ),
        "MASTER_PORT": str(port(environ["SLURM_JOB_ID"], environ["FLIP_ATTEMPT"])),
    }


def port(job: str, attempt: str) -> int:
    digest = hashlib.sha256(("%s/%s" % (job, attempt)).encode()).digest()
    return PORTS[0] + int.from_bytes(digest[:8], "big") % (PORTS[1] - PORTS[0])


def address(environ: Mapping[str, str]) -> str:
    """The address of rank 0: the first node's name or, if no name service knows it, the address from which srun starts.

    srun runs on the first node.
    """
    name = first_host(environ["SLURM_JOB_NODELIST"])
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return environ.get("SLURM_LAUNCH_NODE_IPADDR") or name
    return name


def coordinator_hosts(environ: Mapping[str, str]) -> List[str]:
    """Addresses of the first node, where the coordinator listens: the batch script runs there."""
    if int(environ["SLURM_NNODES"]) < 2:
        return ["127.0.0.1"]
    names = [environ["MASTER_ADDR"], address(environ), environ.get("SLURM_LAUNCH_NODE_IPADDR", "")]
    return [name for number, name in enumerate(names) if name and name not in names[:number]]


def gloo_interface(environ: Mapping[str, str]) -> Dict[str, str]:
    """GLOO_SOCKET_IFNAME, if other nodes could not reach this one; else empty.

    gloo publishes the address of its own host name, which is 127.0.1.1 in the /etc/hosts of Debian and Ubuntu. The
    interface that routes to rank 0 is set instead. The node of rank 0, whose name leads to itself, takes the one that
    holds the address from which srun starts, or routes to the last node.
    """
    if int(environ["SLURM_NNODES"]) < 2 or environ.get("GLOO_SOCKET_IFNAME"):
        return {}
    if not resolves_to_loopback(socket.gethostname()):
        return {}
    last = last_host(environ["SLURM_JOB_NODELIST"])
    for target in filter(None, (environ["MASTER_ADDR"], environ.get("SLURM_LAUNCH_NODE_IPADDR"), last)):
        try:
            name = interface(target)
        except (OSError, UnicodeError):  # no such name, or no route: unchanged
            continue
        if name:
            return {"GLOO_SOCKET_IFNAME": name}
    return {}


def resolves_to_loopback(name: str) -> bool:
    """Whether gloo uses loopback: it takes the first address of a name that can be bound, else loopback."""
    from flip.runs.node_address import address_here  # after the signals are blocked

    address = address_here(name)
    return not address or is_loopback(address)


def interface(target: str) -> Optional[str]:
    """Name of the interface that routes to a host, by IPv4 or else by IPv6; None for loopback. Raises OSError."""
    try:
        return _interface_4(target)
    except OSError:
        return _interface_6(target)


def own_address(target: str) -> str:
    """The address from which this node reaches a host, by IPv4 or else by IPv6. Raises OSError, UnicodeError."""
    try:
        return _source_address(socket.AF_INET, target)
    except OSError:
        return _source_address(socket.AF_INET6, target)


def _source_address(family: int, target: str) -> str:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 9))  # sends nothing
        return str(probe.getsockname()[0]).partition("%")[0]


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _interface_4(target: str) -> Optional[str]:
    own = _source_address(socket.AF_INET, target)
    if is_loopback(own):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():  # the route to an own address is lo; find its holder
            try:
                reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", os.fsencode(name)))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(reply[20:24]) == own:
                return name
    return None


def _interface_6(target: str) -> Optional[str]:
    own = socket.inet_pton(socket.AF_INET6, _source_address(socket.AF_INET6, target)).hex()
    for line in INTERFACES_6.read_text(encoding="ascii").splitlines():
        words = line.split()
        if words[0] == own and words[-1] != "lo":
            return words[-1]
    return None


if __name__ == "__main__":
    main()
