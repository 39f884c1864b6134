"""The names that ranks go by, from Slurm's; and what every task does before it becomes the worker."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flip import exitcodes
from jobs import rank

ROOT = Path(__file__).resolve().parents[2]
TASK = {
    "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "57", "SLURM_JOB_NODELIST": "n[03-07,12],m1", "FLIP_ATTEMPT": "2",
}  # fmt: skip


def test_environment_of_a_rank(monkeypatch):
    monkeypatch.setattr(rank.socket, "getaddrinfo", lambda *_: [])
    found = rank.environment(TASK)
    ours = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [found[key] for key in ours[:-1]] == ["3", "1", "1", "4", "2"]
    assert found["MASTER_ADDR"] == "n03"
    assert rank.environment({**TASK, "MASTER_ADDR": "10.0.0.1"})["MASTER_ADDR"] == "10.0.0.1"


def test_the_port_is_the_same_on_all_ranks_and_another_one_in_the_next_attempt():
    ports = {rank.environment({**TASK, "SLURM_PROCID": str(i)})["MASTER_PORT"] for i in range(4)}
    later = {rank.port("57", str(n)) for n in range(100)}
    assert len(ports) == 1 and len(later) > 95 and all(10000 <= p < 30000 for p in later)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("n1", "n1"),
        ("n[1-4]", "n1"),
        ("n[03-07,12],m1", "n03"),
        ("a[2,5-9]b[01-08]-ib,c", "a2b01-ib"),
        ("x,y[1-2]", "x"),
    ],
)
def test_first_host(nodes, first):
    assert rank.first_host(nodes) == first


def test_where_no_name_service_knows_the_first_node_its_address_is_taken(monkeypatch):
    def nobody(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(rank.socket, "getaddrinfo", nobody)
    assert rank.environment({**TASK, "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"})["MASTER_ADDR"] == "10.0.0.7"
    assert rank.environment(TASK)["MASTER_ADDR"] == "n03"


def test_a_node_without_the_folders_of_the_run_is_no_crash(tmp_path):
    environment = {**os.environ, **TASK, "FLIP_RUN": str(tmp_path / "away"), "FLIP_SNAPSHOT": str(tmp_path)}
    command = [sys.executable, ROOT / "jobs" / "rank.py", "late"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == rank.STORAGE == exitcodes.STORAGE and "No such file" in done.stderr


def test_a_signal_that_comes_before_the_worker_listens_is_kept(tmp_path):
    """USR2 sent while a task starts neither kills it nor is lost; its words are in the node's log from the first on."""
    run = tmp_path / "run"
    (run / "logs" / "2").mkdir(parents=True)
    (tmp_path / "late.py").write_text(
        "import json, os, signal, sys, time\n"
        "print('started', flush=True)\n"
        f"while not os.path.exists({str(tmp_path / 'sent')!r}): time.sleep(0.01)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from flip import interrupt\n"
        "flag = interrupt.install()\n"
        "print(json.dumps([flag.reason, os.environ['RANK'], os.getcwd(), sys.argv[1]]))\n"
    )
    environment = {
        **os.environ,
        **TASK,
        "FLIP_RUN": str(run),
        "FLIP_SNAPSHOT": str(tmp_path),
        "PYTHONPATH": str(tmp_path),
    }
    task = subprocess.Popen([sys.executable, ROOT / "jobs" / "rank.py", "late"], env=environment, cwd="/")
    log = run / "logs" / "2" / "node1.out"
    while not (log.exists() and "started" in log.read_text()):
        assert task.poll() is None
    task.send_signal(signal.SIGUSR2)
    (tmp_path / "sent").touch()
    assert task.wait(30) == 0
    assert json.loads(log.read_text().splitlines()[1]) == ["signal SIGUSR2", "3", str(tmp_path), str(run)]
