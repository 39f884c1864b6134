"""Tests that the foreign site of the tests behaves as its options specify."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flip.runs.errors import FlipError
from tests.harness.common import wait_until
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
    assert (
        job(cluster, submit(cluster, "--time=1", "--hold", "--requeue", "--job-name=requeue_disabled"))["Requeue"]
        == "0"
    )
    number = submit(cluster, "--time=9", "--requeue")
    until(cluster, number, JobState="RUNNING", Requeue="1", QOS="low", Account="acc")
    high = cluster.preempt(nodes=4, seconds=1)
    until(cluster, high, JobState="COMPLETED", QOS="high")
    until(cluster, number, JobState="RUNNING", Restarts="1")
    (cluster.folder / "job_submit.lua").write_text(REFUSES)
    assert "Site policy: not today." in doctor()["a job is accepted"]
