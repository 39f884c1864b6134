"""Ownership of paths, and access that prepared links and FIFOs cannot redirect or stop."""

import os
import stat

import pytest

from flip.runs import ownership, rundir


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_my_closed_files_are_trusted(tmp_path):
    (tmp_path / "a").write_text("")
    assert ownership.untrusted(tmp_path / "a") == ""
    assert ownership.untrusted_inside(tmp_path) == ""


@pytest.mark.parametrize(("mode", "reason"), [(0o646, "every user"), (0o1777, "every user"), (0o600, ""), (0o755, "")])
def test_write_permission_of_others_is_not(tmp_path, mode, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(mode)
    assert reason in ownership.untrusted(tmp_path / "folder")
    assert bool(ownership.untrusted(tmp_path / "folder")) == bool(reason)


def test_a_link_is_not(tmp_path):
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert "link" in ownership.untrusted(tmp_path / "link")
    assert ownership.untrusted_inside(tmp_path).startswith(f"{tmp_path / 'link'}: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_file_is_not_and_a_trusted_group_is_named(tmp_path, monkeypatch):
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


def test_a_fifo_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "status.json")
    with pytest.raises(ValueError, match=r"status.json: not a regular file"):
        rundir.read_json(tmp_path / "status.json")


def test_a_large_file_is_refused_before_memory_is_taken(tmp_path):
    with open(tmp_path / "status.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="more than the limit"):
        rundir.read_json(tmp_path / "status.json")


def test_prepared_links_are_not_written_through(tmp_path, monkeypatch):
    """The names that were predictable, and one that is hit by chance."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f"status.json.tmp.{os.getpid()}").symlink_to(victim)
    (tmp_path / f"status.json.new.{os.getpid()}").symlink_to(victim)
    (tmp_path / f"status.json.tmp.{7:016x}").symlink_to(victim)
    draws = iter([7, 8, 7, 9])
    monkeypatch.setattr(ownership.secrets, "token_hex", lambda size: f"{next(draws):016x}")
    rundir.write_json(tmp_path / "status.json", {"a": 1})
    assert not rundir.create_json(tmp_path / "status.json", {"a": 2})
    assert victim.read_text() == "mine" and rundir.read_json(tmp_path / "status.json") == {"a": 1}


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path):
    os.umask(0o027)
    rundir.write_json(tmp_path / "status.json", {})
    assert stat.S_IMODE((tmp_path / "status.json").stat().st_mode) == 0o640


def test_a_private_folder(tmp_path):
    folder = ownership.private_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    assert stat.S_IMODE(ownership.private_folder(folder).stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(PermissionError):
        ownership.private_folder(tmp_path / "link")
