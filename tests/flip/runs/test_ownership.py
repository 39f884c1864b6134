"""Tests ownership checks of paths, and file access that prepared symlinks and FIFOs cannot redirect or block."""

import os
import stat

import pytest

from flip.runs import files, ownership, rundir


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


def test_read_json_rejects_fifo_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "status.json")
    with pytest.raises(ValueError, match=r"status.json: not a regular file"):
        rundir.read_json(tmp_path / "status.json")


def test_read_json_rejects_huge_file_without_reading(tmp_path):
    with open(tmp_path / "status.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than the limit"):
        rundir.read_json(tmp_path / "status.json")


def test_json_writers_do_not_follow_prepared_symlinks(tmp_path, monkeypatch):
    """Covers temporary names that were predictable in older versions, and a random name that exists by chance."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f"status.json.tmp.{os.getpid()}").symlink_to(victim)
    (tmp_path / f"status.json.new.{os.getpid()}").symlink_to(victim)
    (tmp_path / f"status.json.tmp.{7:016x}").symlink_to(victim)
    draws = iter([7, 8, 7, 9])
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: f"{next(draws):016x}")
    rundir.write_json(tmp_path / "status.json", {"a": 1})
    assert not rundir.create_json(tmp_path / "status.json", {"a": 2})
    assert victim.read_text() == "mine" and rundir.read_json(tmp_path / "status.json") == {"a": 1}


def test_write_json_respects_umask(tmp_path):
    os.umask(0o027)
    rundir.write_json(tmp_path / "status.json", {})
    assert stat.S_IMODE((tmp_path / "status.json").stat().st_mode) == 0o640


def test_private_folder_has_mode_0700_and_rejects_symlink(tmp_path):
    folder = files.private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    assert stat.S_IMODE(files.private_folder(folder).stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(PermissionError):
        files.private_folder(tmp_path / "link")
