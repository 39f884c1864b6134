"""The foreign site of the tests has the form that its options promise."""

import re
import time

import pytest

from flip.exitcodes import FlipError

pytestmark = pytest.mark.slurm


def submit(here, *options):
    words = ["--parsable", "--output=/dev/null", "--chdir=/", "--nodes=4", "--exclusive", *options]
    return here.call("sbatch", *words, "--wrap=exec sleep 600").strip()


def job(here, number):
    return dict(re.findall(r"\b(\w+)=(\S*)", here.call("scontrol", "show", "job", number)))


def until(here, number, **wanted):
    limit = time.monotonic() + 90
    while not wanted.items() <= (found := job(here, number)).items():
        assert time.monotonic() < limit, found
        time.sleep(0.1)


def test_foreign_site(foreign_site):
    here = foreign_site
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
