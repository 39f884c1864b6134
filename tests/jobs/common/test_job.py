"""Tests the job.json that every backend writes."""

import shutil

from flip.runs.rundir import RunDir, read_json, write_json
from jobs.common.job import Job


def test_job_record_of_copied_or_renamed_run_names_the_former_folder(tmp_path):
    """job.json of the copy names the copy itself, so the trainer needs another field to know the original."""
    run, copy, renamed = (RunDir(tmp_path / "sweep" / name) for name in ("a", "b", "c"))
    run.path.mkdir(parents=True)
    write_json(run.path / "job.json", Job(run, tmp_path).record())
    assert read_json(run.path / "job.json")["copy_of"] == ""
    shutil.copytree(run.path, copy.path)
    for _ in range(2):
        record = Job(copy, tmp_path).record()
        assert (record["folder"], record["copy_of"]) == (str(copy.path), str(run.path))
        write_json(copy.path / "job.json", record)
    run.path.rename(renamed.path)
    record = Job(renamed, tmp_path).record()
    assert (record["folder"], record["copy_of"]) == (str(renamed.path), str(run.path)), "it was renamed"


def test_job_record_names_the_kind_of_work_and_its_module(tmp_path):
    job = Job(RunDir(tmp_path / "s" / "a"), tmp_path, kind="other", module="other.ranks")
    assert (job.record()["job_kind"], job.record()["module"]) == ("other", "other.ranks")
