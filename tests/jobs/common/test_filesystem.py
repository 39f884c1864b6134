"""Tests of the errors for folders and files that cannot be written: they name what the user typed, and a remedy."""

import errno

import pytest

from flip.files.creation import atomic_path, atomic_write, create_sibling, final_path
from flip.runs.errors import PermissionDenied, StorageError
from jobs.common import filesystem


def test_error_names_the_file_and_not_its_temporary_name(tmp_path):
    target = tmp_path / "my.yaml"
    names = set()
    with atomic_path(target) as path:
        names.add(path)
    names.add(create_sibling(target)[0])
    for temporary in names:
        assert temporary != target and final_path(temporary) == target
        with pytest.raises(PermissionDenied) as caught, filesystem.writing(target, "Name another file."):
            raise PermissionError(errno.EACCES, "Permission denied", str(temporary))
        assert str(caught.value) == f"{target}: may not be written. Name another file."
    assert final_path(tmp_path / "a.tmp.b") == tmp_path / "a.tmp.b"


def test_probe_names_the_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(prefix, dir):
        raise OSError(errno.EROFS, "Read-only file system", f"{dir}/{prefix}0000")

    monkeypatch.setattr(filesystem.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(OSError) as caught:
        filesystem.probe(tmp_path)
    error = filesystem.unwritable(caught.value, tmp_path)
    assert isinstance(error, PermissionDenied) and error.where == str(tmp_path) and "--root FOLDER" in error.remedy


def test_missing_folder_is_named_by_the_file(tmp_path):
    target = tmp_path / "no" / "x"
    error = pytest.raises(StorageError, match=f"^{target}: cannot be written: No such file")
    with error, filesystem.writing(target), atomic_write(target):
        pass
