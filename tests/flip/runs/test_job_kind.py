"""Tests of the kind of a job."""

import pytest

from flip.runs.job_kind import EVALUATE, EVALUATIONS, TRAIN, is_evaluation, job_kind, sweep_folder
from flip.runs.rundir import RunDir, write_json


@pytest.mark.parametrize(
    "folder, record, kind",
    [
        ("demo", {"job_kind": "train"}, TRAIN),
        ("demo", {"job_kind": "evaluate"}, EVALUATE),
        (EVALUATIONS, {"job_kind": "evaluate"}, EVALUATE),
        ("demo", {"job_kind": "of no kind"}, TRAIN),
        ("demo", None, TRAIN),  # never submitted
        (EVALUATIONS, None, EVALUATE),
    ],
)
def test_kind_is_the_recorded_one_or_that_of_the_folder(tmp_path, folder, record, kind):
    run = RunDir(tmp_path / folder / "a")
    run.path.mkdir(parents=True)
    if record is not None:
        write_json(run.path / "job.json", record)
    assert job_kind(run) == kind and is_evaluation(run) == (kind == EVALUATE)
    assert job_kind(run, record or {}) == kind


def test_kind_of_a_run_with_a_damaged_record_is_that_of_its_folder(tmp_path):
    run = RunDir(tmp_path / EVALUATIONS / "a")
    run.path.mkdir(parents=True)
    (run.path / "job.json").write_text("{")
    assert job_kind(run) == EVALUATE


def test_evaluation_belongs_to_the_sweep_above_its_folder(tmp_path):
    run = RunDir(tmp_path / "demo" / EVALUATIONS / "a")
    assert sweep_folder(run, EVALUATE) == tmp_path / "demo"
    assert sweep_folder(RunDir(tmp_path / "demo" / "a"), TRAIN) == tmp_path / "demo"
