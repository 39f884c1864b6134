"""Tests on a Slurm of another form: whole nodes (select/linear), no accounting, JobRequeue=0, a prolog that may fail,
and a partition that is as small as a job.
"""

import os
import shutil
import signal
import sys

import pytest

from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.job import Job, JobResources
from jobs.host import slurm_cli
from jobs.reporting import run_details
from jobs.slurm.backend import SlurmBackend
from jobs.submitted_runs.clusters import states
from tests.harness.common import ROOT, wait_until
from tests.harness.slurm_scene import owner_and_guard, profile
from tests.slurm.conftest import start_cluster
from tests.slurm.scenarios import AGAIN, SHORT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
BROKEN = "AcceleratorError: CUDA error: uncorrectable ECC error encountered"
PROLOG = """#!/bin/sh
! rm {folder}/fail 2>/dev/null
"""
PYTHON = """#!/bin/sh
# The Python of batch scripts.
exec {python} "$@"
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("f")
    for name, text in (("prolog", PROLOG), ("python", PYTHON)):
        (folder / name).write_text(text.format(folder=folder, python=sys.executable))
        (folder / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        options = {"select": "linear", "requeue": False, "kill_wait": 5, "settings": [f"Prolog={folder}/prolog"]}
        cluster = start_cluster(folder / "slurm", patch, nodes=3, **options)
        cluster.call("scontrol", "create", "PartitionName=small", "Nodes=n[1-2]", "State=UP", "MaxTime=60")
        yield cluster, folder
        cluster.stop()


def submit(site, name, play, nodes=2, **fields):
    """Submit a run of ``nodes`` nodes to the partition of two nodes, and return it."""
    _, folder = site
    run = RunDir(folder / "runs" / name / "run")
    run.path.mkdir(parents=True)
    write_json(run.path / "play.json", play)
    run.config.write_text("schema: 1\n")
    fields = {"partition": "small", "host_python": str(folder / "python"), "peer_seconds": 2, **fields}
    job = Job(run, ROOT, JobResources(nodes=nodes, cpus=1, hours=0.5), module="tests.slurm.scripted")
    SlurmBackend(profile(**fields)).submit([job])
    return run


def state(run):
    return states([run])[run.path]


def fields(run):
    record = read_json(run.path / "job.json")
    return slurm_cli.job_fields(slurm_cli.queue([record["name"]])[record["name"], 0].id)


def complete(run):
    wait_until(lambda: state(run).state == "complete", "its end", 120, story=lambda: (state(run), fields(run)))


def test_no_node_is_excluded_in_partition_as_small_as_the_job(site):
    """The owner excludes nodes with broken hardware: this job would wait for ever (BadConstraints)."""
    run = submit(site, "broken", {"steps": SHORT, "attempts": {"1": {"crash": BROKEN}}})
    complete(run)
    assert run.newest_attempt() == 2 and fields(run)["ExcNodeList"] == "(null)"
    assert read_json(run.attempt(1) / "end.json")["exclude"], "it named nodes"


def test_node_is_excluded_if_partition_has_another_one(site):
    run = submit(site, "spare", {"steps": SHORT, "attempts": {"1": {"crash": BROKEN}}}, nodes=1)
    complete(run)
    first, second = (read_json(run.attempt(n) / "start.json")["nodes"] for n in (1, 2))
    assert first != second and fields(run)["ExcNodeList"] == first


def test_failed_starts_are_shown_until_the_interpreter_is_back(site):
    """No node is excluded by the batch script either, as all two are needed."""
    _, folder = site
    (folder / "python").rename(folder / "away")
    try:
        run = submit(site, "lacking", {"steps": SHORT}, host_python=str(folder / "python"))
        failed = f"on {fields(run).get('BatchHost', 'n1')}: the batch script's Python is missing there (log: "
        wait_until(lambda: failed in state(run).reason, failed, 60, story=lambda: (state(run), fields(run)))
        assert state(run).state == "queued"
        assert any(line.endswith("No such file or directory") for line in run_details.explain(run)["start"]["lines"])
    finally:
        (folder / "away").rename(folder / "python")
    complete(run)
    assert run.newest_attempt() == 1 and fields(run)["ExcNodeList"] == "(null)"


def test_guard_restarts_job_whose_owner_was_killed_before_its_attempt(site):
    """The files of the run are away, so that the owner tries to begin again and again."""
    cluster, _ = site
    run = submit(site, "killed", {"steps": SHORT}, options={"hold": ""})
    attempts = run.path / "attempts"
    attempts.touch()
    job = fields(run)["JobId"]
    cluster.call("scontrol", "release", job)
    log = run.path.parent / ".slurm"
    wait_until(lambda: any("; retried for" in path.read_text() for path in log.glob("*/*.err")), "a failed try", 60)
    os.kill(owner_and_guard(cluster, fields(run))[0], signal.SIGKILL)
    attempts.unlink()
    complete(run)
    assert run.newest_attempt() == 1 and fields(run)["Comment"].startswith("away:1:0:0:137:n")


def test_owner_releases_job_that_slurm_holds_after_failed_prolog(site):
    cluster, folder = site
    (folder / "fail").touch()
    run = submit(site, "held", {"steps": SHORT})
    wait_until(lambda: "held" in state(run).reason, "a held job", story=lambda: (state(run), fields(run)))
    step = run_details.explain(run)["next"]["what"]
    assert step.startswith("nothing until a person acts: release it with `scontrol release ")
    for node in ("n1", "n2"):  # Slurm drains the node whose prolog failed
        if "DRAIN" in cluster.call("scontrol", "show", "node", node):
            cluster.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
    cluster.call(*step.split("`")[1].split())
    complete(run)


def test_bad_constraints_end_with_the_printed_command(site):
    cluster, _ = site
    run = submit(site, "constrained", {"steps": SHORT}, options={"hold": ""})
    job = fields(run)["JobId"]
    cluster.call("scontrol", "update", f"JobId={job}", "ExcNodeList=n1")
    cluster.call("scontrol", "release", job)
    wait_until(lambda: "BadConstraints" in state(run).reason, "BadConstraints", story=lambda: (state(run), fields(run)))
    step = run_details.explain(run)["next"]["what"]
    cluster.call(*step.split("`")[3].split())
    complete(run)


def test_job_ends_after_its_sweep_was_deleted(site):
    cluster, folder = site
    (folder / "runs" / "other").mkdir(parents=True)
    run = submit(site, "deleted", AGAIN)
    wait_until(lambda: len(list(run.path.glob("signals/1.*.jsonl"))) == 2, "its ranks")
    job = fields(run)["JobId"]
    shutil.rmtree(run.path.parent)
    cluster.call("scontrol", "requeue", job)
    wait_until(lambda: slurm_cli.job_fields(job)["JobState"] == "FAILED", "its end", 60)
    assert slurm_cli.job_fields(job)["ExitCode"] == "78:0"
