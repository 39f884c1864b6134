"""Tests at which addresses ranks on several nodes listen: two nodes, simulated by namespaces of the kernel."""

import ipaddress
import os
import subprocess
import sys

import pytest

from tests.jobs.host.test_rank_entry import NODE, ROOT, TASK, can_create_namespaces

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not can_create_namespaces(), reason="may not open name spaces for networks here"),
]

MEETING = f"""
import datetime, os, socket, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from torch import distributed
from flip.distributed import parallel

def address(digits):
    data = bytes.fromhex(digits)
    words = b"".join(data[i : i + 4][::-1] for i in range(0, len(data), 4))  # of the processor's order
    return socket.inet_ntop(socket.AF_INET if len(data) == 4 else socket.AF_INET6, words)

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
limit = datetime.timedelta(seconds=30)
store = parallel.open_store(rank, size, limit)
distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
distributed.barrier()
rows = [row.split() for kind in ("tcp", "tcp6") for row in Path(f"/proc/net/{{kind}}").read_text().splitlines()[1:]]
listening = {{address(row[1].partition(":")[0]) for row in rows if row[3] == "0A"}}
distributed.barrier()
print(*sorted(listening), flush=True)
"""


def meet(folder, hosts):
    """Let a rank on each of two nodes meet; returns the addresses at which anything listens on each node."""
    logs = folder / "run" / "logs" / "2"
    logs.mkdir(parents=True)
    for n in range(2):
        (folder / f"hosts{n}").write_text("127.0.0.1 localhost\n" + hosts[n])
    script = NODE.format(folder=folder, python=sys.executable, rank=ROOT / "jobs" / "host" / "rank_entry.py")
    (folder / "node.sh").write_text(script)
    (folder / "mesh.py").write_text(MEETING)
    task = {**TASK, "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "n[0-1]"}
    environ = {**os.environ, **task, "FLIP_RUN": str(folder / "run"), "FLIP_SNAPSHOT": str(folder)}
    for name in ("GLOO_SOCKET_IFNAME", "FLIP_STORE", "MASTER_ADDR"):
        environ.pop(name, None)
    limit = ["timeout", "-s", "KILL", "100"]  # ranks delay their reaction to TERM
    command = ["unshare", "-rnmu", *limit, "bash", str(folder / "node.sh"), "0"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    output = done.stderr + "".join(path.read_text() for path in sorted(logs.glob("*.err")))
    addresses = [path.read_text().split() for path in sorted(logs.glob("*.out"))]
    assert len(addresses) == 2 and all(addresses), output
    return addresses


def test_ranks_of_several_nodes_listen_only_at_the_address_that_peers_use(tmp_path):
    names = "10.77.0.1 n0\n10.77.0.2 n1\n"
    assert meet(tmp_path, [names, names]) == [["10.77.0.1"], ["10.77.0.2"]]


def test_store_listens_everywhere_if_the_name_of_its_node_leads_to_loopback_there(tmp_path):
    """Debian's /etc/hosts: rank 0 does not know at which address its peers look for it."""
    first, second = meet(tmp_path, ["127.0.1.1 n0\n10.77.0.2 n1\n", "127.0.1.1 n1\n10.77.0.1 n0\n"])
    assert str(ipaddress.IPv6Address(0)) in first and second == ["10.77.0.2"]
