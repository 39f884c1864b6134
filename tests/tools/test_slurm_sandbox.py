"""The real Slurm of one machine: start, use, loss of a node, stop with jobs in the queue; nothing is left."""

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
from tools.sandbox import daemons, processes
from tools.sandbox.cluster import SandboxCluster
from tools.slurm_sandbox import main

pytestmark = pytest.mark.slurm
TOOL = Path(__file__).resolve().parents[2] / "tools" / "slurm_sandbox.py"


@pytest.fixture
def folder():
    """A short path, because unix sockets are below it; all users may enter."""
    require()
    made = Path(tempfile.mkdtemp(prefix="flip"))
    made.chmod(0o755)
    yield made / "slurm"
    SandboxCluster(made / "slurm").stop()
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def here():
    require()
    made = Path(tempfile.mkdtemp(prefix="flip"))
    site = SandboxCluster(made / "slurm", nodes=3, gpus=4, node_timeout=10)
    assert site.start()
    yield site
    site.stop()
    shutil.rmtree(made)


def until(condition, seconds=90.0):
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit, "not in time"
        time.sleep(0.1)
    return found


def submit(here, script, *options):
    out = here.folder / "out.txt"
    out.unlink(missing_ok=True)
    return here.call("sbatch", "--parsable", f"--output={out}", *options, f"--wrap={script}").strip(), out


def job(here, number):
    return next((job for job in here.status()["jobs"] if job["id"] == number), None)


def runs(here, number, restarts=0):
    found = job(here, number)
    return found and found["state"] == "RUNNING" and int(found["restarts"]) >= restarts and found


def node(here, name):
    return next(node["state"] for node in here.status()["nodes"] if node["name"] == name)


def named(folder, mark=""):
    """Command lines of processes with the folder in their command line or environment, and the mark in the latter."""
    found = []
    for pid in processes.running():
        try:
            words, values = (Path(f"/proc/{pid}/{file}").read_bytes() for file in ("cmdline", "environ"))
        except OSError:  # ended, or another user's
            continue
        if os.fsencode(folder) in words + values and os.fsencode(mark) in values:
            found.append(words.replace(b"\0", b" ").decode().strip())
    return found


def sleepers(folder, mark=""):
    return [words for words in named(folder, mark) if words.startswith(("sleep", "/usr/bin/sleep", "/bin/sleep"))]


def listening(here):
    first = here.site.options.port
    return [port for port in range(first, first + here.site.options.ports) if daemons.listens("127.0.0.1", port)]


def test_two_nodes_and_their_gpus(here):
    script = "srun bash -c 'echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES'"
    number, out = submit(here, script, "--nodes=2", "--gpus-per-node=2")
    until(lambda: not job(here, number))
    assert sorted(out.read_text().split("\n")) == ["", "n1 0,1", "n2 0,1"]


def test_profile_is_one(here):
    profile = load_profile(str(here.profile))
    assert (profile.kind, profile.partition, profile.gpus_per_node) == ("slurm", "low", 4)
    assert profile.env == ["SLURM_CONF"]


@pytest.mark.slow
def test_preempted_and_started_again(here):
    number, out = submit(here, "trap 'echo term' TERM; echo on; sleep 600 & wait; wait", "--nodes=3")
    until(lambda: runs(here, number) and out.exists() and "on" in out.read_text())
    other = here.preempt(nodes=3, seconds=1)
    until(lambda: runs(here, number, restarts=1))
    assert not runs(here, other)
    here.call("scancel", number)
    until(lambda: not job(here, number))


@pytest.mark.slow
def test_preempt_takes_the_nodes_it_is_told_to(here):
    number = here.preempt(nodelist="n[2-3]", seconds=600)
    assert until(lambda: runs(here, number))["nodes"] == "n[2-3]"
    here.call("scancel", number)
    until(lambda: not job(here, number))


@pytest.mark.slow
def test_lost_node(here):
    script = "srun bash -c 'setsid sleep 601 & exec sleep 602'"
    number, _ = submit(here, script, "--nodes=2", "--nodelist=n[2-3]", "--requeue")
    mark = "SLURMD_NODENAME=n3"
    until(lambda: runs(here, number) and len(sleepers(here.folder, mark)) == 2)
    here.lose("n3")
    assert not named(here.folder, mark)
    assert not here.status()["daemons"]["slurmd.n3"]
    until(lambda: node(here, "n3").startswith("down"))
    here.bring_back("n3")
    assert node(here, "n3") in ("idle", "mixed", "allocated")
    until(lambda: runs(here, number, restarts=1))  # requeued, not failed
    here.call("scancel", number)
    until(lambda: not job(here, number))


@pytest.mark.slow
def test_set_grace(here):
    here.set_grace(7)
    assert "GraceTime=7" in here.call("scontrol", "show", "partition", "low")
    here.set_grace(0)


def test_a_second_start_leaves_it_alone(here):
    second = SandboxCluster(here.folder, nodes=1)
    before = here.status()["daemons"]
    assert not second.start()
    assert second.site.names == ["n1", "n2", "n3"]
    assert second.status()["daemons"] == before


def test_mistakes_are_named(here):
    with pytest.raises(ConfigError, match="n1, n2, n3"):
        here.lose("n4")
    with pytest.raises(FlipError, match="[Ii]nvalid"):
        here.call("sbatch", "--partition=nosuch", "--wrap=true")
    with pytest.raises(FlipError, match="no answer for 0.2 s"):
        here.call("srun", "sleep", "3", timeout=0.2)


@pytest.mark.slow
def test_stop_leaves_nothing(folder):
    here = SandboxCluster(folder, nodes=2, kill_wait=2)
    here.start()
    # deaf, and out of the reach of its step
    script = "trap '' TERM; setsid sleep 603 & srun bash -c 'trap \"\" TERM; setsid sleep 604 & sleep 605'"
    number, _ = submit(here, script, "--nodes=2")
    until(lambda: runs(here, number) and len(sleepers(folder)) == 5)
    here.lose("n2")
    assert here.stop()
    assert not named(folder)
    assert not listening(here)
    assert not here.stop()


def test_what_a_crash_left_is_cleaned(folder):
    here = SandboxCluster(folder, nodes=1)
    here.start()
    number, _ = submit(here, "sleep 606")
    until(lambda: runs(here, number) and sleepers(folder))
    pids = here.status()["daemons"]
    os.kill(pids["slurmctld"], signal.SIGKILL)
    os.kill(pids["munged"], signal.SIGKILL)
    until(lambda: not here.running())
    assert here.start()
    assert here.status()["jobs"] == []
    assert pids["slurmd.n1"] != here.status()["daemons"]["slurmd.n1"]
    assert not sleepers(folder)


@pytest.mark.slow
def test_keep_goes_on_with_the_numbers(folder):
    here = SandboxCluster(folder, nodes=1)
    here.start()
    first = here.preempt(nodes=1)
    here.stop()
    here.start(keep=True)
    assert int(here.preempt(nodes=1)) > int(first)
    here.stop()
    here.start()
    assert here.preempt(nodes=1) == "1"


def test_what_does_not_come_up_says_why_and_leaves_nothing(folder):
    with pytest.raises(FlipError, match="NoSuchKey"):
        SandboxCluster(folder, nodes=1, settings=["NoSuchKey=1"]).start()
    assert not named(folder)


def test_port_in_use(folder):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="port in use"):
            SandboxCluster(folder, port=other.getsockname()[1]).start()


@pytest.mark.slow
def test_accounting_and_whole_nodes(folder):
    require(accounting=True)
    here = SandboxCluster(folder, nodes=2, accounting=True, select="linear", settings=["killwait=3"])
    here.start()
    number, out = submit(here, "srun bash -c 'echo $SLURMD_NODENAME'", "--nodes=2", "--account=acc")
    ask = ("sacct", "-n", "-X", "-P", "-j", number, "-o", "state,account,allocnodes")
    until(lambda: here.call(*ask).strip() == "COMPLETED|acc|2")
    assert sorted(out.read_text().split()) == ["n1", "n2"]
    assert "KillWait = 3 sec" in " ".join(here.call("scontrol", "show", "config").split())
    here.stop()
    assert not named(folder)
    assert not listening(here)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can change the user")
def test_without_root(folder):
    shutil.chown(folder.parent, "nobody")
    "x".encode("idna")  # loaded while its file can still be read
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.chdir("/")
            here = SandboxCluster(folder, nodes=2)
            here.start()
            number, out = submit(
                here, "srun bash -c 'echo $CUDA_VISIBLE_DEVICES; id -u'", "--nodes=2", "--gpus-per-node=2"
            )
            until(lambda: not job(here, number))
            assert sorted(out.read_text().split()) == ["0,1", "0,1", "65534", "65534"]
            here.preempt(nodes=2)
            here.lose("n1")
            here.stop()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not named(folder)


def test_command(folder):
    def tool(*words):
        words = [sys.executable, TOOL, *words, "--folder", folder]
        return subprocess.run(words, capture_output=True, text=True, cwd="/", timeout=120)

    none = tool("status")
    assert none.returncode == 78 and "slurm_sandbox.py start" in none.stderr
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
    assert not named(folder)


@pytest.mark.parametrize(
    "name, said", [("a b", "other characters"), ("x" * 90, "too long"), ("", "has other files")], ids=str
)
def test_folders_that_cannot_be(tmp_path, capsys, name, said):
    require()
    (tmp_path / "thesis.txt").touch()
    assert main(["start", "--folder", str(tmp_path / name)]) == 78
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"preempt": "qos"}, {"max_submit": 1}, {"preempt": "none"}], ids=str)
def test_options_that_cannot_be(tmp_path, options):
    with pytest.raises(ConfigError, match="--accounting|partition, qos"):
        SandboxCluster(tmp_path, **options)


def test_a_job_submit_script_that_is_not_there(tmp_path, capsys):
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
    for asks in (require, require_shellcheck):
        with pytest.raises(pytest.fail.Exception, match="apt-get install"):
            asks()
    monkeypatch.delenv("FLIP_REQUIRE_SLURM")
    for asks in (require, require_shellcheck):
        with pytest.raises(pytest.skip.Exception, match="apt-get install"):
            asks()
