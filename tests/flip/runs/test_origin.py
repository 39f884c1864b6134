"""Tests which run directories count as copies of another one, and which as renamed or moved."""

import contextlib
import os
import shutil

import pytest

from flip.runs.origin import is_copy, is_gone, original_folder
from flip.runs.rundir import RunDir

NOBODY = 65534


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "sweep" / "a")
    run.path.mkdir(parents=True)
    return run


def record(path):
    return {"folder": str(path)}


def test_run_at_its_recorded_folder_is_no_copy(run, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "sweep")
    assert not is_copy(run, record(run.path)) and not is_copy(run, record(tmp_path / "link" / "a"))
    assert not is_copy(run, record(f"{run.path}/")) and not is_copy(run, {})
    gone = RunDir(tmp_path / "unmounted" / "a")
    assert not is_copy(gone, record(gone.path)), "no file is needed to compare equal paths"


def test_copy_of_existing_run_is_copy_and_renamed_or_moved_run_is_not(run, tmp_path):
    copy = RunDir(tmp_path / "sweep" / "b")
    shutil.copytree(run.path, copy.path)
    assert is_copy(copy, record(run.path))
    moved = RunDir(tmp_path / "other" / "a")
    moved.path.parent.mkdir()
    run.path.rename(moved.path)
    assert not is_copy(copy, record(run.path)) and not is_copy(moved, record(run.path))


def test_unreachable_original_counts_as_copy(run, tmp_path):
    """A file system that is not mounted, a dangling link, a folder that may not be listed, and a relative path."""
    assert is_copy(run, record(tmp_path / "unmounted" / "a"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert is_copy(run, record(tmp_path / "dangling"))
    (tmp_path / "file").write_text("")
    assert is_copy(run, record(tmp_path / "file" / "a"))
    assert is_copy(run, record("nowhere"))


def test_original_in_folder_that_may_not_be_listed_counts_as_copy(run, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o311)
    with without_rights_of_root():
        assert is_copy(run, record(closed / "a")) and not is_gone(closed / "a")


@contextlib.contextmanager
def without_rights_of_root():
    before = os.geteuid()
    os.seteuid(NOBODY if before == 0 else before)
    try:
        yield
    finally:
        os.seteuid(before)


def test_original_folder_outlives_the_submission_that_replaces_job_json(run, tmp_path):
    copy = RunDir(tmp_path / "sweep" / "b")
    copy.path.mkdir()
    first = {"folder": str(copy.path), "copy_of": original_folder(copy, record(run.path))}
    assert first["copy_of"] == str(run.path)
    assert original_folder(copy, first) == str(run.path), "also after a second submission"
    assert original_folder(run, record(run.path)) == "" == original_folder(run, {})
