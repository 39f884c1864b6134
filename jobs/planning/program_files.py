"""The files of a user's program, which a snapshot holds: ``read``. Rules and limit are those of the toolkit's code,
except that files with any suffix are copied."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from flip.runs.errors import ConfigError, read_error

LIMIT = 50_000_000
"""Most bytes: code, not data."""
MOST_FILES = 5_000
SKIPPED = ("venv", "node_modules", "__pycache__", "*.egg-info", "*.pyc")
"""Besides hidden files and folders."""
SECRETS = ("*credential*", "*secret*", "*password*", "*token*.y*ml", "*.pem", "*.key", "*kubeconfig*")
"""Left out although they are no hidden files."""


@dataclass(frozen=True)
class ProgramFiles:
    """A copy of a folder. ``name``: of its folder in a snapshot, by the content. ``files``: path there -> content."""

    name: str
    files: dict[str, bytes]
    left_out: tuple[str, ...]
    """Files that look like secrets, and links that lead out of the folder."""


@lru_cache(maxsize=64)
def read(folder: Path, runs: Path, outputs: tuple[str, ...] = ()) -> ProgramFiles:
    """The files below ``folder``, without those below ``runs``, the folder of all runs.

    Nor those at or below ``outputs``: relative paths to which the program writes, such as checkpoints of an earlier
    start by hand. A link to a copy of them would lead the program into its copied code.

    In a work tree of git, tracked files and those that git does not ignore. Raises ConfigError if they are too many.
    """
    contents: dict[str, bytes] = {}
    left_out = []
    total = 0
    for path in _paths(folder):
        file = folder / path
        is_output = any(Path(path).is_relative_to(output) for output in outputs)
        if is_output or file.is_relative_to(runs) or not file.is_file():
            continue
        is_secret = not path.endswith(".py") and any(fnmatch(file.name.lower(), pattern) for pattern in SECRETS)
        if is_secret or not file.resolve().is_relative_to(folder.resolve()):
            left_out.append(path)
            continue
        total += file.stat().st_size
        if total > LIMIT or len(contents) >= MOST_FILES:
            what = f"code: more than {LIMIT / 1e6:.0f} MB or {MOST_FILES:,} files would be copied"
            remedy = "Name a folder with the program alone, ignore data in .gitignore, or give paths of data to it."
            raise ConfigError(what, str(folder), path, remedy)
        try:
            contents[path] = file.read_bytes()
        except OSError as error:
            raise read_error(error, "cannot be read", file) from error
    digest = hashlib.sha256()
    for path, content in sorted(contents.items()):
        digest.update(f"{len(path.encode())}:{path}:{len(content)}:".encode() + content)
    name = f"program-{digest.hexdigest()[:16]}"
    return ProgramFiles(name, {f"{name}/{path}": content for path, content in contents.items()}, tuple(left_out))


def _paths(folder: Path) -> Iterator[str]:
    """Relative paths of files, sorted, without hidden and skipped ones."""
    listed = _git(folder)
    if listed is None:
        listed = [str(file.relative_to(folder)) for file in _walk(folder)]
    for path in sorted(set(listed)):
        if not any(_is_skipped(part) for part in Path(path).parts):
            yield path


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or any(fnmatch(name, pattern) for pattern in SKIPPED)


def _git(folder: Path) -> list[str] | None:
    command = ["git", "-C", str(folder), "ls-files", "-co", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_skipped(name)]
        for name in names:
            yield Path(place) / name
