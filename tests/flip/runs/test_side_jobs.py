"""Tests that the place of a directory tells a side job from a run."""

from flip.runs.rundir import RunDir
from flip.runs.side_jobs import SIDE_JOBS, is_side_job, sweep_folder


def test_side_job_lies_in_its_folder_of_the_sweep(tmp_path):
    run = RunDir(tmp_path / "demo" / "a")
    job = RunDir(tmp_path / "demo" / SIDE_JOBS / "a")
    assert is_side_job(job) and not is_side_job(run)
    assert sweep_folder(job) == sweep_folder(run) == tmp_path / "demo"
