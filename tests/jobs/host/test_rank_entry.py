"""Tests of rank_entry: the environment of ranks from Slurm's variables, and the steps before the rank starts."""

import json
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flip.runs import errors
from jobs.host import node_list, rank_entry
from tests.jobs.host.agents.test_channel import has_ipv6

ROOT = Path(__file__).resolve().parents[3]
TASK = {
    "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "57", "SLURM_JOB_NODELIST": "n[03-07,12],m1", "FLIP_ATTEMPT": "2",
}  # fmt: skip


def test_environment_sets_torch_distributed_variables_from_slurm(monkeypatch):
    monkeypatch.setattr(rank_entry.socket, "getaddrinfo", lambda *_: [])
    env = rank_entry.environment(TASK)
    keys = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [env[key] for key in keys[:-1]] == ["3", "1", "1", "4", "2"]
    assert env["MASTER_ADDR"] == "n03"
    assert rank_entry.environment({**TASK, "MASTER_ADDR": "10.0.0.1"})["MASTER_ADDR"] == "10.0.0.1"


def test_port_is_same_on_all_ranks_and_differs_between_attempts():
    ports = {rank_entry.environment({**TASK, "SLURM_PROCID": str(i)})["MASTER_PORT"] for i in range(4)}
    later = {rank_entry.port("57", str(n)) for n in range(100)}
    assert len(ports) == 1 and len(later) > 95 and all(10000 <= p < 30000 for p in later)


@pytest.mark.parametrize(
    "nodes, first, last",
    [
        ("n1", "n1", "n1"),
        ("n[1-4]", "n1", "n4"),
        ("n[03-07,12],m1", "n03", "m1"),
        ("n[03-07,12]", "n03", "n12"),
        ("a[2,5-9]b[01-08]-ib,c", "a2b01-ib", "c"),
        ("c,a[2,5-9]b[01-08]-ib", "c", "a9b08-ib"),
        ("x,y[1-2]", "x", "y2"),
        ("", "", ""),
    ],
)
def test_first_and_last_host_of_slurm_node_list(nodes, first, last):
    assert (node_list.first_host(nodes), node_list.last_host(nodes)) == (first, last)


def test_environment_uses_launch_node_address_if_first_node_is_unresolvable(monkeypatch):
    def unknown_host(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(rank_entry.socket, "getaddrinfo", unknown_host)
    assert rank_entry.environment({**TASK, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"})["MASTER_ADDR"] == "10.0.0.7"
    assert rank_entry.environment(TASK)["MASTER_ADDR"] == "n03"


def test_interface_returns_network_interface_of_address_except_loopback():
    assert rank_entry.interface("127.0.1.1") is None and rank_entry.interface("localhost") is None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
            address = probe.getsockname()[0]
        except OSError:  # a machine with only a loopback interface
            address = "127.0.0.1"
    of_network = {name for _, name in socket.if_nameindex()} - {"lo"}
    assert (rank_entry.interface(address) in of_network) != address.startswith("127.")


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_interface_of_node_that_has_ipv6_alone(tmp_path, monkeypatch):
    """The table of the kernel has a line per address."""
    table = tmp_path / "if_inet6"
    table.write_text(f"{'0' * 31}1 01 80 10 80       lo\n{'0' * 31}1 04 40 00 82     eth7\n")
    monkeypatch.setattr(rank_entry, "INTERFACES_6", table)
    assert rank_entry.interface("::1") == "eth7"
    table.write_text(f"{'0' * 31}1 01 80 10 80       lo\n")
    assert rank_entry.interface("::1") is None


@pytest.mark.parametrize(
    "given, ways, found",
    [
        ({}, {"n03": "eth0", "10.0.0.7": "eth1"}, "eth0"),
        ({}, {"n03": None, "10.0.0.7": "eth1", "m1": "eth2"}, "eth1"),
        ({}, {"n03": None, "10.0.0.7": None, "m1": "eth2"}, "eth2"),
        ({}, {"10.0.0.7": None, "m1": "eth2"}, "eth2"),
        ({}, {"n03": None, "10.0.0.7": None}, None),  # all nodes on one machine
        ({"SLURM_LAUNCH_NODE_IPADDR": ""}, {"n03": None, "m1": "eth2"}, "eth2"),
        ({"MASTER_ADDR": "a..b"}, {"m1": "eth2"}, "eth2"),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, {"n03": "eth0"}, None),
        ({"SLURM_NNODES": "1"}, {"n03": "eth0"}, None),
    ],
)
def test_gloo_interface_leads_to_rank_0_if_hostname_resolves_to_loopback(given, ways, found, monkeypatch):
    def interface(toward):
        toward.encode("idna")
        if toward not in ways:
            raise OSError("Name or service not known")
        return ways[toward]

    task = {**TASK, "MASTER_ADDR": "n03", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7", **given}
    monkeypatch.setattr(rank_entry, "interface", interface)
    monkeypatch.setattr(rank_entry, "resolves_to_loopback", lambda name: True)
    assert rank_entry.gloo_interface(task) == ({"GLOO_SOCKET_IFNAME": found} if found else {})
    monkeypatch.setattr(rank_entry, "resolves_to_loopback", lambda name: False)
    assert rank_entry.gloo_interface(task) == {}, "the interface that gloo selects works"


def test_resolves_to_loopback_checks_first_bindable_address(monkeypatch):
    def rows(*names):
        kinds = [socket.AF_INET6 if ":" in name else socket.AF_INET for name in names]
        return [(kind, socket.SOCK_STREAM, 6, "", (name, 0)) for kind, name in zip(kinds, names, strict=True)]

    for name in ("localhost", "127.0.1.1", "no.such.name.invalid", ".."):
        assert rank_entry.resolves_to_loopback(name), name
    monkeypatch.setattr(rank_entry.socket, "getaddrinfo", lambda *_: rows("198.51.100.1", "127.0.1.1"))
    assert rank_entry.resolves_to_loopback("n1"), "the first address belongs to another machine and cannot be bound"
    monkeypatch.setattr(rank_entry.socket, "getaddrinfo", lambda *_: rows(socket.inet_ntoa(bytes(4)), "127.0.1.1"))
    assert not rank_entry.resolves_to_loopback("n1")


def can_create_namespaces():
    """Whether this user may create namespaces, each with its own network."""
    if not shutil.which("unshare") or not shutil.which("ip") or not shutil.which("hostname"):
        return False
    script = "mount --bind /etc/hosts /etc/hosts && hostname n0 && ip link add w1 type veth peer name w0"
    return subprocess.run(["unshare", "-rnmu", "sh", "-c", script], capture_output=True).returncode == 0


NODE = """
hostname n$1; mount --bind {folder}/hosts$1 /etc/hosts; ip link set lo up
if [ $1 = 0 ]; then unshare -nmu bash {folder}/node.sh 1 & else ip link add w1 type veth peer name w0 netns $PPID; fi
until ip addr add 10.77.0.$((1 + $1))/24 dev w$1; do sleep 0.05; done
ip link set w$1 up
SLURM_PROCID=$1 SLURM_NODEID=$1 {python} {rank} mesh
wait
"""


@pytest.mark.long
@pytest.mark.skipif(not can_create_namespaces(), reason="may not open name spaces for networks here")
def test_gloo_connects_nodes_with_hostnames_that_resolve_to_loopback(tmp_path):
    """Two nodes with Debian's /etc/hosts, simulated by namespaces that end with their processes."""
    logs = tmp_path / "run" / "logs" / "2"
    logs.mkdir(parents=True)
    for n in range(2):
        (tmp_path / f"hosts{n}").write_text(f"127.0.0.1 localhost\n127.0.1.1 n{n}\n10.77.0.{2 - n} n{1 - n}\n")
    script = NODE.format(folder=tmp_path, python=sys.executable, rank=ROOT / "jobs" / "host" / "rank_entry.py")
    (tmp_path / "node.sh").write_text(script)
    (tmp_path / "mesh.py").write_text(
        "import datetime, os\n"
        "from torch import distributed\n"
        "distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=30))\n"
        "distributed.barrier()\n"
        "print('met over', os.environ.get('GLOO_SOCKET_IFNAME'), flush=True)\n"
    )
    task = {**TASK, "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "n[0-1]"}
    environment = {**os.environ, **task, "FLIP_RUN": str(tmp_path / "run"), "FLIP_SNAPSHOT": str(tmp_path)}
    environment.pop("GLOO_SOCKET_IFNAME", None)
    limit = ["timeout", "-s", "KILL", "100"]  # ranks delay their reaction to TERM
    command = ["unshare", "-rnmu", *limit, "bash", str(tmp_path / "node.sh"), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    output = done.stderr + "".join(path.read_text() for path in sorted(logs.glob("*.err")))
    assert [path.read_text() for path in sorted(logs.glob("*.out"))] == ["met over w0\n", "met over w1\n"], output


def test_rank_entry_exits_with_own_code_if_run_folder_is_missing(tmp_path):
    environment = {**os.environ, **TASK, "FLIP_RUN": str(tmp_path / "away"), "FLIP_SNAPSHOT": str(tmp_path)}
    command = [sys.executable, ROOT / "jobs" / "host" / "rank_entry.py", "late"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == errors.UNSTARTED and "No such file" in done.stderr
    assert errors.UNSTARTED not in errors.CAUSES.values(), "no rank process ends with it"
    with open("/dev/full", "w") as full:  # like the log of a job on a full disk
        assert subprocess.run(command, env=environment, stderr=full).returncode == errors.UNSTARTED


def test_rank_entry_refuses_prepared_link_as_log(tmp_path):
    victim = tmp_path / "victim"
    logs = tmp_path / "run" / "logs" / "2"
    victim.write_text("mine")
    logs.mkdir(parents=True)
    (logs / "node1.out").symlink_to(victim)
    environment = {**os.environ, **TASK, "FLIP_RUN": str(tmp_path / "run"), "FLIP_SNAPSHOT": str(tmp_path)}
    command = [sys.executable, ROOT / "jobs" / "host" / "rank_entry.py", "late"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == errors.PERMISSION and f"{logs / 'node1.out'}: is a symbolic link" in done.stderr
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_rank_entry_preserves_signal_received_before_rank_process_listens(tmp_path, name):
    """A signal sent while a task starts neither kills it nor is lost. Output of the task reaches the log at once."""
    run = tmp_path / "run"
    (run / "logs" / "2").mkdir(parents=True)
    (tmp_path / "late.py").write_text(
        "import json, os, signal, sys, time\n"
        "print('started', flush=True)\n"
        f"while not os.path.exists({str(tmp_path / 'sent')!r}): time.sleep(0.01)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from flip.common import shutdown\n"
        "flag = shutdown.install()\n"
        "print(json.dumps([flag.reason, os.environ['RANK'], os.getcwd(), sys.argv[1]]))\n"
    )
    environment = {
        **os.environ,
        **TASK,
        "FLIP_RUN": str(run),
        "FLIP_SNAPSHOT": str(tmp_path),
        "PYTHONPATH": str(tmp_path),
    }
    task = subprocess.Popen(
        [sys.executable, ROOT / "jobs" / "host" / "rank_entry.py", "late"], env=environment, cwd="/"
    )
    log = run / "logs" / "2" / "node1.out"
    while not (log.exists() and "started" in log.read_text()):
        time.sleep(0.01)
        assert task.poll() is None
    task.send_signal(getattr(signal, name))
    (tmp_path / "sent").touch()
    assert task.wait(30) == 0
    assert json.loads(log.read_text().splitlines()[1]) == [f"signal {name}", "3", str(tmp_path), str(run)]


def test_rank_entry_raises_soft_resource_limits_to_hard_limits(tmp_path):
    run = tmp_path / "run"
    (run / "logs" / "2").mkdir(parents=True)
    (tmp_path / "resources_of.py").write_text(
        "import json, resource\n"
        "kinds = resource.RLIMIT_NOFILE, resource.RLIMIT_CPU, resource.RLIMIT_MEMLOCK\n"
        "print(json.dumps([resource.getrlimit(kind) for kind in kinds]))\n"
    )
    environment = {**os.environ, **TASK, "FLIP_RUN": str(run), "FLIP_SNAPSHOT": str(tmp_path)}
    entry = ROOT / "jobs" / "host" / "rank_entry.py"
    limits = "ulimit -Sn 64 && ulimit -Sl 32 && ulimit -t 7200 && ulimit -St 3600"
    shell = f"{limits} && exec {sys.executable} {entry} resources_of"
    subprocess.run(["bash", "-c", shell], env=environment, check=True)
    files, seconds, locked = json.loads((run / "logs" / "2" / "node1.out").read_text())
    assert files == [resource.getrlimit(resource.RLIMIT_NOFILE)[1]] * 2 and seconds == [7200, 7200]
    assert locked == [resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]] * 2


def test_raise_limits_ignores_limits_that_cannot_be_raised(monkeypatch):
    requested = []

    def refuse(kind, limits):
        requested.append(kind)
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(rank_entry.resource, "setrlimit", refuse)
    rank_entry.raise_limits()
    assert requested == [resource.RLIMIT_NOFILE, resource.RLIMIT_CPU, resource.RLIMIT_MEMLOCK]


TORCH = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
GLIBC = {"GLIBC_TUNABLES": rank_entry.MALLOC}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"PATH": "/bin"}, TORCH | GLIBC),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, GLIBC),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"}, GLIBC),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=1"}, TORCH),
        ({"MALLOC_ARENA_MAX": "1"}, TORCH),
        ({"SLURM_GPUS_ON_NODE": "8"}, TORCH),
        ({"CUDA_VISIBLE_DEVICES": ""}, TORCH | GLIBC),
    ],
)
def test_allocator_default_yields_to_user_configuration_and_gpus(given, expected):
    assert rank_entry.allocator(given) == expected


@pytest.mark.skipif("glibc" not in platform.libc_ver()[0], reason="the settings are those of glibc")
@pytest.mark.parametrize("settings", [{}, GLIBC], ids=["default", "ours"])
def test_freed_memory_is_not_cleared_again(settings):
    code = (
        "import numpy, resource\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def step(): numpy.ones(1 << 26, numpy.uint8)\n"
        "step(); before = faults()\n"
        "for _ in range(4): step()\n"
        "print(faults() - before)"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("GLIBC_", "MALLOC_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environ | settings, capture_output=True, check=True)
    assert (int(done.stdout) < 50) == bool(settings)


def test_rank_imports_its_snapshot_although_a_task_prolog_sets_pythonpath(tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "probe.py").write_text("import sys\nprint(__file__, sys.path)\n")
    run = tmp_path / "run"
    (run / "logs" / "1").mkdir(parents=True)
    environment = {**os.environ, **TASK, "FLIP_RUN": str(run), "FLIP_SNAPSHOT": str(snapshot), "FLIP_ATTEMPT": "1"}
    environment |= {"PYTHONPATH": "/site/modules", "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, rank_entry.__file__, "probe"], env=environment, timeout=60, check=True)
    printed = "".join(path.read_text() for path in (run / "logs" / "1").glob("*.out"))
    assert str(snapshot / "probe.py") in printed and "/site/modules" in printed


def task_with(tmp_path, **modules):
    """The environment of a task whose TaskProlog exports a PYTHONPATH with these modules, and a snapshot."""
    site = tmp_path / "site"
    site.mkdir()
    for name, text in modules.items():
        (site / f"{name}.py").write_text(text)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "probe.py").write_text("import json, jobs\nprint(json.dumps('ready'), jobs.__name__)\n")
    (snapshot / "jobs.py").write_text("")
    run = tmp_path / "run"
    (run / "logs" / "1").mkdir(parents=True)
    variables = {"FLIP_RUN": run, "FLIP_SNAPSHOT": snapshot, "FLIP_ATTEMPT": "1", "PYTHONPATH": site}
    return {**os.environ, **TASK, **{name: str(value) for name, value in variables.items()}}


def written(tmp_path, kind):
    return "".join(path.read_text() for path in (tmp_path / "run" / "logs" / "1").glob(f"*.{kind}"))


def test_rank_starts_although_site_modules_have_names_of_other_modules(tmp_path):
    """The entry runs with ``-I``, as in batch scripts, and imports none of them either."""
    hiding = "raise ImportError('a module of the site')"
    environment = task_with(tmp_path, json=hiding, hashlib=hiding, socket=hiding, jobs=hiding, flip=hiding)
    subprocess.run([sys.executable, "-I", rank_entry.__file__, "probe"], env=environment, timeout=60, check=True)
    assert '"ready" jobs' in written(tmp_path, "out")


def test_rank_without_its_module_names_pythonpath_and_task_prolog(tmp_path):
    environment = task_with(tmp_path)
    done = subprocess.run([sys.executable, "-I", rank_entry.__file__, "absent.worker"], env=environment, timeout=60)
    text = written(tmp_path, "err")
    assert done.returncode == 78 and "no module absent.worker in PYTHONPATH=" in text
    assert environment["FLIP_SNAPSHOT"] in text and "TaskProlog" in text and "submit the run again" in text
