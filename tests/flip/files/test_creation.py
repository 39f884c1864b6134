"""Tests of folders and files of runs: modes under umasks and default ACLs, and links that another user has prepared."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flip.files import acl
from flip.files import creation as files
from flip.runs import rundir
from tests.flip.files.test_acl import OPEN, set_or_skip

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(params=[0o000, 0o002, 0o022, 0o077, "acl"], ids=["000", "002", "022", "077", "acl"])
def place(request, tmp_path):
    """A folder, under each umask, and with a default ACL that gives a group and a user write access."""
    if request.param == "acl":
        set_or_skip(tmp_path, acl.DEFAULT, OPEN)
    else:
        os.umask(request.param)
    return tmp_path


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def writable(path):
    """Whether others than the owner may write to a path, or to what libraries will create in it."""
    entries = acl.writers(acl.read_acl(path, acl.ACCESS)) + acl.writers(acl.read_acl(path, acl.DEFAULT))
    return bool(mode(path) & 0o022 or entries)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_folders_of_runs_are_closed_and_so_is_what_libraries_create_in_them(place):
    private = os.umask(0) == 0o077
    os.umask(0o077 if private else 0)  # a library follows an umask that denies nothing; 077 stays
    for make in (files.closed_folder, files.run_folder):
        folder = make(place / make.__name__ / "a" / "b")
        for path in (folder, folder.parent, folder.parent.parent):
            assert not writable(path), (make, path)
            assert not (private and mode(path) & 0o077), "chmod has opened what umask 077 closed"
    exclusive = files.new_folder(place / "new")
    assert not writable(exclusive)
    with pytest.raises(FileExistsError):
        files.new_folder(exclusive)


def test_file_of_library_in_run_folder_is_closed_by_acl(tmp_path):
    set_or_skip(tmp_path, acl.DEFAULT, OPEN)
    folder = files.run_folder(tmp_path / "tensorboard")
    (folder / "events").touch(0o666)
    assert not writable(folder / "events")
    (folder / "sub").mkdir(0o777)
    assert not writable(folder / "sub")


def test_run_folder_closes_folder_of_a_copy(tmp_path):
    set_or_skip(tmp_path, acl.DEFAULT, OPEN)
    folder = tmp_path / "metrics"
    folder.mkdir()
    folder.chmod(0o2775)
    files.closed_folder(folder)
    assert writable(folder), "closed_folder leaves an existing folder as it is"
    files.run_folder(folder)
    assert not writable(folder) and mode(folder) == 0o2755
    folder.chmod(0o500)
    files.run_folder(folder)
    assert mode(folder) == 0o500, "no permission is added"


def test_run_folder_follows_link_of_the_user(tmp_path):
    (tmp_path / "large").mkdir(0o775)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "large")
    files.run_folder(tmp_path / "checkpoints")
    assert mode(tmp_path / "large") == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_run_folder_refuses_folder_or_link_of_other_user(tmp_path, kind):
    (tmp_path / "victim").mkdir()
    path = tmp_path / "logs"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "victim")
    os.chown(path, 12345, 0, follow_symlinks=False)
    with pytest.raises(files.RefusedPath, match="belongs to uid 12345"):
        files.run_folder(path)


def test_start_of_attempt_closes_whole_run(tmp_path):
    run = rundir.RunDir(tmp_path / "sweep" / "run")
    folders = [run.attempts / "1", run.logs / "1", run.eval / "main-64", run.checkpoints / "main" / "64-1", run.pins]
    for folder in folders:
        folder.mkdir(parents=True)
    for path in (run.path, *run.path.rglob("*")):
        path.chmod(0o2775)
    assert run.start_attempt({}) == 2
    assert {mode(path) & 0o022 for path in (run.path, *run.path.rglob("*"))} == {0}
    assert mode(run.checkpoints / "main" / "64-1") == 0o2755


def test_private_folder_has_mode_0700_and_rejects_symlink(tmp_path):
    folder = files.private_folder(tmp_path / "a" / "b")
    assert mode(folder) == 0o700
    folder.chmod(0o777)
    assert mode(files.private_folder(folder)) == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(files.RefusedPath):
        files.private_folder(tmp_path / "link")


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_output_folders_follow_umask(tmp_path, umask):
    os.umask(umask)
    natural = 0o777 & ~umask
    assert mode(files.output_folder(tmp_path / "a" / "b")) == mode(tmp_path / "a") == natural
    folder = files.new_output_folder(tmp_path / "export")
    assert not mode(folder) & 0o022, "closed while it is written"
    files.publish_folder(folder)
    assert mode(folder) == natural and list(folder.iterdir()) == []
    with pytest.raises(FileExistsError):
        files.new_output_folder(folder)


def test_published_folder_has_inherited_acl(tmp_path):
    set_or_skip(tmp_path, acl.DEFAULT, OPEN)
    folder = files.new_output_folder(tmp_path / "export")
    assert not acl.writers(acl.read_acl(folder, acl.ACCESS))
    files.publish_folder(folder)
    (tmp_path / "natural").mkdir()
    assert acl.read_acl(folder, acl.ACCESS) == acl.read_acl(tmp_path / "natural", acl.ACCESS)


def test_close_umask_denies_write_access_of_others_and_nothing_else():
    code = "import os; from flip.files.creation import close_umask; close_umask(); print(oct(os.umask(0)))"
    for umask, expected in ((0o002, "0o22"), (0o077, "0o77"), (0o000, "0o22")):
        os.umask(umask)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


# -- files ------------------------------------------------------------------------------------------------------------


def write_append(path):
    with files.open_append(path) as file:
        file.write(b"new")


def write_text_append(path):
    with files.open_append(path, "utf-8") as file:
        file.write("new")


def write_lock(path):
    os.close(files.open_lock(path))


def write_atomic(path):
    with files.atomic_write(path) as file:
        file.write(b"new")


def write_by_name(path):
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(b"new")


IN_PLACE = [write_append, write_text_append, write_lock]
ATOMIC = [write_atomic, write_by_name]


@pytest.mark.parametrize("write", IN_PLACE + ATOMIC)
def test_files_of_runs_are_closed(place, write):
    folder = place / "log"
    folder.mkdir(0o700)  # with the default ACL still open
    write(folder / "file")
    assert not writable(folder / "file")
    write(folder / "file")
    assert mode(folder / "file") & 0o700 == 0o600


@pytest.mark.parametrize("write", IN_PLACE)
@pytest.mark.parametrize("kind", ["link", "dangling", "hard", "fifo", "folder"])
def test_prepared_name_is_refused_and_victim_unchanged(tmp_path, write, kind):
    victim = tmp_path / "victim"
    path = tmp_path / "node0.out"
    victim.write_bytes(b"mine")
    {
        "link": lambda: path.symlink_to(victim),
        "dangling": lambda: path.symlink_to(tmp_path / "none"),
        "hard": lambda: path.hardlink_to(victim),
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[kind]()
    with pytest.raises((files.RefusedPath, IsADirectoryError), match="node0.out"):
        write(path)
    assert victim.read_bytes() == b"mine" and not (tmp_path / "none").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("write", IN_PLACE)
def test_file_of_other_user_is_refused(tmp_path, write):
    path = tmp_path / "node0.out"
    path.write_bytes(b"other")
    os.chown(path, 12345, 0)
    with pytest.raises(files.RefusedPath, match="belongs to uid 12345"):
        write(path)
    assert path.read_bytes() == b"other"


@pytest.mark.parametrize("write", ATOMIC)
def test_prepared_link_is_replaced_and_victim_unchanged(tmp_path, write):
    victim = tmp_path / "victim"
    path = tmp_path / "shard"
    victim.write_bytes(b"mine")
    path.symlink_to(victim)
    write(path)
    assert victim.read_bytes() == b"mine" and path.read_bytes() == b"new" and not path.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["shard", "victim"]


def test_append_closes_and_continues_open_file(tmp_path):
    path = tmp_path / "1.jsonl"
    path.write_bytes(b"old ")
    path.chmod(0o664)
    write_append(path)
    assert path.read_bytes() == b"old new" and mode(path) == 0o644


@pytest.mark.parametrize("open_new", [files.atomic_write, files.atomic_path])
def test_failed_write_keeps_old_file_and_leaves_no_temporary(tmp_path, open_new):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), open_new(path):
        raise RuntimeError
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def test_atomic_path_keeps_ending_and_restores_mode_of_replaced_file(tmp_path):
    with files.atomic_path(tmp_path / "1-2.json.gz", files.OUTPUT_MODE) as temporary:
        assert temporary.name.endswith(".json.gz")
        (tmp_path / "other").touch(0o600)
        os.replace(tmp_path / "other", temporary)
    assert mode(tmp_path / "1-2.json.gz") == 0o644


def test_atomic_path_refuses_link_in_place_of_temporary(tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    with pytest.raises(OSError, match="symbolic link"), files.atomic_path(tmp_path / "a") as temporary:
        temporary.unlink()
        temporary.symlink_to(tmp_path / "victim")
    assert os.listdir(tmp_path) == ["victim"]


def test_create_file_follows_umask_and_refuses_prepared_name(tmp_path):
    os.umask(0o002)
    with files.create_file(tmp_path / "a.tar") as file:
        file.write(b"1")
        assert file.name == str(tmp_path / "a.tar")
    assert mode(tmp_path / "a.tar") == 0o664
    (tmp_path / "b.tar").symlink_to(tmp_path / "none")
    for name in ("a.tar", "b.tar"):
        with pytest.raises(FileExistsError):
            files.create_file(tmp_path / name)
    assert not (tmp_path / "none").exists()


def test_open_logs_refuses_prepared_link_that_shell_would_follow(tmp_path):
    run = rundir.RunDir(tmp_path / "run")
    (tmp_path / "victim").write_bytes(b"mine")
    folder = run.open_logs(1)
    (folder / "job.out").touch()
    assert run.open_logs(1) == folder and os.readlink(run.logs / "latest") == "1"
    (folder / "job.err").symlink_to(tmp_path / "victim")
    with pytest.raises(files.RefusedPath, match=r"job.err"):
        run.open_logs(1)


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
    """Covers temporary names that can be predicted, and a random name that exists by chance."""
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


def test_open_logs_leaves_copy_of_link_alone(tmp_path):
    """``scp -r`` and ``cp -rL`` copy the folder to which logs/latest leads: the run goes on."""
    run = rundir.RunDir(tmp_path / "run")
    folder = run.open_logs(1)
    (run.logs / "latest").unlink()
    (run.logs / "latest").mkdir()
    assert run.open_logs(2) == folder.with_name("2")
    assert sorted(path.name for path in run.logs.iterdir()) == [
        "1",
        "2",
        "latest",
    ]
