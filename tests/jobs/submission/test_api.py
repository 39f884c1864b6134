"""Tests of ``flip.submit`` from Python: same options and errors as the command, and typed results."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flip
from flip.runs.errors import ConfigError, StorageError
from flip.runs.lifecycle import RunState
from flip.runs.rundir import write_json
from jobs.submission.api import SubmittedRuns
from jobs.submitted_runs import clusters

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import flip

runs = flip.submit("quickstart", seeds=[0, 1], overrides=["data.workers=0"])
reveal_type(flip.submit)
reveal_type(runs.wait(timeout=60.0))
reveal_type(runs.results())
reveal_type(flip.load("runs/quickstart/masked"))
flip.submit("quickstart", changed="maybe")
flip.submit("quickstart", dry=True)
"""


def test_submit_raises_config_errors_of_command(typed, desk):
    with pytest.raises(ConfigError, match="no such sweep file"):
        flip.submit("nothing-of-this-name")
    with pytest.raises(ConfigError, match="nothing"):
        flip.submit(desk.sweep, only="nothing*")
    assert typed.started == []


def test_submit_accepts_options_of_command(typed, desk, capsys):
    runs = flip.submit(desk.sweep, seeds=[0, 1], overrides=["stages.pretrain.samples=64"])
    assert runs.folder == desk.runs / "demo" and list(runs.names) == typed.started == typed.there()
    assert runs.names == ("half", "half-s1", "whole", "whole-s1")
    assert [row["state"] for row in runs.results()] == ["stopped"] * 4, "the backend of this test starts nothing"
    assert "4 runs on local" in capsys.readouterr().out


def test_plan_is_document_of_dry_run_and_changes_nothing(typed, desk, capsys):
    code, text, _ = typed("--dry-run", "--json", "--cluster", "local", "--only", "half", "stages.pretrain.samples=64")
    document = json.loads(text)
    before = sorted(desk.folder.rglob("*"))
    planned = flip.plan(desk.sweep, only="half", overrides=["stages.pretrain.samples=64"])
    assert (code, capsys.readouterr().out) == (0, "") and sorted(desk.folder.rglob("*")) == before
    for each in (planned, document):
        del each["checks"]  # they name free space and the load of the machine
    assert planned == document and typed.started == []
    assert [(run["name"], run["starts"]) for run in planned["runs"]] == [("half", True)]
    assert planned["cost"]["samples"] == 64 and not any(planned["outcome"].values()) and planned["next"]
    with pytest.raises(ConfigError, match="no such sweep file"):
        flip.plan("nothing-of-this-name")


def test_plan_raises_what_submit_would(typed, desk):
    flip.submit(desk.sweep, only="half")
    with pytest.raises(ConfigError, match="holds another configuration"):
        flip.plan(desk.sweep, only="half", overrides=["seed=1"])
    (run,) = flip.plan(desk.sweep, only="half", overrides=["seed=1"], changed="fork")["runs"]
    assert (run["directory"], run["starts"]) == ("half-v2", True)


def test_plan_takes_arguments_of_submit():
    assert inspect.signature(flip.plan).parameters == inspect.signature(flip.submit).parameters


def test_submitted_runs_show_folder_and_names(tmp_path):
    assert repr(SubmittedRuns(tmp_path, ("a", "b"))) == f"<SubmittedRuns {tmp_path}: a, b>"
    assert repr(SubmittedRuns(tmp_path, tuple("abcdefg"))).endswith(": a, b, c, d, e and 2 more>")


def test_submit_warns_if_tracker_is_not_installed(typed, desk, capsys, monkeypatch):
    monkeypatch.setattr("jobs.tracking.tracker.find_spec", lambda name: None)
    jobs = []
    monkeypatch.setattr(typed, "submit", jobs.extend)
    runs = flip.submit(desk.sweep, only="half", overrides=["monitor.wandb=masking"])
    assert [job.trackers for job in jobs] == [["wandb"]]
    assert "monitor.wandb: wandb is not installed" in capsys.readouterr().out
    assert "wandb: masking" in (runs.folder / "half" / "config.yaml").read_text()


def test_submitted_runs_wait_for_ends_and_cancel_active_runs(tmp_path, monkeypatch):
    runs = SubmittedRuns(tmp_path, ("a", "b"))
    answers = iter([("running", "failed"), ("complete", "failed")])
    cancelled = []

    def states(listed):
        current_states = next(answers)
        return {run.path: RunState(state) for run, state in zip(listed, current_states, strict=True)}

    monkeypatch.setattr(clusters, "states", states)
    with pytest.raises(TimeoutError, match="not ended within 0 s: a$"):
        runs.wait(timeout=0)
    assert {name: state.state for name, state in runs.wait().items()} == {"a": "complete", "b": "failed"}
    answers = iter([("waiting", "complete")])
    monkeypatch.setattr(clusters, "request_cancel", lambda listed, why: cancelled.extend((r.name, why) for r in listed))
    runs.cancel("wrong data")
    assert cancelled == [("a", "wrong data")]


def test_submit_raises_storage_error_if_scheduler_does_not_answer(typed, desk, monkeypatch):
    monkeypatch.setattr("jobs.submission.submission.Submission.run", lambda self: (69, None))
    with pytest.raises(StorageError, match="the state of no run is known"):
        flip.submit(desk.sweep)


@pytest.mark.long
def test_submit_trains_sweep_and_returns_results(desk, monkeypatch):
    monkeypatch.setenv("FLIP_RUNS", str(desk.runs))
    runs = flip.submit(desk.sweep, only="half", overrides=["stages.pretrain.samples=32"])
    with pytest.raises(TimeoutError, match="half"):
        runs.wait(timeout=0)
    assert [(name, state.state) for name, state in runs.wait(timeout=240).items()] == [("half", "complete")]
    (row,) = runs.results()
    assert (row["run"], row["state"], row["samples"]) == ("half", "complete", 32) and row["loss"] > 0
    write_json(runs.folder / "half" / "mark.json", {})
    assert flip.submit(desk.sweep, only="half", overrides=["stages.pretrain.samples=32"]).names == ("half",)
    assert (runs.folder / "half" / "mark.json").exists(), "submit does not change a complete run"
    runs.cancel()
    assert runs.states()["half"].state == "complete"


@pytest.mark.long
def test_mypy_infers_types_of_submit_interface(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", str(script)]  # same options as `make types`, to share its cache
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    messages = re.findall(r"script\.py:(\d+): (note: Revealed type|error: .*?\"(\w+)\")", done.stdout)
    assert [int(line) for line, *_ in messages] == [5, 6, 7, 8, 9, 10], done.stdout
    assert "-> jobs.submission.api.SubmittedRuns" in done.stdout
    assert "flip.runs.lifecycle.RunState" in done.stdout and "flip.export.load.TrainedModel" in done.stdout
    assert "\"Literal['maybe']\"" in done.stdout and 'Unexpected keyword argument "dry"' in done.stdout
