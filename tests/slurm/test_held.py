"""Tests of `flip cancel` for jobs that a real Slurm holds, with scripted ranks instead of training."""

import subprocess
import sys

import pytest

from flip.runs.rundir import RunDir, read_json, write_json
from jobs.backends.multi import MultiBackend
from jobs.common.job import Job, JobResources
from jobs.host import slurm_cli
from jobs.submitted_runs.clusters import states
from tests.harness.common import ROOT, wait_until
from tests.harness.slurm_scene import profile
from tests.slurm.scenarios import HERE, LONG

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
HOLDS = ("requeuehold", "uhold", "hold")


@pytest.fixture
def runs(start_slurm, tmp_path):
    """Runs that train for long, by the command that holds them."""
    start_slurm(**HERE, nodes=4, gpus=0, cpus=4)
    runs = {name: RunDir(tmp_path / "runs" / "demo" / name) for name in HOLDS}
    jobs = []
    for name, run in runs.items():
        run.path.mkdir(parents=True)
        write_json(run.path / "play.json", {"steps": LONG})
        write_json(run.identity, {"hash": name, "schema": 2})
        run.config.write_text("schema: 1\n")  # commands recognise runs by this file
        shape = JobResources(nodes=1, cpus=1, hours=0.5)
        jobs.append(Job(run, ROOT, shape, module="tests.slurm.scripted", cluster="here"))
    MultiBackend([profile(name="here")]).submit(jobs)
    wait_until(lambda: all(states([run])[run.path].attempt == 1 for run in runs.values()), "all starts")
    return runs


def row(run):
    record = read_json(run.path / "job.json")
    return slurm_cli.queue([record["name"]])[record["name"], record["index"]]


def flip_cancel(run):
    command = [sys.executable, ROOT / "jobs", "cancel", f"demo/{run.name}", "--yes", "--root", run.path.parent.parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"cancelled: {run.name}\n"), done.stdout + done.stderr


def test_cancel_ends_job_that_is_held_before_or_while_it_ends(runs):
    """A job that was requeued and held is COMPLETING first. The start that would read cancel.json never comes."""
    ending = runs["requeuehold"]
    slurm_cli.call("scontrol", "requeuehold", row(ending).id)
    assert row(ending).state == "COMPLETING"
    flip_cancel(ending)
    for how in ("uhold", "hold"):
        slurm_cli.call("scontrol", "requeue", row(runs[how]).id)
        wait_until(lambda how=how: row(runs[how]).state == "PENDING", "its requeue")
        slurm_cli.call("scontrol", how, row(runs[how]).id)
        flip_cancel(runs[how])
    for run in runs.values():
        wait_until(lambda run=run: row(run).state == "CANCELLED", f"the end of {run.name}: {row(run)}", 30)
        assert states([run])[run.path].state == "cancelled"


def test_cancel_ends_job_that_is_held_after_a_cancel(runs):
    run = runs["uhold"]
    slurm_cli.call("scontrol", "requeue", row(run).id)
    wait_until(lambda: row(run).state == "PENDING", "its requeue")
    slurm_cli.call("scontrol", "uhold", row(run).id)
    write_json(run.cancel, {"who": "ann", "why": "", "time": 0.0})  # as of a cancel while the job was COMPLETING
    assert states([run])[run.path].state == "cancelled"
    flip_cancel(run)
    wait_until(lambda: row(run).state == "CANCELLED", f"its end: {row(run)}", 30)
