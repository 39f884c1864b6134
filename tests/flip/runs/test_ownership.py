"""Tests ownership checks of paths."""

import os

import pytest

from flip.runs import ownership


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_own_file_without_write_access_for_others_is_trusted(tmp_path):
    (tmp_path / "a").write_text("")
    assert ownership.untrusted(tmp_path / "a") == ""
    assert ownership.untrusted_inside(tmp_path) == ""


@pytest.mark.parametrize(("mode", "reason"), [(0o646, "every user"), (0o1777, "every user"), (0o600, ""), (0o755, "")])
def test_path_writable_by_others_is_untrusted(tmp_path, mode, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(mode)
    assert reason in ownership.untrusted(tmp_path / "folder")
    assert bool(ownership.untrusted(tmp_path / "folder")) == bool(reason)


def test_symlink_is_untrusted(tmp_path):
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert "link" in ownership.untrusted(tmp_path / "link")
    assert ownership.untrusted_inside(tmp_path).startswith(f"{tmp_path / 'link'}: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_file_of_other_user_or_untrusted_group_is_untrusted(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    os.chown(file, 12345, 0)
    assert "uid 12345" in ownership.untrusted(file) and not ownership.is_mine(file)
    os.chown(file, 0, 100)
    file.chmod(0o664)
    group = ownership.group_name(100)
    assert group in ownership.untrusted(file)
    for named in (group, "100"):
        monkeypatch.setenv(ownership.TRUSTED_GROUP, named)
        assert ownership.untrusted(file) == ""
    os.chown(file, 0, 54321)
    assert "gid 54321" in ownership.untrusted(file)
    monkeypatch.setenv(ownership.TRUSTED_GROUP, "54321")
    assert ownership.untrusted(file) == "", "a group without a name"
