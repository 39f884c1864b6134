"""Tests the store of scores: what its writers leave, what is refused, and which score is shown."""

import pytest

from flip.evaluation.metrics.result_files import (
    ScoreRecord,
    is_shown,
    read_scores,
    shown,
    training_file,
    write_result,
    write_scores,
)
from flip.monitoring.results import read_run
from flip.runs.errors import DataError
from flip.runs.formats import FormatError
from flip.runs.rundir import RunDir, read_json, write_json
from tests.jobs.outcomes import make

CHECKPOINT = {"stage": "pretrain", "samples": 64, "digest": "d"}
AT = ("pretrain", 64)


def score(name, top1=0.5, **more):
    return {"name": name, "task": "zeroshot", "top1": top1, "data": "d", "precision": "fp32", **more}


def names(points):
    return [(item["name"], item["top1"]) for item in shown(points)]


def test_each_writer_has_a_file_at_each_position(tmp_path):
    run = RunDir(tmp_path / "run")
    write_scores(run, ScoreRecord(*AT, [score("a")], seconds=2.0, attempt=1))
    write_result(run, score("b", 0.1), CHECKPOINT, "first")
    write_result(run, score("c", 0.2), CHECKPOINT, "first")
    write_result(run, score("b", 0.3), CHECKPOINT, "second")
    write_result(run, score("b", 0.4), CHECKPOINT | {"samples": 128}, "second")
    files = sorted(str(path.relative_to(run.eval)) for path in run.eval.rglob("*.json"))
    assert files == [
        "pretrain-128/second.json",
        "pretrain-64.json",
        "pretrain-64/first.json",
        "pretrain-64/second.json",
    ]
    records = [read_json(run.eval / name) for name in files]
    assert all({"stage", "samples", "evaluations"} <= set(record) for record in records), "one form"
    assert [(point.job, len(point.scores)) for point in read_scores(run, at=AT)] == [
        ("", 1),
        ("first", 2),
        ("second", 1),
    ]
    assert len(read_scores(run)) == 4
    assert names(read_scores(run, at=AT)) == [("a", 0.5), ("b", 0.3), ("c", 0.2)], "of two jobs the newest"


def test_job_replaces_only_its_own_score_of_a_name(tmp_path):
    run = RunDir(tmp_path / "run")
    for top1 in (0.1, 0.2):
        write_result(run, score("b", top1), CHECKPOINT, "job")
    (point,) = read_scores(run)
    assert [item["top1"] for item in point.scores] == [0.2]
    (item,) = point.scores
    assert (item["job"], item["commit"], item["stage"], item["samples"]) == ("job", CHECKPOINT, *AT)


@pytest.mark.parametrize("absent", ["stage", "samples", "evaluations"])
def test_part_of_a_score_file_is_refused(tmp_path, absent):
    """Also a file with a single score next to files of jobs."""
    run = RunDir(tmp_path / "run")
    write_result(run, score("b"), CHECKPOINT, "job")
    path = run.eval / "pretrain-64" / "job.json"
    write_json(path, {name: value for name, value in read_json(path).items() if name != absent})
    with pytest.raises(FormatError, match=f"job.json: lacks `{absent}`") as error:
        read_scores(run)
    assert error.value.code == 78


def test_run_without_file_of_its_last_scores_shows_those_of_its_result(tmp_path):
    run = make(tmp_path / "s", "r", top1=0.4)
    result = read_json(run.result)
    before = read_run(run.path).evaluations
    training_file(run, result["stage"], result["samples"]).unlink()
    write_result(run, score("new"), {"stage": result["stage"], "samples": result["samples"]}, "job")
    assert [item["name"] for item in read_run(run.path).evaluations] == [*(item["name"] for item in before), "new"]


def test_scores_of_all_data_sets_in_many_views_are_read(tmp_path):
    run = RunDir(tmp_path / "run")
    scores = [score(f"set{number}", note="n" * 1000) for number in range(2000)]
    path = write_scores(run, ScoreRecord(*AT, scores, "run-1"))
    assert path.stat().st_size > 2 << 20 and len(read_scores(run)[0].scores) == 2000


def test_damaged_file_is_named(tmp_path):
    run = RunDir(tmp_path / "run")
    write_result(run, score("b"), CHECKPOINT, "job")
    record = {"stage": "pretrain", "samples": 64, "evaluations": [score("b", "high")]}
    write_json(run.eval / "pretrain-64" / "job.json", record)
    with pytest.raises(DataError, match="job.json.*evaluations.0.top1"):
        read_scores(run)
    (run.eval / "pretrain-64" / "job.json").write_text("{}")
    assert "job.json: lacks `stage`" in " ".join(read_run(run.path).damage)


@pytest.mark.parametrize(
    "own, other, expected",
    [
        ({}, {}, 0.4),
        ({"precision": None}, {}, 0.3),  # as trained
        ({"precision": "bf16"}, {}, 0.3),
        ({"precision": "bf16"}, {"precision": "bf16"}, 0.4),
        ({"precision": "bf16"}, {"data": "other"}, 0.4),
    ],
)
def test_own_score_is_shown_unless_only_the_job_has_fp32(own, other, expected):
    points = [ScoreRecord(*AT, [score("a", 0.3, **other)], "job"), ScoreRecord(*AT, [score("a", 0.4, **own)])]
    assert names(points) == names(points[::-1]) == [("a", expected)]


@pytest.mark.parametrize(
    "own, new, expected",
    [
        (None, {}, True),
        ({"precision": "fp32"}, {"precision": "bf16"}, False),
        ({"precision": "fp32"}, {"precision": "fp32", "data": "other"}, False),
        ({"precision": "bf16"}, {"precision": "fp32"}, True),
        ({"precision": "bf16"}, {"precision": "fp32", "data": "other"}, False),
        ({"precision": "fp32"}, {"precision": "bf16", "predictions": "own"}, True),
        ({"precision": 1}, {}, True),  # damaged
    ],
)
def test_score_is_shown_unless_the_run_keeps_its_own(tmp_path, own, new, expected):
    """Its predictions replace the stored ones only then: they would not match the score."""
    run = RunDir(tmp_path / "run")
    common = {"name": "a", "task": "zeroshot", "top1": 0.5, "data": "d"}
    rows = []
    if own:
        rows = [{**common, "predictions": "own", **own}]
    write_scores(run, ScoreRecord(*AT, [{**common, "name": "b", "precision": "fp32"}, *rows]))
    assert is_shown(run, {**common, "precision": "fp32", "predictions": "new", **new}, CHECKPOINT) == expected
