"""Tests that the foreign site of the tests behaves as its options specify, and that doctor tries node agents."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flip.runs.errors import FlipError
from jobs.host.agents.channel import new_key, publish
from tests.harness.common import free_port, wait_until
from tests.slurm.scenarios import JOB_SUBMIT

pytestmark = pytest.mark.slurm
JOBS = Path(__file__).resolve().parents[2] / "jobs"
REFUSES = JOB_SUBMIT.replace(
    "if job.time_limit == slurm.NO_VAL then", 'if true then slurm.log_user("Site policy: not today.")'
)


def submit(cluster, *options):
    args = ["--parsable", "--output=/dev/null", "--chdir=/", "--nodes=4", "--exclusive", *options]
    return cluster.call("sbatch", *args, "--wrap=exec sleep 600").strip()


def job(cluster, number):
    return dict(re.findall(r"\b(\w+)=(\S*)", cluster.call("scontrol", "show", "job", number)))


def until(cluster, number, **expected):
    wait_until(
        lambda: expected.items() <= job(cluster, number).items(), str(expected), story=lambda: job(cluster, number)
    )


def doctor(*args):
    """Return promise -> value that doctor read."""
    done = subprocess.run([sys.executable, JOBS, "doctor", "--json", *args], capture_output=True, text=True)
    return {row["promise"]: row["read"] for row in json.loads(done.stdout)["promises"]}


def test_foreign_site_enforces_its_limits_and_preempts_by_qos(foreign_site):
    cluster = foreign_site
    promises = doctor()
    assert promises["a preempted run starts again"].startswith("preempt/qos, PreemptMode=REQUEUE, GraceTime=0 s")
    assert "a plugin of the site may disable requeue" in promises["a preempted run starts again"]
    assert "MaxSubmitJobs of the association 40" in promises["a sweep may have any number of runs"]
    with pytest.raises(FlipError, match="Site policy: jobs must have a time limit"):
        submit(cluster)
    with pytest.raises(FlipError, match="job submit limit"):  # MaxSubmitJobs
        submit(cluster, "--time=1", "--hold", "--array=0-40")
    assert job(cluster, submit(cluster, "--time=1", "--hold"))["Requeue"] == "0"
    held = submit(cluster, "--time=1", "--hold", "--requeue", "--job-name=requeue_disabled")
    assert job(cluster, held)["Requeue"] == "0"
    number = submit(cluster, "--time=9", "--requeue")
    until(cluster, number, JobState="RUNNING", Requeue="1", QOS="low", Account="acc")
    high = cluster.preempt(nodes=4, seconds=1)
    until(cluster, high, JobState="COMPLETED", QOS="high")
    until(cluster, number, JobState="RUNNING", Restarts="1")
    (cluster.folder / "job_submit.lua").write_text(REFUSES)
    assert "Site policy: not today." in doctor()["a job is accepted"]


#: The task searches for a short time and, on node n2, in another folder, if that has an address.
PYTHON_OF_NODES = """#!/bin/sh
[ $# = 5 ] || exec {python} "$@"
folder=$4
[ "$SLURMD_NODENAME" != n2 ] || [ ! -e {other}/coordinator.json ] || folder={other}
exec {python} "$1" "$2" "$3" "$folder" 6
"""
#: Prints, and fails on node n2 while a file exists.
PROLOG = """#!/bin/sh
echo print hello
echo a line
[ "$SLURMD_NODENAME" != n2 ] || [ ! -e {fails} ] || exit 3
"""
FAULT = "a fault costs seconds, not a requeue"


class TrialSite:
    """A Slurm of two nodes with a TaskProlog that prints, and a profile with a ``host_python`` that tests change."""

    def __init__(self, folder, start_slurm, monkeypatch):
        self.other = folder / "other"
        self.fails = folder / "fails"
        self.runs = folder / "runs"
        self.profile = folder / "mine.yaml"
        self.other.mkdir()
        self.runs.mkdir()
        prolog = self._script(folder / "prolog", PROLOG.format(fails=self.fails))
        python = self._script(folder / "python", PYTHON_OF_NODES.format(other=self.other, python=sys.executable))
        self.profile.write_text(f"kind: slurm\npartition: low\nhost_python: {python}\nruns_root: {self.runs}\n")
        monkeypatch.setenv("FLIP_RUNS", str(self.runs))
        self.cluster = start_slurm(nodes=2, kill_wait=15, settings=[f"TaskProlog={prolog}"])

    def _script(self, path, text):
        path.write_text(text)
        path.chmod(0o755)
        return path

    def command(self, *args):
        return [sys.executable, JOBS, "doctor", "--json", "--cluster", self.profile, "--try-agents", *args]

    def row(self, *args):
        """What a try says. It leaves neither a job nor a file."""
        done = subprocess.run(self.command(*args), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert self.cluster.call("squeue", "-h", "-n", self.names()).split() == []
        assert list(self.runs.iterdir()) == []
        return next(row for row in json.loads(done.stdout)["promises"] if row["promise"] == FAULT)

    def names(self):
        """Names of all jobs of tries."""
        rows = self.cluster.call("squeue", "-h", "-a", "-t", "all", "-o", "%j").split()
        return ",".join(name for name in rows if name.startswith("flip-try-agents")) or "none"


@pytest.fixture
def trial_site(tmp_path, start_slurm, monkeypatch):
    return TrialSite(tmp_path, start_slurm, monkeypatch)


def test_doctor_tries_node_agents_on_two_nodes(trial_site):
    site = trial_site
    row = site.row()
    assert row["read"].endswith("; agents of n1, n2 connect"), row

    port = free_port()
    publish(site.other / "coordinator.json", "127.0.0.1", port, new_key())
    row = site.row()
    assert f"n2: 127.0.0.1, port {port}: " in row["read"] and "Connection refused" in row["read"], row
    assert "agents of n1 connect" in row["read"] and "n1: " not in row["read"]
    assert "open TCP ports" in row["then"]

    site.fails.touch()
    row = site.row()
    assert "n2: " in row["read"] and "TaskProlog failed status=3" in row["read"], row
    assert "a TaskProlog that fails" in row["then"]


def test_try_of_node_agents_waits_for_free_nodes_no_longer_than_asked(trial_site):
    site = trial_site
    number = site.cluster.call(
        "sbatch", "--parsable", "--output=/dev/null", "--chdir=/", "--time=9", "--exclusive", "--nodes=2",
        "--wrap=exec sleep 600",
    ).strip()  # fmt: skip
    until(site.cluster, number, JobState="RUNNING")
    assert "could not be tried: srun: error: Unable to allocate resources" in site.row("2")["read"]
    waiting = subprocess.Popen(site.command("600"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_until(lambda: "flip-try-agents" in site.cluster.call("squeue", "-h", "-t", "PD", "-o", "%j"), "a waiting try")
    waiting.send_signal(signal.SIGINT)
    waiting.communicate(timeout=60)
    assert waiting.returncode
    assert site.cluster.call("squeue", "-h", "-o", "%A").split() == [number]
    assert list(site.runs.iterdir()) == []
