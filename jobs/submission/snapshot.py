"""Snapshots: read-only copies of the submitted code, named by the digest of their contents and shared by runs.

Only files that a run needs are copied (``is_code``). Other files below the copied folders are listed and left out,
because they may be credentials, whatever their names.
"""

import hashlib
import logging
import os
import re
import secrets
import shlex
import stat
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path, PurePosixPath

from flip.common import user_classes
from flip.files import deletion
from flip.files.creation import closed_folder, create_file, fsync_path, read_regular
from flip.runs.errors import ConfigError, PermissionDenied, StorageError
from jobs.common.filesystem import require_trusted, unwritable, writing

log = logging.getLogger(__name__)
DISTRIBUTION = "flip-toolkit"  # the name in pyproject.toml
FOLDERS = ("flip", "jobs", "tools", "sweeps")  # of the repository, whose code is copied
SUFFIXES = (".css", ".md", ".py", ".pyi", ".sh", ".typed", ".yaml", ".yml")  # of code; data have configured paths
#: Files for editors, and of shipped programs, which a snapshot holds as those of a user. Left out without a note.
UNNOTED = ("sweeps/schemas", "sweeps/programs")
TOP = ("pyproject.toml", "requirements*.txt", "requirements*.lock", "LICENSE")  # copied files of the root
#: Names that are left out although they have the suffix of code, unless they are Python modules.
SECRETS = (
    "*credential*", "*secret*", "*password*", "*token*.y*ml", "*kubeconfig*", "*service-account*", "*service_account*",
)  # fmt: skip
#: Folders that are skipped if there is no git to ask.
SKIPPED = (".git", ".venv", "venv", "node_modules", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis")
DIGEST = re.compile("[0-9a-f]{16}")  # name of a snapshot
NO_USER_FILES: Mapping[str, bytes] = {}
LIMIT = 50_000_000  # bytes of the largest snapshot: code, not data


@dataclass(frozen=True)
class Snapshot:
    """``digest`` of names, modes and contents; ``left_out``: files below the copied folders that are not copied;
    ``user_files``: path -> checksum of a user's files in it."""

    digest: str
    path: Path
    left_out: tuple[str, ...]
    user_files: Mapping[str, str] = field(default_factory=dict)


def take(repository: Path, into: Path, user_files: Mapping[str, bytes] = NO_USER_FILES, limit: int = LIMIT) -> Snapshot:
    """Copy the code of ``repository``, and a user's files (path -> content), to ``into``/<digest>/, or repair
    the copy that exists.

    Copies tracked, modified and untracked files that git does not ignore; without git, all but SKIPPED folders. Raises
    ConfigError if they exceed ``limit`` bytes, StorageError if they cannot be written, PermissionDenied if another user
    may write to ``into`` or below the existing copy.
    """
    contents, left_out = _read(repository, limit)
    contents |= _user_contents(user_files)
    digest = _digest(contents)
    target = into / digest
    log.debug("code: %d files, snapshot %s", len(contents), target)
    checksums = {name: f"sha256:{hashlib.sha256(content).hexdigest()}" for name, content in user_files.items()}
    snapshot = Snapshot(digest, target, tuple(left_out), checksums)
    with writing(into):
        require_trusted(closed_folder(into))
    if os.path.lexists(target):
        require_trusted(target, inside=True)
        _refuse_additional_files(contents, target)
        _repair(contents, target)
        with writing(target):
            os.utime(target)  # in use again: flip clean deletes only old ones
            delete_bytecode(target)
            _make_caches(contents, target)
        return snapshot
    temporary = into / f".{digest}.{secrets.token_hex(8)}"
    try:
        for name, (data, executable) in contents.items():
            closed_folder((temporary / name).parent)
            _write(temporary / name, data, executable)
        _make_caches(contents, temporary)
        os.rename(temporary, target)
        fsync_path(into)
    except OSError as error:
        if not target.exists():  # else another submit was first, with the same bytes
            raise unwritable(error, into) from error
    finally:  # also after Ctrl-C
        deletion.discard_own_folder(temporary)
    return snapshot


def files(repository: Path) -> Iterator[PurePosixPath]:
    """Relative paths of files below the copied folders and of copied top-level files, in order. A linked folder, a
    submodule or a nested repository is one path."""
    listed = _git(repository)
    if listed is None:
        listed = _installed(repository)
    if listed is None:
        listed = list(_walk(repository))
    for path in sorted(listed):
        top = len(path.parts) == 1 and any(fnmatch(path.name, pattern) for pattern in TOP)
        file = repository / path
        inside = path.parts[0] in FOLDERS
        if (top or inside) and (file.is_file() or (inside and file.is_dir())):
            yield path


def is_code(path: PurePosixPath, repository: Path) -> bool:
    """Whether a file is copied, by its folder and suffix, and by those of the target of a link."""
    real = (repository / path).resolve()
    root = repository.resolve()
    if not (real.is_file() and real.is_relative_to(root)):
        return False
    return _is_code(path) and _is_code(PurePosixPath(real.relative_to(root)))


def delete_bytecode(code: Path) -> None:
    """Delete Python's bytecode in a snapshot: it may have come with a copy, and would be executed in place of sources.

    Python writes it again. Raises OSError.
    """
    for path in code.rglob("__pycache__/*"):
        deletion.delete_file(path, missing_ok=True)


def _is_code(path: PurePosixPath) -> bool:
    if len(path.parts) == 1:
        return any(fnmatch(path.name, pattern) for pattern in TOP)
    name = path.name.lower()
    hidden = any(part.startswith(".") for part in path.parts)
    secret = path.suffix not in (".py", ".pyi") and any(fnmatch(name, pattern) for pattern in SECRETS)
    return path.parts[0] in FOLDERS and path.suffix in SUFFIXES and not hidden and not secret


def _git(repository: Path) -> list[PurePosixPath] | None:
    """Tracked files and files that git does not ignore; None without a work tree or without git."""
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", str(repository), "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [PurePosixPath(os.fsdecode(name)) for name in set(done.stdout.split(b"\0")) if name]


def _installed(repository: Path) -> list[PurePosixPath] | None:
    """The files that a wheel brought; None if the code was not installed from one. Other packages are beside them."""
    with suppress(metadata.PackageNotFoundError):
        for path in metadata.distribution(DISTRIBUTION).files or ():
            if str(path) == "flip/__init__.py" and Path(path.locate()).resolve() == repository / path:
                return [PurePosixPath(name) for name in metadata.distribution(DISTRIBUTION).files or ()]
    return None


def _walk(repository: Path) -> Iterator[PurePosixPath]:
    """Files and linked folders of the root and of FOLDERS."""
    for folder, folders, names in os.walk(repository):
        root = Path(folder) == repository
        skipped = [name for name in folders if any(fnmatch(name, pattern) for pattern in SKIPPED)]
        folders[:] = [name for name in folders if name not in skipped and (name in FOLDERS or not root)]
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]  # not entered by os.walk
        for name in names + linked:
            yield PurePosixPath((Path(folder) / name).relative_to(repository).as_posix())


def _read(repository: Path, limit: int) -> tuple[dict[str, tuple[bytes, bool]], list[str]]:
    """(path -> (bytes, executable), files left out). They are read once, so that digest and copy agree."""
    contents: dict[str, tuple[bytes, bool]] = {}
    left_out: list[str] = []
    total = 0
    for path in files(repository):
        if not is_code(path, repository):
            if not any(path.is_relative_to(folder) for folder in UNNOTED):
                left_out.append(str(path))
            continue
        file = repository / path
        total += file.stat().st_size
        if total > limit:
            remedy = "Keep data out of the repository, or name it in .gitignore."
            what = f"the code to be copied is larger than {limit / 1e6:.0f} MB"
            raise ConfigError(what, str(repository), str(path), remedy)
        contents[str(path)] = (file.read_bytes(), os.access(file, os.X_OK))
    if not any(name.startswith("flip/") for name in contents):
        raise ConfigError("no code to copy", str(repository))
    return contents, left_out


def current_digest(repository: Path, user_files: Mapping[str, bytes] = NO_USER_FILES) -> str:
    """The digest of the snapshot that ``take`` would make now. Raises ConfigError as it does."""
    return _digest(_read(repository, LIMIT)[0] | _user_contents(user_files))


def _user_contents(user_files: Mapping[str, bytes]) -> dict[str, tuple[bytes, bool]]:
    """As ``_read`` returns the other files."""
    return {
        f"{user_classes.FOLDER}/{name}": (content, content.startswith(b"#!")) for name, content in user_files.items()
    }


def verify(code: Path) -> None:
    """Raise PermissionDenied if the content of a snapshot is not what was submitted, since its name is the digest.

    Raises StorageError if it cannot be read.
    """
    try:
        same = digest_of(code) == code.name
    except ValueError:  # no regular file, or a huge one
        same = False
    except OSError as error:
        remedy = "Submit again when its file system answers."
        raise StorageError(
            f"cannot be read: {error.strerror or error}", error.filename or code, remedy=remedy
        ) from error
    if not same:
        what = "is not executed: its files have changed since they were submitted (its name is not their digest)"
        aside = code.with_name(f"{code.name}.changed")
        remedy = f"To continue with the current code: mv {shlex.quote(str(code))} {shlex.quote(str(aside))}"
        raise PermissionDenied(what, str(code), remedy=remedy)


def digest_of(code: Path) -> str:
    """The digest of the files of a snapshot. Hidden files are temporary files; Python writes __pycache__.

    Raises ValueError for a link, which no snapshot has: it could put a hidden folder on the module path.
    """
    contents = {}
    for path in code.rglob("*"):
        name = path.relative_to(code)
        if path.is_symlink():
            raise ValueError(f"{path} is a link")
        if not _is_cache(name) and not path.is_dir():
            contents[name.as_posix()] = (read_regular(path, LIMIT), bool(path.stat().st_mode & stat.S_IXUSR))
    return _digest(contents)


def _digest(contents: dict[str, tuple[bytes, bool]]) -> str:
    """16 hex digits over names, modes and contents."""
    digest = hashlib.sha256()
    for name in sorted(contents):
        data, executable = contents[name]
        digest.update(f"{len(name.encode())}:{name}:{int(executable)}:{len(data)}:".encode() + data)
    return digest.hexdigest()[:16]


def _make_caches(contents: dict[str, tuple[bytes, bool]], folder: Path) -> None:
    """Create the folders of Python's bytecode: with umask 002 Python would create them writable for the group."""
    for parent in {PurePosixPath(name).parent for name in contents if name.endswith(".py")}:
        closed_folder(folder / parent / "__pycache__")


def _write(file: Path, data: bytes, executable: bool) -> None:
    with create_file(file, 0o555 if executable else 0o444) as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _refuse_additional_files(contents: dict[str, tuple[bytes, bool]], folder: Path) -> None:
    """Raise ConfigError if a snapshot holds a file that was not submitted, such as a sitecustomize.py, or a link.

    Hidden files are temporary files of a submission that was killed; Python writes __pycache__.
    """
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        is_additional = not _is_cache(name) and not path.is_dir() and name.as_posix() not in contents
        if is_additional or path.is_symlink():
            remedy = "Move it away, or submit with another runs root."
            raise ConfigError("a file in the copied code is not of the code", str(path), remedy=remedy)


def _is_cache(name: Path) -> bool:
    """Whether a file of a snapshot is no part of the code: hidden, or bytecode."""
    return any(part.startswith(".") or part == "__pycache__" for part in name.parts)


def _repair(contents: dict[str, tuple[bytes, bool]], folder: Path) -> None:
    """Restore files that a purge has deleted or a lost mount has truncated, one by one: jobs may be reading."""
    for name, (data, executable) in contents.items():
        file = folder / name
        with suppress(OSError):
            if file.read_bytes() == data:
                continue
        temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
        try:
            closed_folder(file.parent)
            _write(temporary, data, executable)
            os.replace(temporary, file)
            fsync_path(file.parent)
        except OSError as error:
            with suppress(OSError):
                deletion.delete_file(temporary, missing_ok=True)
            raise unwritable(error, file) from error
