"""Tests of attempts on one host: listening addresses, rendezvous store, start and end of ranks."""

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from flip.runs import attempts
from flip.runs.rundir import OWNER, RunDir, read_json
from jobs.host import sessions
from jobs.host.agents.coordinator import AttemptOutcome, State
from jobs.local import adopted, agents, stores, supervisor
from tests.threads import only_first_thread_ended

ROOT = Path(__file__).resolve().parents[3]
LISTEN = "0A"
LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
"""127.0.0.1 and ::1 in the format of /proc/net on a little-endian machine."""

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc/net")


def listening(pid):
    """Addresses on which a process listens for TCP connections, in the format of /proc/net."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(link))
        except FileNotFoundError:
            continue
    rows = [row.split() for kind in ("tcp", "tcp6") for row in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == LISTEN and f"socket:[{row[9]}]" in sockets]


def until(condition, seconds=100.0):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture
def run(tmp_path):
    run_dir = RunDir(tmp_path / "sweep" / "run")
    run_dir.path.mkdir(parents=True)
    return run_dir


@pytest.fixture(autouse=True)
def no_interface(monkeypatch):
    """Unset the user's choice of network interfaces."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def start_attempt(run):
    n = run.start_attempt({"host": socket.gethostname(), "world": 2})
    job = {"python": sys.executable, "module": "tests.jobs.meeting", "snapshot": str(ROOT), "env": {}, "world": 2}
    return agents.start(run, n, job, grace=0.5)


def connected_pids(run, poll=lambda: False):
    """Wait until both ranks have connected; returns their process ids."""
    files = [run.path / f"met.{rank}" for rank in range(2)]
    until(lambda: poll() or all(file.exists() for file in files))
    records = [read_json(file) for file in files]
    assert [record["interfaces"] for record in records] == [["lo", "=lo"]] * 2
    return [record["pid"] for record in records]


@pytest.mark.long
def test_local_ranks_listen_only_on_loopback_and_share_private_store(run):
    attempt = start_attempt(run)
    try:
        assert stat.S_IMODE(attempt.store.stat().st_mode) == 0o700
        pids = connected_pids(run, attempt.poll)
        addresses = [address for pid in pids for address in listening(pid)]
        assert addresses and set(addresses) <= LOOPBACK
        assert (attempt.store / "store").stat().st_size
    finally:
        (run.path / "leave").touch()
        until(attempt.poll)
        attempt.close()
        attempt.agent.leave()
        attempt.agent.process.wait(20)
    assert attempt.code == 0, (run.logs / "1" / "node0.err").read_text()
    assert not attempt.store.exists()


@pytest.mark.long
def test_ranks_of_single_node_slurm_job_listen_only_on_loopback(run):
    """They share no private folder, because each may run in a container; so their store listens on a port."""
    run.start_attempt({})
    run.open_logs(1)
    task = {
        "SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "elsewhere.invalid",
        "SLURM_JOB_ID": str(os.getpid()), "FLIP_ATTEMPT": "1", "FLIP_RUN": str(run.path), "FLIP_SNAPSHOT": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, ROOT / "jobs" / "host" / "rank_entry.py", "tests.jobs.meeting"]
    tasks = [
        subprocess.Popen(command, env={**os.environ, **task, "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)}, cwd=ROOT)
        for r in range(2)
    ]
    try:
        addresses = [address for pid in connected_pids(run) for address in listening(pid)]
        assert addresses and set(addresses) <= LOOPBACK
    finally:
        (run.path / "leave").touch()
        for process in tasks:
            if not (run.path / "met.1").exists():
                process.kill()
            process.wait(30)
    assert [process.returncode for process in tasks] == [0, 0], (run.logs / "1" / "node0.err").read_text()


def test_adopted_attempt_deletes_its_store(run, tmp_path, monkeypatch):
    """Of a run that is cancelled then, no later attempt would do it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folders = [stores.make_store(each, 1) for each in (run, RunDir(tmp_path / "sweep" / "other"))]
    later = stores.make_store(run, 2)
    (tmp_path / "flip-store-damaged").mkdir()
    (tmp_path / "flip-store-damaged" / OWNER).write_text("{")
    adopted.adopt(run, 1, patience=0.0).close()
    assert [folder.exists() for folder in (*folders, later)] == [False, True, True]


def test_failed_start_counts_as_storage_failure_without_temporary_folder(run, monkeypatch):
    """On a full disk tempfile raises FileNotFoundError, the same type as for a missing interpreter."""
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [])
    with pytest.raises(FileNotFoundError) as error:
        start_attempt(run)
    job = {"python": "python", "snapshot": str(ROOT)}
    assert agents.FailedAttempt(run, 1, job, error.value).failure[0] == "storage"
    missing = FileNotFoundError(2, "No such file or directory", "python")
    assert agents.FailedAttempt(run, 1, job, missing).failure[0] == "config"


def test_agent_that_is_never_ready_is_a_hang_and_not_killed_for_memory(run, monkeypatch):
    monkeypatch.setattr(agents, "IMPORT_SECONDS", 0.0)  # its process has not even started then
    attempt = start_attempt(run)
    until(attempt.poll)
    assert attempt.code == 137
    supervisor.Supervisor(run.path.parent).finish(attempt)
    end = attempts.last_end(run)
    assert (end["cause"], end["action"]) == ("hang", "requeue")
    assert "was not ready within 600 s" in end["reason"] and "memory" not in end["reason"]


def test_death_of_an_agent_is_noticed_before_its_ranks_have_ended(run, monkeypatch):
    coordinator = SimpleNamespace(state=State.DECIDE, outcome=AttemptOutcome(None, ("node",), False, "lost"))
    agent = SimpleNamespace(job={"world": 1}, coordinator=coordinator, poll=lambda: None, kill=lambda: None)
    monkeypatch.setattr(agents, "adopt", lambda *_: SimpleNamespace(poll=lambda: False))
    attempt = agents.AgentAttempt(run, 1, agent, ())
    attempt._started = True
    assert not attempt.poll() and attempt.noticed is not None
    noticed = attempt.noticed
    assert not attempt.poll() and attempt.noticed == noticed and attempt.observed


def test_process_is_alive_until_last_thread_ends():
    """Another thread of a killed rank may still write while the first thread is a zombie."""
    with only_first_thread_ended() as pid:
        start = sessions.start_time(pid)
        assert sessions.alive(pid, start) and sessions.session_pids(pid) == [pid]
        sessions.kill_session(pid, start)
    assert not sessions.alive(pid, start) and sessions.session_pids(pid) == []


def test_ranks_are_recognised_by_ps_without_proc(run, monkeypatch):
    """macOS has no /proc, and its ps shows no environments."""
    monkeypatch.setattr(sessions, "HAS_PROC", False)
    rank, other = (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", path], stdout=subprocess.DEVNULL)
        for path in (run.path, run.path.parent)
    )
    try:
        start = {process: sessions.start_time(process.pid) for process in (rank, other)}
        assert sessions.is_rank(rank.pid, start[rank], run, 1)
        assert not sessions.is_rank(other.pid, start[other], run, 1)
        assert not sessions.is_rank(rank.pid, "earlier", run, 1)
    finally:
        for process in (rank, other):
            process.kill()
            process.wait()
