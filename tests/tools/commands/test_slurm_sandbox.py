"""Tests of the real Slurm sandbox on one machine: start, jobs, preemption, loss of a node, stop, and cleanup."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

from flip.runs.errors import ConfigError, FlipError
from jobs.common.cluster_profile import load_profile
from tests.slurm_site import require, require_shellcheck
from tools.commands.slurm_sandbox import main
from tools.sandbox import daemons, processes
from tools.sandbox.cluster import SandboxCluster

pytestmark = pytest.mark.slurm
JOBS = Path(__file__).resolve().parents[3] / "jobs"


@pytest.fixture
def folder():
    """Create a folder with a short path, because it contains unix sockets. All users may enter it."""
    require()
    parent = Path(tempfile.mkdtemp(prefix="flip"))
    parent.chmod(0o755)
    yield parent / "slurm"
    if (parent / "slurm").exists():
        SandboxCluster(parent / "slurm").stop()
    shutil.rmtree(parent)


@pytest.fixture(scope="module")
def cluster():
    require()
    parent = Path(tempfile.mkdtemp(prefix="flip"))
    site = SandboxCluster(parent / "slurm", nodes=3, gpus=4, node_timeout=10)
    assert site.start()
    yield site
    site.stop()
    shutil.rmtree(parent)


def until(condition, seconds=90.0):
    limit = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < limit, "the condition does not hold in time"
        time.sleep(0.1)
    return result


def submit(cluster, script, *options):
    out = cluster.folder / "out.txt"
    out.unlink(missing_ok=True)
    return cluster.call("sbatch", "--parsable", f"--output={out}", *options, f"--wrap={script}").strip(), out


def job(cluster, number):
    return next((job for job in cluster.status()["jobs"] if job["id"] == number), None)


def running_job(cluster, number, restarts=0):
    row = job(cluster, number)
    return row and row["state"] == "RUNNING" and int(row["restarts"]) >= restarts and row


def node(cluster, name):
    return next(node["state"] for node in cluster.status()["nodes"] if node["name"] == name)


def command_lines(folder, mark=""):
    """Return command lines of processes with ``folder`` in command line or environment, and ``mark`` in environment."""
    commands = []
    for pid in processes.running():
        try:
            cmdline, environ = (Path(f"/proc/{pid}/{file}").read_bytes() for file in ("cmdline", "environ"))
        except OSError:  # the process has ended or belongs to another user
            continue
        if os.fsencode(folder) in cmdline + environ and os.fsencode(mark) in environ:
            commands.append(cmdline.replace(b"\0", b" ").decode().strip())
    return commands


def sleepers(folder, mark=""):
    return [
        command
        for command in command_lines(folder, mark)
        if command.startswith(("sleep", "/usr/bin/sleep", "/bin/sleep"))
    ]


def open_ports(cluster):
    first = cluster.site.options.port
    return [port for port in range(first, first + cluster.site.options.ports) if daemons.listens("127.0.0.1", port)]


def test_job_runs_on_two_nodes_with_requested_gpus(cluster):
    script = "srun bash -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'"
    number, out = submit(cluster, script, "--nodes=2", "--gpus-per-node=2")
    until(lambda: not job(cluster, number))
    assert sorted(out.read_text().split("\n")) == ["", "n1 0,1", "n2 0,1"]


def test_sandbox_profile_is_valid_cluster_profile(cluster):
    profile = load_profile(str(cluster.profile))
    assert (profile.kind, profile.partition, profile.gpus_per_node) == ("slurm", "low", 4)
    assert profile.env == ["SLURM_CONF"]


@pytest.mark.slow
def test_preempted_job_is_restarted(cluster):
    number, out = submit(cluster, "trap 'echo term' TERM; echo on; sleep 600 & wait; wait", "--nodes=3")
    until(lambda: running_job(cluster, number) and out.exists() and "on" in out.read_text())
    other = cluster.preempt(nodes=3, seconds=1)
    until(lambda: running_job(cluster, number, restarts=1))
    assert not running_job(cluster, other)
    cluster.call("scancel", number)
    until(lambda: not job(cluster, number))


@pytest.mark.slow
def test_preempt_uses_given_nodelist(cluster):
    number = cluster.preempt(nodelist="n[2-3]", seconds=600)
    assert until(lambda: running_job(cluster, number))["nodes"] == "n[2-3]"
    cluster.call("scancel", number)
    until(lambda: not job(cluster, number))


@pytest.mark.slow
def test_lose_ends_processes_of_node_and_slurm_requeues_job(cluster):
    script = "srun bash -c 'setsid sleep 601 & exec sleep 602'"
    number, _ = submit(cluster, script, "--nodes=2", "--nodelist=n[2-3]", "--requeue")
    mark = "SLURMD_NODENAME=n3"
    until(lambda: running_job(cluster, number) and len(sleepers(cluster.folder, mark)) == 2)
    cluster.lose("n3")
    assert not command_lines(cluster.folder, mark)
    assert not cluster.status()["daemons"]["slurmd.n3"]
    until(lambda: node(cluster, "n3").startswith("down"))
    cluster.bring_back("n3")
    assert node(cluster, "n3") in ("idle", "mixed", "allocated")
    until(lambda: running_job(cluster, number, restarts=1))  # requeued, not failed
    cluster.call("scancel", number)
    until(lambda: not job(cluster, number))


@pytest.mark.slow
def test_set_grace_changes_grace_time_of_partition(cluster):
    cluster.set_grace(7)
    assert "GraceTime=7" in cluster.call("scontrol", "show", "partition", "low")
    cluster.set_grace(0)


def test_second_start_leaves_running_sandbox_unchanged(cluster):
    second = SandboxCluster(cluster.folder, nodes=1)
    before = cluster.status()["daemons"]
    assert not second.start()
    assert second.site.names == ["n1", "n2", "n3"]
    assert second.status()["daemons"] == before


def test_errors_name_unknown_node_invalid_partition_and_timeout(cluster):
    with pytest.raises(ConfigError, match="n1, n2, n3"):
        cluster.lose("n4")
    with pytest.raises(FlipError, match="[Ii]nvalid"):
        cluster.call("sbatch", "--partition=nosuch", "--wrap=true")
    with pytest.raises(FlipError, match="no answer for 0.2 s"):
        cluster.call("srun", "sleep", "3", timeout=0.2)


@pytest.mark.slow
def test_stop_ends_all_processes_and_frees_ports(folder):
    cluster = SandboxCluster(folder, nodes=2, kill_wait=2)
    cluster.start()
    # The sleeps ignore TERM or run in other sessions, out of reach of their step.
    script = "trap '' TERM; setsid sleep 603 & srun bash -c 'trap \"\" TERM; setsid sleep 604 & sleep 605'"
    number, _ = submit(cluster, script, "--nodes=2")
    until(lambda: running_job(cluster, number) and len(sleepers(folder)) == 5)
    cluster.lose("n2")
    assert cluster.stop()
    assert not command_lines(folder)
    assert not open_ports(cluster)
    assert not cluster.stop()


def test_start_removes_jobs_and_processes_of_crashed_sandbox(folder):
    cluster = SandboxCluster(folder, nodes=1)
    cluster.start()
    number, _ = submit(cluster, "sleep 606")
    until(lambda: running_job(cluster, number) and sleepers(folder))
    pids = cluster.status()["daemons"]
    os.kill(pids["slurmctld"], signal.SIGKILL)
    os.kill(pids["munged"], signal.SIGKILL)
    until(lambda: not cluster.running())
    assert cluster.start()
    assert cluster.status()["jobs"] == []
    assert pids["slurmd.n1"] != cluster.status()["daemons"]["slurmd.n1"]
    assert not sleepers(folder)


@pytest.mark.slow
def test_start_with_keep_continues_job_numbers(folder):
    cluster = SandboxCluster(folder, nodes=1)
    cluster.start()
    first = cluster.preempt(nodes=1)
    cluster.stop()
    cluster.start(keep=True)
    assert int(cluster.preempt(nodes=1)) > int(first)
    cluster.stop()
    cluster.start()
    assert cluster.preempt(nodes=1) == "1"


def test_failed_start_names_cause_and_leaves_no_process(folder):
    with pytest.raises(FlipError, match="NoSuchKey"):
        SandboxCluster(folder, nodes=1, settings=["NoSuchKey=1"]).start()
    assert not command_lines(folder)


def test_start_rejects_port_in_use(folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="port in use"):
            SandboxCluster(folder, port=other.getsockname()[1]).start()
    SandboxCluster(folder).site.check()  # the folder is ours: the next start may use it


@pytest.mark.slow
def test_sandbox_supports_accounting_and_linear_selection(folder):
    require(accounting=True)
    cluster = SandboxCluster(folder, nodes=2, accounting=True, select="linear", settings=["killwait=3"])
    cluster.start()
    number, out = submit(cluster, "srun bash -c 'echo $SLURMD_NODENAME'", "--nodes=2", "--account=acc")
    query = ("sacct", "-n", "-X", "-P", "-j", number, "-o", "state,account,allocnodes")
    until(lambda: cluster.call(*query).strip() == "COMPLETED|acc|2")
    assert sorted(out.read_text().split()) == ["n1", "n2"]
    assert "KillWait = 3 sec" in " ".join(cluster.call("scontrol", "show", "config").split())
    cluster.stop()
    assert not command_lines(folder)
    assert not open_ports(cluster)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can change the user")
def test_sandbox_runs_without_root(folder):
    shutil.chown(folder.parent, "nobody")
    "x".encode("idna")  # load the codec while its file is readable
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.chdir("/")
            cluster = SandboxCluster(folder, nodes=2)
            cluster.start()
            number, out = submit(
                cluster, "srun bash -c 'echo $CUDA_VISIBLE_DEVICES; id -u'", "--nodes=2", "--gpus-per-node=2"
            )
            until(lambda: not job(cluster, number))
            assert sorted(out.read_text().split()) == ["0,1", "0,1", "65534", "65534"]
            cluster.preempt(nodes=2)
            cluster.lose("n1")
            cluster.stop()
            shutil.rmtree(folder)  # which root does not write to
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not command_lines(folder)


def test_command_starts_controls_and_stops_sandbox(folder):
    def tool(*arguments):
        arguments = [sys.executable, JOBS, "slurm_sandbox", *arguments, "--folder", folder]
        return subprocess.run(arguments, capture_output=True, text=True, cwd="/", timeout=120)

    stopped = tool("status")
    assert stopped.returncode == 78 and "slurm_sandbox start" in stopped.stderr
    started = tool("start", "--nodes", "2", "--port", "0")
    assert f"export SLURM_CONF={folder}/slurm.conf" in started.stdout and started.returncode == 0, started.stderr
    assert "runs already" in tool("start").stdout
    assert tool("preempt", "--nodes", "1").stdout.split()[2] == "1"
    tool("lose", "n2")
    report = json.loads(tool("status", "--json").stdout)
    assert report["running"] and not report["daemons"]["slurmd.n2"] and report["jobs"][0]["name"] == "preempt"
    assert "not alive: slurmd.n2" in tool("status").stdout
    assert tool("return", "n2").returncode == 0
    assert "all daemons are alive" in tool("status").stdout
    assert "no process is left" in tool("stop").stdout
    assert "did not run" in tool("stop").stdout
    assert not command_lines(folder)


@pytest.mark.parametrize(
    "name, said", [("a b", "other characters"), ("x" * 90, "too long"), ("", "has other files")], ids=str
)
def test_start_rejects_unusable_folder(tmp_path, capsys, name, said):
    require()
    (tmp_path / "thesis.txt").touch()
    assert main(["start", "--folder", str(tmp_path / name)]) == 78
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"preempt": "qos"}, {"max_submit": 1}, {"preempt": "none"}], ids=str)
def test_sandbox_rejects_invalid_options(tmp_path, options):
    with pytest.raises(ConfigError, match="--accounting|partition, qos"):
        SandboxCluster(tmp_path, **options)


def test_start_rejects_missing_job_submit_script(tmp_path, capsys):
    assert main(["start", "--folder", str(tmp_path / "s"), "--job-submit", str(tmp_path / "no.lua")]) == 78
    assert "no.lua" in capsys.readouterr().err and not (tmp_path / "s").exists()


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(daemons, "search_path", lambda: str(tmp_path))
    assert main(["packages"]) == 0
    assert capsys.readouterr().out == "munge slurm-client slurmctld slurmd\n"
    assert main(["start", "--accounting", "--folder", str(tmp_path)]) == 78
    assert "mariadb-server munge slurm-client slurmctld slurmd slurmdbd" in capsys.readouterr().err
    monkeypatch.setenv("FLIP_REQUIRE_SLURM", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    for check in (require, require_shellcheck):
        with pytest.raises(pytest.fail.Exception, match="apt-get install"):
            check()
    monkeypatch.delenv("FLIP_REQUIRE_SLURM")
    for check in (require, require_shellcheck):
        with pytest.raises(pytest.skip.Exception, match="apt-get install"):
            check()
