"""Requests of `flip evaluate`: jobs, locks of the sweep, pins of checkpoints, interruptions and full disks."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from flip.config import merge
from flip.evaluation import evaluation_job
from flip.runs import checkpoint_folder
from flip.runs.checks import Rule
from flip.runs.errors import ConfigError
from flip.runs.lifecycle import RunState
from flip.runs.rundir import RunDir, create_json, write_json
from jobs.commands import evaluate
from jobs.common.cli import command
from jobs.submission import apply, evaluation
from jobs.submission.snapshot import Snapshot
from jobs.submitted_runs import clusters
from tests.harness.evaluation_place import add_checkpoint
from tests.jobs.test_automation import check as check_document

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("environment")]

ROOT = Path(__file__).resolve().parents[3]


HOLDER = """
import sys
from pathlib import Path
from jobs.submission import apply

run = Path(sys.argv[1])
with apply.lock(run.parent, shared="shared" in sys.argv):
    print("locked", flush=True)
    sys.stdin.readline()
    if "restart" in sys.argv:
        apply.move_to_trash(run)
"""


@contextmanager
def holder(run, *words):
    """A process that holds the lock of the sweep until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(run.path), *words]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield
        process.communicate()
        assert process.returncode == 0


@pytest.mark.parametrize("fails", ["second folder", "second job"])
def test_evaluate_submits_jobs_of_a_folder_at_once_and_removes_refused_ones(
    place, tmp_path, capsys, monkeypatch, fails
):
    """Slurm is queried once; the jobs of a folder are one array."""
    for name in ("one/a", "one/b", "two/a"):
        shutil.copytree(place / "runs" / "sweep" / "run", tmp_path / name)
    submitted = list[list[str]]()
    checked = []
    make = evaluation._make

    def submit(jobs):
        if submitted and fails == "second folder":
            raise ConfigError("sbatch refused the job")
        for job in jobs:
            write_json(job.run.path / "job.json", {})
        submitted.append([job.run.name.partition("-")[0] for job in jobs])

    def make_or_fail(planned):
        if fails == "second job" and planned.subject.name == "b":
            raise ConfigError("this checkpoint has been deleted meanwhile")
        return make(planned)

    monkeypatch.setattr(evaluation, "_make", make_or_fail)
    monkeypatch.setattr(evaluation, "open_backend", lambda _: SimpleNamespace(submit=submit))
    monkeypatch.setattr(evaluation, "take", lambda _, into: Snapshot("c0de", into / "c0de", ()))
    rule = Rule("Slurm", lambda *_: checked.append(1) or [])
    monkeypatch.setattr(evaluation.preflight, "SCHEDULER", rule)
    assert evaluate.main(["one", "two", "--sets", "mnist", "--root", str(tmp_path), "--detach"]) == 78
    accepted = [["a", "b"]] if fails == "second folder" else []
    left = sorted(job.name.partition("-")[0] for job in tmp_path.glob("*/.evaluate/*"))
    assert (submitted, left, checked) == (accepted, sum(accepted, []), [1])
    assert capsys.readouterr().out.count("submitted before: ") == len(accepted)


def test_evaluate_is_refused_while_a_submit_works_on_the_sweep(place, tmp_path, capsys, monkeypatch):
    """A submit that restarts the run has seen no pin, and would take the checkpoints of a queued evaluation away."""
    run = RunDir(tmp_path / "two" / "a")
    shutil.copytree(place / "runs" / "sweep" / "run", run.path)
    monkeypatch.setattr(evaluation, "open_backend", lambda _: SimpleNamespace(submit=lambda jobs: None))
    monkeypatch.setattr(evaluation, "take", lambda _, into: Snapshot("c0de", into / "c0de", ()))
    argv = ["two/a", "--root", str(tmp_path), "--sets", "mnist", "--checkpoint", "32", "--detach"]
    with holder(run, "restart"):
        assert evaluate.main(argv) == 78
    assert "another command is at work on this sweep" in capsys.readouterr().err
    assert not list(tmp_path.rglob("task.json")), "of a job whose checkpoint is in the trash now"


def test_evaluations_do_not_refuse_each_other_but_a_submit(place, tmp_path, capsys, monkeypatch):
    run = RunDir(tmp_path / "two" / "a")
    shutil.copytree(place / "runs" / "sweep" / "run", run.path)
    tried = []

    def submit(jobs):
        with pytest.raises(ConfigError, match="another command"), apply.lock(run.path.parent):
            pass
        tried.append(len(jobs))

    monkeypatch.setattr(evaluation, "open_backend", lambda _: SimpleNamespace(submit=submit))
    monkeypatch.setattr(evaluation, "take", lambda _, into: Snapshot("c0de", into / "c0de", ()))
    argv = ["two/a", "--root", str(tmp_path), "--sets", "mnist", "--detach"]
    with holder(run, "shared"):
        assert evaluate.main(argv) == 0 and tried == [1]
    assert evaluate.main(argv) == 0 and tried == [1, 1]


def test_retention_keeps_pinned_checkpoint_until_evaluation_is_complete(place, tmp_path):
    run = RunDir(tmp_path / "run")
    job = RunDir(tmp_path / "job")
    job.path.mkdir()
    run.path.mkdir()
    config = merge.read_config(place / "runs" / "sweep" / "run" / "config.yaml")
    n = run.start_attempt({})
    for samples in (8, 16, 24, 32):
        add_checkpoint(run, config, samples, n)
    checkpoint_folder.pin(run, job, "pretrain", 8)
    checkpoint_folder.apply_retention(run, n, 1)
    assert [checkpoint.samples_seen for checkpoint in checkpoint_folder.checkpoints(run)] == [8, 32]
    create_json(job.result, {})
    checkpoint_folder.apply_retention(run, n, 1)
    assert [checkpoint.samples_seen for checkpoint in checkpoint_folder.checkpoints(run)] == [32]


def test_evaluation_pins_newest_checkpoint_despite_concurrent_retention(place, tmp_path, monkeypatch):
    """The run saves and applies retention both before and after the pin is written."""
    run = RunDir(tmp_path / "run")
    job = RunDir(tmp_path / "job")
    job.path.mkdir()
    run.path.mkdir()
    config = merge.read_config(place / "runs" / "sweep" / "run" / "config.yaml")
    n = run.start_attempt({})
    pin = checkpoint_folder.pin
    add_checkpoint(run, config, 8, n)

    def pin_while_training(*args):
        if not run.pins.exists():
            add_checkpoint(run, config, 16, n)
            checkpoint_folder.apply_retention(run, n, 1)
        pin(*args)
        add_checkpoint(run, config, checkpoint_folder.checkpoints(run)[-1].samples_seen + 8, n)
        checkpoint_folder.apply_retention(run, n, 1)

    monkeypatch.setattr(checkpoint_folder, "pin", pin_while_training)
    (name,) = evaluation_job.Evaluation._newest(SimpleNamespace(subject=run, job=job))
    assert checkpoint_folder.read_checkpoint(run.checkpoints / name).samples_seen == 24
    assert [checkpoint.samples_seen for checkpoint in checkpoint_folder.checkpoints(run)] == [24, 32]


def test_evaluate_refuses_checkpoint_deleted_before_pin(place, capsys, monkeypatch):
    run = RunDir(place / "runs" / "sweep" / "run")
    before = sorted((place / "runs").rglob("job.json"))
    pin = checkpoint_folder.pin
    gone = checkpoint_folder.checkpoints(run)[0].path

    def pin_after_deletion(*args):
        (gone / checkpoint_folder.COMMIT_FILE).rename(gone / "kept")
        pin(*args)

    monkeypatch.setattr(checkpoint_folder, "pin", pin_after_deletion)
    try:
        assert evaluate.main(["sweep/run", "--checkpoint", "32"]) == 78
    finally:
        (gone / "kept").rename(gone / checkpoint_folder.COMMIT_FILE)
    output = capsys.readouterr().err
    assert "has been deleted meanwhile" in output and "Traceback" not in output
    assert sorted((place / "runs").rglob("job.json")) == before


def test_evaluate_leaves_no_job_that_was_refused(place, capsys, monkeypatch):
    """Its pins would keep checkpoints of the run."""

    def refuse(jobs):
        raise ConfigError("sbatch refused the job")

    before = sorted((place / "runs" / "sweep").glob(".evaluate/*"))
    monkeypatch.setattr(evaluation, "open_backend", lambda _: SimpleNamespace(submit=refuse))
    assert evaluate.main(["sweep/run", "--checkpoint", "32"]) == 78
    assert "sbatch refused the job" in capsys.readouterr().err
    assert sorted((place / "runs" / "sweep").glob(".evaluate/*")) == before


@pytest.mark.parametrize("recorded", [False, True])
def test_interrupted_evaluate_leaves_only_jobs_that_may_be_queued(place, capsys, monkeypatch, recorded):
    """job.json is written before sbatch is called, which may accept the job."""

    def interrupted(jobs):
        for job in jobs if recorded else ():
            write_json(job.run.path / "job.json", {})
        raise KeyboardInterrupt

    before = sorted((place / "runs" / "sweep").glob(".evaluate/*"))
    monkeypatch.setattr(evaluation, "open_backend", lambda _: SimpleNamespace(submit=interrupted))
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(["sweep/run", "--checkpoint", "32"])
    left = set((place / "runs" / "sweep").glob(".evaluate/*")) - set(before)
    shown = capsys.readouterr().out
    assert len(left) == recorded
    for job in left:
        assert re.search(f"may have been submitted; to end it: .*cancel.* {job}\n", shown)
        shutil.rmtree(job)


@pytest.mark.parametrize("fails", [(evaluation, "write_text"), (checkpoint_folder, "pin")])
def test_evaluate_reports_full_disk_and_leaves_no_partial_job(place, capsys, monkeypatch, fails):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = sorted((place / "runs" / "sweep").glob(".evaluate/*"))
    monkeypatch.setattr(*fails, full)
    assert evaluate.main(["sweep/run", "--checkpoint", "32"]) == 69
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and "No space left on device" in output
    assert sorted((place / "runs" / "sweep").glob(".evaluate/*")) == before


def test_evaluate_submits_separate_job_for_each_run(place, tmp_path, capsys, monkeypatch):
    """The results form one JSON document. It holds the results of the other jobs if a job fails."""
    for name in "ab":
        shutil.copytree(place / "runs" / "sweep" / "run", tmp_path / "two" / name)
    submitted = []

    def submit(jobs):
        submitted.extend(job.run for job in jobs)
        result = {"name": "mnist", "n": 20, "top1": 0.5, "interval": [0.3, 0.7], "samples": 64, "stage": "pretrain"}
        result |= {"task": "zeroshot", "precision": "fp32"}
        write_json(jobs[0].run.result, {"evaluations": [result]})

    def states(jobs):
        return {job.path: RunState("complete" if job.result.exists() else "failed", 1, "crash") for job in jobs}

    monkeypatch.setattr(evaluation, "open_backend", lambda _: SimpleNamespace(submit=submit))
    monkeypatch.setattr(evaluation, "take", lambda _, into: Snapshot("c0de", into / "c0de", ()))
    monkeypatch.setattr(evaluation, "states", states)
    argv = ["two", "--sets", "mnist", "--root", str(tmp_path)]
    assert evaluate.main([*argv, "--json"]) == 70
    shown = capsys.readouterr()
    (row,) = json.loads(shown.out)
    assert row["next"] == [command("report", tmp_path / "two")]
    assert (row["run"], row["top1"]) == ("two/a", 0.5) and len(submitted) == 2
    assert "failed: crash" in shown.err and "two/a: the job is " in shown.err and "jobs logs " in shown.err
    assert evaluate.main([*argv, "--json", "--detach", "--quiet"]) == 0
    shown = capsys.readouterr()
    expected = [(f"two/{run.name[0]}", str(run.path)) for run in submitted[2:]]
    detached = json.loads(shown.out)
    check_document("detached", detached)
    assert [(row["run"], row["job"]) for row in detached] == expected and len(expected) == 2 and not shown.err
    assert detached[0]["next"] == [command(name, expected[0][1]) for name in ("status", "explain", "cancel")]
    assert evaluate.main(["two/a", *argv[1:]]) == 0
    assert "run" not in capsys.readouterr().out.splitlines()[1].split(), "a single run needs no column for its name"


def test_evaluate_returns_code_of_failure_rather_than_of_cancelled_job(tmp_path, monkeypatch):
    request = evaluation.EvaluateCommand(evaluate.build_parser().parse_args(["two", "--root", str(tmp_path)]))
    cancelled, failed = (RunDir(tmp_path / name) for name in ("cancelled", "failed"))
    monkeypatch.setattr(evaluation, "states", lambda jobs: {job.path: RunState(job.path.name) for job in jobs})
    monkeypatch.setattr(clusters, "exit_code_of", lambda _: 65)
    request.jobs = {cancelled: cancelled, failed: failed}
    assert request._wait() == 65
    request.jobs = {cancelled: cancelled}
    assert request._wait() == 75


def test_progress_of_a_job_is_that_of_its_newest_attempt(tmp_path):
    job = RunDir(tmp_path / "job")
    job.path.mkdir()
    known = {job.path: RunState("running", 2, "starting")}
    assert evaluation._progress([job], known) == (0, 0, "running: starting")
    write_json(job.status, {"attempt": 2, "phase": "mnist", "samples": 32, "total": 64})
    assert evaluation._progress([job], known) == (32, 64, "mnist")
    write_json(job.status, {"attempt": 1, "phase": "mnist", "samples": 32, "total": 64})
    assert evaluation._progress([job], known)[:2] == (0, 0), "of an earlier attempt"
    other = RunDir(tmp_path / "other")
    assert evaluation._progress([job, other], known | {other.path: RunState("complete", 1)}) == (1, 2, "jobs")
