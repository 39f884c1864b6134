"""A run that executes a program of the user: its record command.json, and its checkpoints, which are the program's.

command.json decides what ranks execute, so that it has the rule of job.json: only this user or root can have written
it. Words are templates: ``{name}`` is replaced once, on the node, by a parameter of the run or by one of ``PLACES``.

The program writes its checkpoints where it likes. A complete one is recorded as a checkpoint without files,
``checkpoints/command/<S>-<n>/commit.json``, with its ``path`` and its ``content`` (``content_of``). Nothing here
deletes or changes the program's own files. Standard library, Python >= 3.6.
"""

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from flip.files.creation import run_folder
from flip.runs import checkpoint_folder, formats
from flip.runs.checkpoint_folder import COMMIT_FILE, EXTERNAL, SavedCheckpoint
from flip.runs.errors import ConfigError
from flip.runs.rundir import SUBMIT_AGAIN, RunDir, read_record, read_trusted_record, write_json

#: Name of the record.
COMMAND = "command.json"
#: Stage of all checkpoints of a program.
STAGE = "command"
#: Placeholders besides parameters: the run directory, the attempt, the copied code, the newest complete checkpoint.
PLACES = ("run", "attempt", "code", "checkpoint")
#: Working directory of the program, below the run directory: links to the copied code, and what the program writes.
WORK = "work"
#: File of metric lines there, if command.json names no source.
DEFAULT_METRICS = "metrics.jsonl"

#: Bytes at the end of a zip archive that hold the end of its directory, with the longest comment.
ZIP_END = 22 + 0xFFFF
#: The longest head of a safetensors file, bytes.
SAFETENSORS_HEAD = 100_000_000

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_-]*)\}")


def placeholders(text: str) -> List[str]:
    """The names of the placeholders of a template, in order."""
    return _PLACEHOLDER.findall(text)


def filled(template: str, values: Mapping[str, str]) -> str:
    """A template with its placeholders replaced, each once: a value may contain braces. Unknown ones stay."""
    return _PLACEHOLDER.sub(lambda match: values.get(match.group(1), match.group(0)), template)


def text_of(value: Any) -> str:
    """A parameter as a program gets it."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def is_command(run: RunDir) -> bool:
    """Whether a run directory executes a program. Raises OSError if that is unknown."""
    return os.path.lexists(str(run.path / COMMAND))


def has_files(run: RunDir) -> bool:
    """Whether a program has written files below the run directory, besides what this version writes."""
    if not is_command(run):
        return False
    work = run.path / WORK
    return work.is_dir() and any(not entry.is_symlink() for entry in work.iterdir())


def read_command(run: RunDir) -> Dict[str, Any]:
    """command.json for a process that executes it. Raises RefusedPath, ConfigError, ValueError, OSError."""
    path = run.path / COMMAND
    record = read_trusted_record(path, SUBMIT_AGAIN)
    if record is None:
        raise ConfigError("is missing", path, remedy="%s." % SUBMIT_AGAIN)
    formats.require(("argv", "parameters", "code", "world"), record, path, "%s." % SUBMIT_AGAIN)
    return dict(record)


def settings(path: Path) -> Dict[str, Any]:
    """The settings of a run for reports, by the keys that a training has, and ``set.NAME`` for each parameter."""
    record = read_record(path) or {}
    values = {"command": " ".join(record.get("argv", []))}  # type: Dict[str, Any]
    for name, value in record.get("parameters", {}).items():
        if name == "seed" and type(value) is int:
            values["seed"] = value
        else:
            values["set.%s" % name] = value
    for name, value in record.get("resources", {}).items():
        values["resources.%s" % name] = value
    for name, value in record.get("monitor", {}).items():
        values["monitor.%s" % name] = value
    return values


class Content(NamedTuple):
    """What a path held when it was looked at: equal values mean the same content."""

    bytes: int
    digest: str
    """Of names, sizes, times and inodes, not of the bytes: a look reads no checkpoint."""


def content_of(path: Path) -> Optional[Content]:
    """What a file or folder holds; None if it is gone, or changes while it is read."""
    digest = hashlib.sha256()
    total = 0
    try:
        for name, info in _members(path):
            row = "%s\0%d\0%d\0%d\0" % (name, info.st_size, info.st_mtime_ns, info.st_ino)
            digest.update(row.encode("utf-8", "surrogateescape"))
            total += info.st_size
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Content(total, digest.hexdigest()[:32])


def is_whole(path: Path) -> bool:
    """Whether the files of a checkpoint end as their format says; True for files of other formats.

    A writer that stands still looks complete. But a file of ``torch.save``, a zip archive, ends with its directory, and
    the head of a safetensors file says how long it is.
    """
    try:
        return all(_ends_as_it_should(path / name if name else path, info.st_size) for name, info in _members(path))
    except OSError:
        return False


def _ends_as_it_should(path: Path, size: int) -> bool:
    with open(str(path), "rb") as file:
        head = file.read(8)
        if head.startswith(b"PK\x03\x04"):
            file.seek(max(0, size - ZIP_END))
            return b"PK\x05\x06" in file.read()
        length = int.from_bytes(head, "little")
        if not path.name.endswith(".safetensors") or not 2 <= length <= SAFETENSORS_HEAD:
            return True
        try:
            table = json.loads(file.read(length).decode("utf-8"))
            ends = [row["data_offsets"][1] for name, row in table.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False
        return size >= 8 + length + max(ends, default=0)


def _members(path: Path) -> List[Tuple[str, os.stat_result]]:
    """(name, facts) of a file, or of all files below a folder."""
    info = os.stat(str(path))
    if not stat.S_ISDIR(info.st_mode):
        return [("", info)]
    members = []
    for folder, _, names in sorted(os.walk(str(path))):
        for name in sorted(names):
            file = os.path.join(folder, name)
            members.append((os.path.relpath(file, str(path)), os.stat(file)))
    return members


def record_checkpoint(run: RunDir, n: int, samples_seen: int, path: Path, content: Content) -> SavedCheckpoint:
    """Record a complete checkpoint of the program, written during attempt n at S = ``samples_seen``."""
    folder = checkpoint_folder.folder(run, STAGE, samples_seen, n)
    for place in (run.checkpoints, folder.parent, folder):
        run_folder(place)
    record = {
        "kind": EXTERNAL,
        "stage": STAGE,
        "samples": samples_seen,
        "attempt": n,
        "path": str(path),
        "bytes": content.bytes,
        "content": content.digest,
        "files": {},
    }
    write_json(folder / COMMIT_FILE, record)
    return SavedCheckpoint(folder, record)


def refuse(run: RunDir, what: str) -> None:
    """Raise ConfigError if a run executes a program. ``what``: what is done with trainings alone, as a sentence."""
    if is_command(run):
        reason = "this run executes a program, whose checkpoints only that program reads. %s" % what
        remedy = "Load them with the code of the program; flip explain names the newest one."
        raise ConfigError(reason, run.path, remedy=remedy)


def newest_intact(recorded: List[SavedCheckpoint]) -> Optional[SavedCheckpoint]:
    """The newest recorded checkpoint whose path still holds what was recorded; None if there is none."""
    for checkpoint in reversed(recorded):
        content = content_of(Path(checkpoint.record["path"]))
        if content is not None and content.digest == checkpoint.record["content"]:
            return checkpoint
    return None
