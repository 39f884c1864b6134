"""Tests of the wall limit in comparison with the measured times of start-up and saves."""

import pytest

from flip.runs import checkpoint_folder, wall_limit
from flip.runs.rundir import RunDir, write_json
from jobs.host import own_job

FIELDS = {"RunTime": "00:58:00", "TimeLimit": "01:00:00", "PreemptTime": "None"}


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "sweep" / "run")


def attempt(run, ready=None, ended=None, code=75):
    n = run.start_attempt({})
    write_json(run.attempt(n) / "start.json", {"time": 1000.0})
    if ready is not None:
        write_json(run.attempt(n) / "ready.json", {"time": 1000.0 + ready})
    if ended is not None:
        write_json(run.attempt(n) / "end.json", {"time": 1000.0 + ended, "code": code, "observed": code is not None})
    return n


def saved(run, seconds):
    path = checkpoint_folder.folder(run, "pretrain", 8, 1)
    path.mkdir(parents=True)
    checkpoint_folder.complete_checkpoint(path, {"stage": "pretrain", "samples": 8, "attempt": 1, "saving": seconds})


def test_wall_limit_reports_no_times_for_new_run(run):
    assert (
        wall_limit.startup_seconds(run),
        wall_limit.save_seconds(run),
        wall_limit.measured(run),
        wall_limit.why_too_short(run, 60),
    ) == (0.0, 0.0, "", "")


def test_startup_seconds_uses_longest_failed_start_until_measured(run):
    attempt(run, ended=40)
    attempt(run, ended=30)
    attempt(run, ended=4000, code=None)  # its end was not observed, so its duration is unknown
    assert wall_limit.startup_seconds(run) == 40
    attempt(run, ready=50, ended=60)
    attempt(run)
    assert wall_limit.startup_seconds(run) == 50, "a measured start-up replaces failed starts"


def test_too_short_reports_limit_not_above_startup_plus_save_time(run):
    attempt(run, ready=50, ended=60)
    saved(run, 20.0)
    assert wall_limit.why_too_short(run, 71) == ""
    reason = wall_limit.why_too_short(run, 70)
    assert "the wall limit of 70 s" in reason
    assert reason.endswith("a start takes 50 s and a save 20 s")
    assert wall_limit.why_too_short(run, 0) == "", "no limit is known"


@pytest.mark.parametrize(
    "fields, lead, words",
    [
        ({}, 60, "the wall limit of 60 min passed, and nothing new was kept (a start takes 50 s)"),
        ({"RunTime": "00:50:00"}, 60, ""),
        (
            {"RunTime": "00:50:00"},
            600,
            "the wall limit of 60 min passed, and nothing new was kept (a start takes 50 s)",
        ),
        (
            {"RunTime": "00:00:00", "Reason": "TimeLimit"},
            60,
            "the wall limit of 60 min passed, and nothing new was kept (a start takes 50 s)",
        ),
        ({"PreemptTime": "2026-11-25T09:24:14"}, 60, ""),
        ({"TimeLimit": "UNLIMITED"}, 60, ""),
    ],
)
def test_limit_reached_from_time_of_warning_unless_preempted(run, fields, lead, words):
    attempt(run, ready=50)
    write_json(run.path / "job.json", {"signal_seconds": lead})
    assert wall_limit.limit_reason(run, 1, own_job.time_used({**FIELDS, **fields})) == words


@pytest.mark.parametrize("seconds, reached", [(3599, True), (3480, True), (3400, False)])
def test_limit_reached_uses_recorded_limit_if_slurm_is_silent(run, monkeypatch, seconds, reached):
    n = attempt(run, ready=50)
    write_json(run.path / "job.json", {"signal_seconds": 60})
    monkeypatch.setattr(wall_limit.time, "time", lambda: 1000.0 + seconds)
    assert wall_limit.limit_reason(run, n, own_job.time_used({})) == "", "no limit is recorded"
    wall_limit.record_limit(run, n, 3600)
    assert bool(wall_limit.limit_reason(run, n, own_job.time_used({}))) == reached


def test_record_limit_stores_newest_limit_of_attempt(run):
    n = attempt(run)
    assert wall_limit.recorded_limit(run, n) == 0
    wall_limit.record_limit(run, n, 90)
    wall_limit.record_limit(run, n, 60)
    assert wall_limit.recorded_limit(run, n) == 60


@pytest.mark.parametrize("seconds, words", [(48.4, "48 s"), (1800, "30 min"), (29880, "8.3 h")])
def test_format_seconds_chooses_unit(seconds, words):
    assert wall_limit.format_seconds(seconds) == words
