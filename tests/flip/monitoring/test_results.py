"""Tests of the results table that is read from complete, unfinished and damaged run directories."""

import subprocess
import sys

import pytest

import flip
from flip.config import merge
from flip.evaluation.metrics.result_files import ScoreRecord, write_result, write_scores
from flip.monitoring.metrics_reader import Metrics
from flip.monitoring.results import differing, find_runs, read_outcomes, read_run, read_runs
from flip.runs.errors import ConfigError
from flip.runs.lifecycle import ABSENT, QUEUED, SchedulerView
from flip.runs.rundir import read_json, write_json
from tests.jobs.outcomes import make


def test_read_runs_returns_flat_rows_with_equal_keys(tmp_path):
    make(tmp_path / "a", "mask50", "0.5")
    make(tmp_path / "a", "clip", "0", steps=30, complete=False)
    make(tmp_path / "b", "other", "0.5", seed=7)
    rows = read_runs(tmp_path)
    assert [(row["sweep"], row["run"], row["state"]) for row in rows] == [
        ("a", "clip", "stopped"),
        ("a", "mask50", "complete"),
        ("b", "other", "complete"),
    ]
    assert len({tuple(row) for row in rows}) == 1, "the same keys in the same order"
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())
    assert rows[1]["test.twemoji.top1"] == 0.2 and rows[0]["test.twemoji.top1"] is None
    # Only settings that differ within a sweep.
    assert rows[1]["stages.pretrain.mask"] == "0.5"
    assert "seed" not in rows[1]
    assert (rows[0]["samples"], rows[0]["steps"], rows[0]["seconds"]) == (3840, 30, 9.6)
    assert flip.read_runs(tmp_path) == rows
    shown = flip.read_runs(tmp_path, settings=["seed", "no.such"])
    assert [(row["seed"], row["no.such"]) for row in shown] == [(0, None), (0, None), (7, None)]


def test_read_runs_says_only_what_files_prove_without_a_scheduler(tmp_path):
    ends = {"requeue": "unknown", "stop": "failed", "nothing": "unknown"}
    for action in ends:
        end = {"action": action, "cause": "crash", "reason": "r"}
        run = make(tmp_path / "s", action, steps=10, end=end, complete=False)
        write_json(run.path / "job.json", {"kind": "slurm", "after": 0})
    assert {row["run"]: row["state"] for row in read_runs(tmp_path)} == ends
    assert read_run(tmp_path / "s" / "stop").reason == "r"
    write_json(run.path / "job.json", {"after": 1})
    assert read_run(run.path).state == "unknown", "the run is submitted again"
    write_json(run.cancel, {"who": "me", "why": "wrong", "time": 0})
    assert (read_run(run.path).state, read_run(run.path).reason) == ("cancelled", "cancelled by me: wrong")


def test_read_runs_uses_what_was_seen_of_the_jobs(tmp_path):
    waiting, gone = (
        make(
            tmp_path / "s", name, steps=10, end={"action": "requeue", "cause": "stopped", "reason": "r"}, complete=False
        )
        for name in ("waiting", "gone")
    )
    for run in (waiting, gone):
        write_json(run.path / "job.json", {"kind": "slurm", "after": 0})
    seen = {
        waiting.path: SchedulerView(QUEUED, "in Slurm: BeginTime"),
        gone.path: SchedulerView(ABSENT, "its job is gone"),
    }
    rows = {row["run"]: (row["state"], row["reason"]) for row in flip.read_runs(tmp_path, seen)}
    assert rows["waiting"] == ("waiting", "r; in Slurm: BeginTime")
    assert rows["gone"] == ("stopped", "r; its job is gone: submit again")


def test_read_runs_returns_other_runs_despite_damaged_run(tmp_path):
    make(tmp_path / "s", "good")
    bad = make(tmp_path / "s", "bad")
    bad.result.write_text("{")
    rows = {row["run"]: row for row in read_runs(tmp_path)}
    assert rows["good"]["state"] == "complete" and rows["bad"]["state"] == "unknown"
    assert "result.json" in rows["bad"]["reason"]


@pytest.mark.parametrize("name", ["config.yaml", "status.json", "identity.json", "result.json", "attempts/1/start.json",
                                  "attempts/1/end.json", "metrics/1.jsonl", "eval/pretrain-3200.json", "cancel.json",
                                  "job.json"])  # fmt: skip
def test_read_run_names_damaged_file_and_reads_other_files(tmp_path, name):
    run = make(tmp_path / "s", "r")
    (run.path / name).write_text("{\n")
    outcome = read_run(run.path)
    assert [name in message for message in outcome.damage] == [True]
    assert [attempt.number for attempt in outcome.attempts] == [1], "the attempts remain known"
    if name == "result.json":
        assert outcome.state == "unknown" and name in outcome.reason
    else:
        assert outcome.state == "complete" and outcome.evaluations


def test_read_run_names_both_damaged_files(tmp_path):
    run = make(tmp_path / "s", "r")
    for path in (run.result, run.status):
        path.write_text("\0\0")
    assert ["result.json" in message or "status.json" in message for message in read_run(run.path).damage] == [
        True,
        True,
    ]


def test_find_runs_accepts_root_sweep_and_run_folders(tmp_path):
    run = make(tmp_path / "s", "r", steps=0, complete=False)
    make(tmp_path / "s", ".new-r.1", steps=0, complete=False)
    for root in (tmp_path, tmp_path / "s", run.path):
        assert [run_dir.path for run_dir in find_runs(root)] == [run.path]


def test_read_runs_rejects_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such folder.*absent|absent.*no such folder"):
        read_runs(tmp_path / "absent")
    assert read_runs(tmp_path) == []


def test_curve_points_have_training_seconds(tmp_path):
    run = make(tmp_path / "s", "r", top1=0.4)
    points = read_run(run.path).curve()
    assert [(point["samples"], point["seconds"]) for point in points] == [
        (3200, 6.4),
        (6400, 16.0),
        (9600, 22.4),
        (12800, 32.0),
    ]
    assert points[-1]["evaluations"][0]["top1"] == 0.4


def test_fp32_score_of_evaluation_job_replaces_only_score_of_other_precision(tmp_path):
    run = make(tmp_path / "s", "r", top1=0.4)
    result = read_json(run.result)
    own = {"name": "twemoji", "task": "zeroshot", "role": "test", "n": 9, "data": "d", "interval": [0, 1]}
    own["precision"] = "bf16"
    last = (result["stage"], result["samples"])
    about = {"stage": result["stage"], "samples": result["samples"]}
    write_result(run, own | {"top1": 0.3, "precision": "fp32"}, about, "job")
    for more, expected in (({}, 0.3), ({"precision": "fp32"}, 0.4), ({"data": "e"}, 0.4)):
        write_scores(run, ScoreRecord(*last, [own | {"top1": 0.4} | more]))
        (row,) = read_runs(run.path)
        assert row["test.twemoji.top1"] == expected
        assert row["test.twemoji.precision"] == ("bf16" if "data" in more else "fp32")


def test_stages_end_with_a_whole_step(tmp_path, monkeypatch):
    """The first lines of a stage, whose speed does not count, are found by these ends."""
    run = make(tmp_path, "a")
    stages = "stages=[{name: a, samples: 1000, batch: 128}, {name: b, samples: 256, batch: 128}, {name: c, samples: 1}]"
    run.config.write_text(merge.dump(merge.merge([], [stages])), encoding="utf-8")
    monkeypatch.setattr(Metrics, "throughput_varies", lambda self, ends: list(ends))
    assert read_run(run.path).throughput_varies == [1024, 1280]


def test_differing_lists_settings_that_vary_between_runs(tmp_path):
    for seed, mask in enumerate(("0.5", "0.75")):
        make(tmp_path / "s", f"m{mask}", mask, seed=seed)
    assert differing(outcome.settings for outcome in read_outcomes(tmp_path)) == ["seed", "stages.pretrain.mask"]


def test_results_module_does_not_import_torch():
    script = "import flip.monitoring.results, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
