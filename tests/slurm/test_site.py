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
DOCTOR = Path(__file__).resolve().parents[2] / "jobs" / "doctor.py"
REFUSES = JOB_SUBMIT.replace(
    "if job.time_limit == slurm.NO_VAL then", 'if true then slurm.log_user("Site policy: not today.")'
)


def submit(here, *options):
    words = ["--parsable", "--output=/dev/null", "--chdir=/", "--nodes=4", "--exclusive", *options]
    return here.call("sbatch", *words, "--wrap=exec sleep 600").strip()


def job(here, number):
    return dict(re.findall(r"\b(\w+)=(\S*)", here.call("scontrol", "show", "job", number)))


def until(here, number, **wanted):
    wait_until(lambda: wanted.items() <= job(here, number).items(), str(wanted), story=lambda: job(here, number))


def doctor(*words):
    """Return promise -> value that doctor read."""
    done = subprocess.run([sys.executable, DOCTOR, "--json", *words], capture_output=True, text=True)
    return {row["promise"]: row["read"] for row in json.loads(done.stdout)["promises"]}


def test_foreign_site_enforces_its_limits_and_preempts_by_qos(foreign_site):
    here = foreign_site
    found = doctor()
    assert found["a preempted run starts again"].startswith("preempt/qos, PreemptMode=REQUEUE, GraceTime=0 s")
    assert "a plugin of the site may disable requeue" in found["a preempted run starts again"]
    assert "MaxSubmitJobs of the association 40" in found["a sweep may have any number of runs"]
    with pytest.raises(FlipError, match="Site policy: jobs must have a time limit"):
        submit(here)
    with pytest.raises(FlipError, match="job submit limit"):  # MaxSubmitJobs
        submit(here, "--time=1", "--hold", "--array=0-40")
    assert job(here, submit(here, "--time=1", "--hold"))["Requeue"] == "0"
    assert job(here, submit(here, "--time=1", "--hold", "--requeue", "--job-name=requeue_disabled"))["Requeue"] == "0"
    number = submit(here, "--time=9", "--requeue")
    until(here, number, JobState="RUNNING", Requeue="1", QOS="low", Account="acc")
    high = here.preempt(nodes=4, seconds=1)
    until(here, high, JobState="COMPLETED", QOS="high")
    until(here, number, JobState="RUNNING", Restarts="1")
    (here.folder / "job_submit.lua").write_text(REFUSES)
    assert "Site policy: not today." in doctor()["a job is accepted"]
