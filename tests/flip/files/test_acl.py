"""Tests of access control lists: their binary form, and who may write after the mask has limited the entries."""

import os

import pytest

from flip.files import acl
from flip.files.acl import ACCESS, DEFAULT, GROUP, GROUP_OBJ, MASK, NO_ID, OTHER, USER, USER_OBJ, Entry

OPEN = [
    Entry(USER_OBJ, 7, NO_ID),
    Entry(USER, 6, 60503),
    Entry(GROUP_OBJ, 7, NO_ID),
    Entry(GROUP, 7, 60600),
    Entry(MASK, 7, NO_ID),
    Entry(OTHER, 5, NO_ID),
]


def set_or_skip(path, kind, entries):
    try:
        acl.write_acl(path, kind, entries)
    except OSError as error:
        pytest.skip(f"no ACLs on the file system of {path}: {error.strerror}")


def test_acl_of_folder_is_read_as_written(tmp_path):
    assert acl.read_acl(tmp_path, DEFAULT) == [] == acl.read_acl(tmp_path, ACCESS)
    set_or_skip(tmp_path, DEFAULT, OPEN)
    assert acl.read_acl(tmp_path, DEFAULT) == OPEN
    (tmp_path / "file").touch(0o666)
    inherited = acl.read_acl(tmp_path / "file", ACCESS)
    assert Entry(GROUP, 7, 60600) in inherited and Entry(MASK, 6, NO_ID) in inherited


def test_acl_is_read_from_descriptor(tmp_path):
    set_or_skip(tmp_path, DEFAULT, OPEN)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        assert acl.read_acl(handle, DEFAULT) == OPEN
    finally:
        os.close(handle)


def test_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        acl.read_acl(tmp_path / "none", ACCESS)


@pytest.mark.parametrize("data", [b"", b"\x02\0\0", b"\x03\0\0\0", b"\x02\0\0\0" + b"\0" * 7])
def test_unknown_format_is_refused(data):
    with pytest.raises(OSError, match="unknown format"):
        acl.decode(data)


def test_writers_are_limited_by_mask():
    assert [entry.tag for entry in acl.writers(OPEN)] == [USER, GROUP_OBJ, GROUP]
    closed = [entry._replace(permissions=5) if entry.tag == MASK else entry for entry in OPEN]
    assert acl.writers(closed) == []
    all_users = [entry._replace(permissions=7) if entry.tag == OTHER else entry for entry in closed]
    assert [entry.tag for entry in acl.writers(all_users)] == [OTHER]  # the mask does not limit other users


def test_without_writers_removes_write_bits_of_others_alone():
    entries = acl.without_writers(OPEN)
    assert acl.writers(entries) == [] and entries[0] == OPEN[0]
    assert [entry.permissions for entry in entries[1:]] == [4, 5, 5, 5, 5]
