"""What is known of checkpoints before a job is queued."""

import pytest

from flip.runs import commit
from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir
from jobs.planning import preflight


def test_the_place_is_written_and_left_as_it_was(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert "can be written" in preflight.probe_url(str(tmp_path / "checkpoints"))
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FlipError):
        preflight.probe_url(str(tmp_path / "file" / "checkpoints"), deadline=0.5)


def test_the_time_that_a_save_takes(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    assert preflight.describe_save_time(run, 90) == ""
    for samples, took in ((8, 30.0), (16, 50.0)):
        path = commit.folder(run, "pretrain", samples, 1)
        path.mkdir(parents=True)
        commit.commit(path, {"stage": "pretrain", "samples": samples, "attempt": 1, "saving": took})
    assert preflight.describe_save_time(run, 120) == "50.0 s at most until now, the warning comes 120 s before the end"
    assert "raise signal_seconds" in preflight.describe_save_time(run, 90)


def test_two_slow_steps_are_counted_in(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    path = commit.folder(run, "pretrain", 8, 1)
    path.mkdir(parents=True)
    record = {"stage": "pretrain", "samples": 8, "attempt": 1, "saving": 50.0, "step": 4, "seconds": 100.0}
    commit.commit(path, record)
    assert preflight.describe_save_time(run, 150).startswith("50.0 s at most until now, a step 25.0 s, the warning")
    assert "raise" not in preflight.describe_save_time(
        run, 150
    ) and "raise signal_seconds" in preflight.describe_save_time(run, 149)
