"""Tests of snapshots of the submitted code: their files, restored damage, and refusal of untrusted copies."""

import hashlib
import importlib.util
import os
import py_compile
import re
import shutil
import subprocess
import sys
from pathlib import PurePosixPath
from unittest.mock import Mock

import pytest

from flip.runs.errors import ConfigError, PermissionDenied, StorageError
from jobs.common.paths import REPOSITORY
from jobs.submission import snapshot
from jobs.submission.snapshot import FOLDERS, UNNOTED, current_digest, is_code, take, verify

FILES = {
    "flip/a.py": "A = 1\n",
    "jobs/b.py": "B = 1\n",
    "pyproject.toml": "",
    "tests/t.py": "",
    "flip/.env": "KEY=1",
    "jobs/my.pem": "",
    "flip/built.so": "",
}


@pytest.fixture(params=["git", "plain"])
def repository(tmp_path, request):
    root = tmp_path / "repository"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    if request.param == "git":
        (root / ".gitignore").write_text("*.so\n")
        git(root, "init", "-q")
        git(root, "add", "flip/a.py")
    else:
        (root / "flip" / "built.so").unlink()
        (root / "flip" / "__pycache__").mkdir()
        (root / "flip" / "__pycache__" / "a.pyc").write_text("")
    return root


def git(root, *args):
    subprocess.run(["git", "-C", root, *args], check=True)


def taken(snapshot):
    return sorted(str(path.relative_to(snapshot.path)) for path in snapshot.path.rglob("*") if path.is_file())


def test_snapshot_copies_code_without_tests_and_ignored_files(repository, tmp_path):
    (repository / "sweeps" / "schemas").mkdir(parents=True)
    (repository / "sweeps" / "schemas" / "sweep.json").write_text("{}")
    snapshot = take(repository, tmp_path / "code")
    # The copy has untracked files, but no tests and no ignored files.
    assert taken(snapshot) == ["flip/a.py", "jobs/b.py", "pyproject.toml"]
    assert snapshot.left_out == ("flip/.env", "jobs/my.pem")
    assert (snapshot.path / "flip/a.py").stat().st_mode & 0o222 == 0
    assert os.listdir(tmp_path / "code") == [snapshot.digest], "no temporary files remain"


def test_snapshot_has_all_files_of_the_product():
    """A file that is left out is named at each submission, and missing in the job."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", *FOLDERS], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    paths = map(PurePosixPath, filter(None, listed.stdout.split("\0")))
    noted = [path for path in paths if not any(path.is_relative_to(folder) for folder in UNNOTED)]
    assert not [str(path) for path in noted if not is_code(path, REPOSITORY)]


def test_snapshot_names_linked_folders_and_nested_repositories(repository, tmp_path):
    """Code in them would be missing in the copy without a word."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.py").write_text("")
    (repository / "flip" / "linked.py").symlink_to(tmp_path / "elsewhere")
    (repository / "tools").symlink_to(tmp_path / "elsewhere")
    nested = repository / "jobs" / "nested"
    expected = ["flip/.env", "flip/linked.py", "jobs/my.pem", "jobs/nested", "tools"]
    if (repository / ".git").exists():
        nested.mkdir()
        (nested / "d.py").write_text("")
        git(nested, "init", "-q")
    else:
        expected.remove("jobs/nested")  # without git it is a folder like any other
    snapshot = take(repository, tmp_path / "code")
    assert list(snapshot.left_out) == expected
    assert taken(snapshot) == ["flip/a.py", "jobs/b.py", "pyproject.toml"]
    assert current_digest(repository) == snapshot.digest


def test_snapshot_without_git_does_not_walk_other_folders(repository, tmp_path, monkeypatch):
    shutil.rmtree(repository / ".git", ignore_errors=True)
    (repository / "runs" / "flip").mkdir(parents=True)
    walked = []
    walk = os.walk

    def recorded(top):
        for step in walk(top):
            walked.append(os.path.relpath(step[0], top))
            yield step

    monkeypatch.setattr(os, "walk", recorded)
    take(repository, tmp_path / "code")
    assert sorted(walked) == [".", "flip", "jobs"]


NO_CODE = (
    ".envrc", "prod.env", "secrets.toml", ".s3cfg", ".pgpass", "kubeconfig", "service-account.json",
    ".docker/config.json", "credentials", "id_ed25519", "key.pem", ".netrc", "db_password.yaml", "my-secret.yml",
    "wandb.token", "data.bin", "a.so",
)  # fmt: skip


@pytest.mark.parametrize("name", NO_CODE)
@pytest.mark.parametrize("folder", ["flip", "sweeps/clusters"])
def test_snapshot_leaves_out_secrets_and_binary_files(repository, tmp_path, folder, name):
    (repository / ".gitignore").unlink(missing_ok=True)
    (repository / "flip/built.so").unlink(missing_ok=True)
    (repository / folder / name).parent.mkdir(parents=True, exist_ok=True)
    (repository / folder / name).write_text("hush")
    (repository / folder / "token_bucket.py").write_text("")
    snapshot = take(repository, tmp_path / "code")
    assert taken(snapshot) == sorted(["flip/a.py", "jobs/b.py", "pyproject.toml", f"{folder}/token_bucket.py"])
    assert f"{folder}/{name}" in snapshot.left_out


def test_snapshot_digest_depends_on_contents_of_copied_files(repository, tmp_path):
    first = take(repository, tmp_path / "code")
    (repository / "tests" / "t.py").write_text("changed")
    assert take(repository, tmp_path / "code") == first
    (repository / "flip" / "a.py").write_text("A = 2\n")
    second = take(repository, tmp_path / "code")
    assert second.digest != first.digest
    assert (first.path / "flip/a.py").read_text() == "A = 1\n" and (second.path / "flip/a.py").read_text() == "A = 2\n"


def test_snapshot_omits_file_deleted_from_work_tree(repository, tmp_path):
    (repository / "flip" / "more.py").write_text("")
    (repository / "flip" / "a.py").unlink()
    assert taken(take(repository, tmp_path / "code")) == ["flip/more.py", "jobs/b.py", "pyproject.toml"]


def test_snapshot_restores_purged_and_truncated_files(repository, tmp_path):
    """A purged file, with its folder, and a truncated file are restored. Intact files stay untouched."""
    first = take(repository, tmp_path / "code")
    intact, purged, truncated = (first.path / name for name in ("pyproject.toml", "jobs/b.py", "flip/a.py"))
    shutil.rmtree(purged.parent)
    truncated.chmod(0o644)
    truncated.write_text("A")
    before = intact.stat()
    assert take(repository, tmp_path / "code") == first
    # The copy is complete, and no temporary files remain.
    assert taken(first) == ["flip/a.py", "jobs/b.py", "pyproject.toml"]
    assert (purged.read_text(), truncated.read_text()) == ("B = 1\n", "A = 1\n")
    assert [path.stat().st_mode & 0o777 for path in (purged, truncated)] == [0o444, 0o444]
    assert (intact.stat().st_ino, intact.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_snapshot_reports_storage_error_if_restore_fails(repository, tmp_path, monkeypatch):
    first = take(repository, tmp_path / "code")
    (first.path / "jobs/b.py").unlink()
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(StorageError, match="b.py: .*No space left on device"):
        take(repository, tmp_path / "code")
    assert taken(first) == ["flip/a.py", "pyproject.toml"]


def test_interrupted_snapshot_leaves_nothing(repository, tmp_path, monkeypatch):
    """Ctrl-C in `flip submit`, while the code is copied."""
    monkeypatch.setattr(snapshot, "_make_caches", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        take(repository, tmp_path / ".code")
    assert list((tmp_path / ".code").iterdir()) == []


def test_snapshot_refuses_code_above_size_limit(repository, tmp_path):
    (repository / "flip" / "data.py").write_bytes(bytes(2000))
    with pytest.raises(ConfigError, match="larger.*data.py.*gitignore"):
        take(repository, tmp_path / "code", limit=1000)
    assert not (tmp_path / "code").exists()


def test_snapshot_refuses_existing_copy_with_unknown_file(repository, tmp_path):
    """Python imports a sitecustomize.py on its path automatically."""
    first = take(repository, tmp_path / "code")
    (first.path / "sitecustomize.py").write_text("")
    with pytest.raises(ConfigError, match="sitecustomize.py: a file in the copied code is not of the code"):
        take(repository, tmp_path / "code")


def test_snapshot_restores_changed_bytes_of_same_length(repository, tmp_path):
    first = take(repository, tmp_path / "code")
    (first.path / "flip/a.py").chmod(0o644)
    (first.path / "flip/a.py").write_text("A = 2\n")
    assert take(repository, tmp_path / "code") == first and (first.path / "flip/a.py").read_text() == "A = 1\n"


@pytest.mark.parametrize("place", [".", "flip", "flip/a.py"])
def test_snapshot_refuses_copy_writable_by_other_users(repository, tmp_path, place):
    first = take(repository, tmp_path / "code")
    (first.path / place).chmod(0o666 | 0o111 * (place != "flip/a.py"))
    with pytest.raises(PermissionDenied, match="is not trusted: .*every user may write to it"):
        take(repository, tmp_path / "code")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("place", ["code", "copy", "link"])
def test_snapshot_refuses_symlink_or_copy_owned_by_other_user(repository, tmp_path, place):
    first = take(repository, tmp_path / "code")
    if place == "link":
        first.path.rename(tmp_path / "moved")
        first.path.symlink_to(tmp_path / "moved")
    else:
        os.chown(first.path if place == "copy" else first.path.parent, 12345, -1)
    with pytest.raises(PermissionDenied, match="symbolic link" if place == "link" else "belongs to uid 12345"):
        take(repository, tmp_path / "code")


def test_snapshot_stays_trusted_after_import_under_open_umask(repository, tmp_path):
    """Python executes bytecode, and would create __pycache__ with the permissions of the umask."""
    first = take(repository, tmp_path / "code")
    before = os.umask(0)
    try:
        command = [sys.executable, "-S", "-c", "import flip.a"]  # -S: not the installed checkout
        environment = {"PYTHONPATH": str(first.path), "PYTHONDONTWRITEBYTECODE": ""}
        subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    finally:
        os.umask(before)
    assert list((first.path / "flip" / "__pycache__").iterdir())
    assert take(repository, tmp_path / "code") == first


def test_snapshot_is_not_writable_by_others_under_open_umask(repository, tmp_path):
    before = os.umask(0)
    try:
        snapshot = take(repository, tmp_path / "code")
    finally:
        os.umask(before)
    assert not [
        path for path in (snapshot.path.parent, *snapshot.path.parent.rglob("*")) if path.stat().st_mode & 0o022
    ]


def plant_bytecode(code):
    """Replace the bytecode of a module by one that Python executes without a look at the source."""
    (code / "flip" / "evil.py").write_text("VALUE = 'evil'\n")
    cache = importlib.util.cache_from_source(str(code / "flip" / "a.py"))
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(code / "flip" / "evil.py"), cache, invalidation_mode=mode)
    (code / "flip" / "evil.py").unlink()


def test_snapshot_does_not_execute_copied_bytecode(repository, tmp_path):
    (repository / "flip" / "__init__.py").touch()
    (repository / "flip" / "a.py").write_text("VALUE = 'good'\n")
    snapshot = take(repository, tmp_path / "code")
    command = [sys.executable, "-c", "from flip import a; print(a.VALUE)"]
    options = {"cwd": snapshot.path, "capture_output": True, "text": True, "check": True}
    plant_bytecode(snapshot.path)
    assert subprocess.run(command, **options).stdout == "evil\n", "the attack works"
    take(repository, tmp_path / "code")
    assert subprocess.run(command, **options).stdout == "good\n"


@pytest.mark.parametrize("change", ["content", "mode", "additional file", "linked package", "missing file", "FIFO"])
def test_changed_snapshot_is_refused_with_remedy(repository, tmp_path, change):
    code = take(repository, tmp_path / "code").path
    verify(code)
    file = next(path for path in sorted(code.rglob("*.py")))
    if change == "content":
        file.chmod(0o644), file.write_text("print()")
    elif change == "mode":
        file.chmod(0o555)
    elif change == "linked package":
        (code / ".x" / "json").mkdir(parents=True)
        (code / "json").symlink_to(".x/json")
    elif change == "additional file":
        (code / "sitecustomize.py").touch()
    else:
        file.unlink()
        if change == "FIFO":
            os.mkfifo(file)
    with pytest.raises(PermissionDenied, match=f"mv {re.escape(str(code))} "):
        verify(code)


def test_snapshot_with_bytecode_and_temporary_files_is_unchanged(repository, tmp_path):
    code = take(repository, tmp_path / "code").path
    (code / "flip" / "__pycache__" / "a.cpython-311.pyc").touch()
    (code / "flip" / ".a.py.17").touch()
    verify(code)


def test_snapshot_has_callbacks_of_the_user(repository, tmp_path):
    plain = take(repository, tmp_path / "code")
    callbacks = {"more/a.py": b"A = 1\n", "b.py": b"B = 1\n"}
    snapshot = take(repository, tmp_path / "code", callbacks)
    assert snapshot.digest == current_digest(repository, callbacks) != plain.digest == current_digest(repository)
    assert set(taken(snapshot)) - set(taken(plain)) == {"user_files/more/a.py", "user_files/b.py"}
    assert snapshot.user_files == {
        name: f"sha256:{hashlib.sha256(text).hexdigest()}" for name, text in callbacks.items()
    }
    (snapshot.path / "user_files" / "b.py").chmod(0o644)
    (snapshot.path / "user_files" / "b.py").write_text("B = 2\n")
    with pytest.raises(PermissionDenied, match="have changed since they were submitted"):
        verify(snapshot.path)
    assert take(repository, tmp_path / "code", callbacks) == snapshot, "it is repaired"
    verify(snapshot.path)
