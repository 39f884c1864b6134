"""Tests that an evaluation as a Slurm job of two ranks, requeued once, gives the numbers of a local evaluation."""

import json
import time

import pytest

from flip.runs.rundir import RunDir
from jobs.commands import evaluate
from jobs.host import slurm_cli
from tests.harness.evaluation_place import make_place

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.mark.timeout(900)
def test_evaluate_job_gives_local_results_after_requeue(start_slurm, tmp_path, monkeypatch, capsys):
    cluster = start_slurm()
    root = make_place(tmp_path / "place")
    for name, folder in (("RUNS", "runs"), ("CACHE", "cache"), ("DATA", "data")):
        monkeypatch.setenv(f"FLIP_{name}", str(root / folder))
    args = ["sweep/run", "--sets", "flickr30k", "mnist", "--batch", "4", "--json"]
    remote = ["--cluster", str(cluster.profile), "--root", str(root / "runs"), "--processes", "2", "--hours", "0.2"]
    assert evaluate.main([*args, *remote, "--gpus", "0", "--detach"]) == 0
    (submitted,) = json.loads(capsys.readouterr().out)
    (job,) = (RunDir(path.parent) for path in (root / "runs" / "sweep" / ".evaluate").glob("*/job.json"))
    assert (submitted["run"], submitted["job"]) == ("sweep/run", str(job.path))
    deadline = time.monotonic() + 400
    signalled = False
    while not job.result.exists() and time.monotonic() < deadline:
        if not signalled and (job.attempt(1) / "start.json").exists():
            record = json.loads((job.path / "job.json").read_text())
            rows = slurm_cli.queue([record["name"]])
            slurm_cli.call("scontrol", "requeue", rows[record["name"], record["index"]].id)
            signalled = True
        time.sleep(0.5)
    assert signalled and job.newest_attempt() > 1
    evaluations = json.loads(job.result.read_text())["evaluations"]
    assert evaluate.main([*args, "--processes", "2"]) == 0
    local_evaluations = json.loads(capsys.readouterr().out)
    for actual, expected in zip(evaluations, local_evaluations, strict=True):
        del expected["next"]  # commands, in the output alone
        assert {**actual, "seconds": 0, "job": 0, "time": 0} == {**expected, "seconds": 0, "job": 0, "time": 0}
