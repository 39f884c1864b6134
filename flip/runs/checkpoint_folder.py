"""The protocol of checkpoints (docs/checkpoints.md, Complete checkpoints): a folder without ``commit.json`` does not
exist.

Folders are named ``checkpoints/<stage>/<S>-<n>/`` with the attempt's number n, so an older attempt that still runs
never writes into a newer one's folder. A pin (``pins/``) keeps a checkpoint because another run directory needs it: a
run that starts from it (``init``), or an evaluation in progress. Standard library, Python >= 3.6.
"""

import hashlib
import logging
import os
import re
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Callable, Collection, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

from flip.files import deletion
from flip.files.creation import fsync_path, run_folder
from flip.files.ownership import PathLike
from flip.runs import records
from flip.runs.errors import ConfigError, FlipError
from flip.runs.records import PIN
from flip.runs.rundir import RunDir, exists, list_names, read_record, write_json
from flip.runs.side_jobs import is_side_job

log = logging.getLogger(__name__)

COMMIT_FILE = deletion.COMMIT_FILE
#: ``kind`` in commit.json of a checkpoint whose files are a program's (``flip.runs.command_record``): never deleted.
EXTERNAL = "external"
#: The file of one rank, by its number from 1.
SHARD_FILE = "shard-%05d-model-00001-of-00001.safetensors"
#: A folder of a checkpoint, with the attempt's number.
_FOLDER = re.compile(r"[0-9]+-([0-9]+)\Z")
#: What this process has logged about checkpoints that are left alone.
_logged: Set[str] = set()


class CorruptCheckpoint(Exception):
    """A checkpoint whose commit.json is invalid, or whose files differ from it."""


class SavedCheckpoint:
    """One complete checkpoint: its folder and its commit.json."""

    def __init__(self, path: Path, record: Dict[str, Any]) -> None:
        self.path = path
        self.record = record
        self.stage: str = record["stage"]
        self.samples_seen: int = record["samples"]
        self.attempt: int = record["attempt"]

    def __repr__(self) -> str:
        return "SavedCheckpoint(%s/%s)" % (self.stage, self.path.name)


def folder(run: RunDir, stage: str, samples_seen: int, attempt: int) -> Path:
    """The folder of a checkpoint, whether it exists or not."""
    return run.checkpoints / stage / ("%d-%d" % (samples_seen, attempt))


def sha256(path: PathLike, uncached: bool = False) -> str:
    """SHA-256 of a file, hexadecimal. ``uncached``: read it from storage if possible, not from the page cache."""
    digest = hashlib.sha256()
    with open(str(path), "rb") as file:
        if uncached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # drops only synced pages, as these are
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def complete_checkpoint(path: Path, record: Dict[str, Any], known: Optional[Dict[str, Any]] = None) -> SavedCheckpoint:
    """Complete the checkpoint in ``path``: sync its files, list them with sizes and checksums, write commit.json last.

    ``record``: stage, samples, attempt and other state of the trainer except tensors. ``known``: file -> bytes and
    sha256 from its writer; such a file is not read here, and may be stored elsewhere (``url`` of the record).
    """
    files = dict(known or {})
    for file in sorted(p for p in path.iterdir() if p.is_file() and p.name != COMMIT_FILE):
        fsync_path(file)
        if file.name not in files:
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    for above in (path, path.parent, path.parent.parent):  # the entries of the folders are new too
        fsync_path(above)
    record = dict(record, files=files)
    write_json(path / COMMIT_FILE, record)
    return SavedCheckpoint(path, record)


def read_checkpoint(path: Path) -> SavedCheckpoint:
    """The checkpoint in a folder. Raises CorruptCheckpoint if it has no valid commit.json."""
    try:
        record = read_record(path / COMMIT_FILE)
        if record is None:
            raise CorruptCheckpoint("%s has no %s" % (path, COMMIT_FILE))
        validate_record(record)
        _check_folder(path, record)
        return SavedCheckpoint(path, record)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint("%s: %s" % (path / COMMIT_FILE, error))


def validate_record(record: Any) -> None:
    """Raise ValueError, KeyError or TypeError unless this is a valid record of a checkpoint.

    Files must be inside its folder: a copy of the checkpoint writes to their names.
    """
    if not records.NAME.fits(record["stage"]):  # results are written to a folder of this name
        raise ValueError("`stage` is not a name")
    for key in ("samples", "attempt"):
        if type(record[key]) is not int or record[key] < 0:
            raise ValueError("`%s` is not a whole number" % key)
    if not isinstance(record.get("url", ""), str):
        raise ValueError("`url` is not text")
    if not isinstance(record["files"], dict):
        raise ValueError("`files` is not a mapping")
    for name, file_record in record["files"].items():
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError("`files` names %r, which is not a file of this folder" % name)
        if type(file_record["bytes"]) is not int or not isinstance(file_record["sha256"], str):
            raise ValueError("`files` lacks the bytes or sha256 of %r" % name)


def _check_folder(path: Path, record: Dict[str, Any]) -> None:
    """Raise ValueError unless the record belongs to its folder, ``<stage>/<samples>-<attempt>``."""
    if record["stage"] != path.parent.name:
        raise ValueError("`stage` is not the name of its folder, %r (found: %r)" % (path.parent.name, record["stage"]))
    name = "%d-%d" % (record["samples"], record["attempt"])
    if name != path.name:
        raise ValueError("`samples` and `attempt` give %r, but its folder is %r" % (name, path.name))


def no_checkpoint(run: RunDir) -> ConfigError:
    """The error for a run without checkpoints: it has not saved yet, or its checkpoints were deleted."""
    if exists(run.result):
        remedy = "They were deleted or moved: restore them from a copy, or train the run again."
        return ConfigError("the run is complete, but its checkpoints are not here", str(run.checkpoints), remedy=remedy)
    if run.newest_attempt():
        remedy = "Submit it again, unless it is running; flip status shows its state."
        return ConfigError("this run has no checkpoint yet", str(run.checkpoints), remedy=remedy)
    what = "this run has no checkpoint yet: it has not started"
    return ConfigError(what, str(run.checkpoints), remedy="Submit its sweep: flip submit SWEEP.")


def checkpoints(run: RunDir, folders: str = "*") -> List[SavedCheckpoint]:
    """All complete checkpoints of a run, newest last. Those with an invalid commit.json are left out.

    They are sorted by S, which increases across stages, and at the same S by attempt. ``folders``: a pattern of
    ``<S>-<n>``; only the commit.json of matching folders are read.
    """
    result = []
    for path in _folders(run):
        if fnmatchcase(path.name, folders):
            try:
                result.append(read_checkpoint(path))
            except (CorruptCheckpoint, NotADirectoryError):  # never complete, or damaged: apply_retention deletes it
                continue
    return sorted(result, key=lambda c: (c.samples_seen, c.attempt))


def _folders(run: RunDir) -> Iterator[Path]:
    """Folders of checkpoints, complete or not. Raises OSError if one cannot be listed, instead of leaving it out."""
    for stage in list_names(run.checkpoints):
        for name in list_names(run.checkpoints / stage):
            yield run.checkpoints / stage / name


def verify(checkpoint: SavedCheckpoint, part: int = 0, parts: int = 1, uncached: bool = False) -> None:
    """Raise CorruptCheckpoint unless the files have the sizes and checksums in commit.json.

    ``part``, ``parts``: check only every ``parts``-th file from number ``part`` on, as one of several readers.
    ``uncached``: as in ``sha256``, for files that this host has just written.
    """
    for name in sorted(checkpoint.record["files"])[part::parts]:
        expected = checkpoint.record["files"][name]
        file = checkpoint.path / name
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise CorruptCheckpoint("%s is missing" % file)
        if size != expected["bytes"]:
            raise CorruptCheckpoint("%s has %d bytes, but %d were saved" % (file, size, expected["bytes"]))
        if sha256(file, uncached) != expected["sha256"]:
            raise CorruptCheckpoint("%s does not have the saved checksum" % file)


def mark_corrupt(path: Path) -> None:
    """Rename commit.json to damaged.json. The checkpoint no longer exists; retention deletes its files later."""
    os.replace(str(path / COMMIT_FILE), str(path / deletion.DAMAGED_FILE))
    fsync_path(path)


def make_incomplete(path: Path) -> str:
    """Delete commit.json alone; ``remove`` deletes the rest. Returns "" if it is deleted, else why it is left alone."""
    return deletion.delete_commit_file(path)


def remove(path: Path, files: Optional[Collection[str]] = None) -> str:
    """Delete a checkpoint or the rest of one: commit.json first, so that it never exists in part.

    ``files``: the names in its record; None: its record is read, if it has one. Returns "" if it is deleted, else why
    something is left alone: a link, or files that belong to no checkpoint.
    """
    if files is None:
        files = listed_files(path)
    return deletion.delete_checkpoint(path, files)


def listed_files(path: Path) -> Optional[Collection[str]]:
    """The names of the files that a checkpoint lists; None if the folder has no valid commit.json."""
    try:
        return list(read_checkpoint(path).record["files"])
    except (CorruptCheckpoint, NotADirectoryError):
        return None


def ever_had_checkpoint(run: RunDir) -> bool:
    """Whether the run ever had a checkpoint, valid or damaged: such a run never restarts from zero by itself."""
    return any({COMMIT_FILE, deletion.DAMAGED_FILE} & set(list_names(path)) for path in _folders(run))


def apply_retention(
    run: RunDir, attempt: int, keep: int, named: Iterable[Path] = (), delete: Callable[[Path], str] = remove,
    keep_at: Sequence[int] = (),
) -> List[Path]:  # fmt: skip
    """Delete the checkpoints that no rule keeps, and incomplete ones of this and older attempts.

    The rules keep the newest ``keep``, the last of every stage, pinned ones, those at an S in ``keep_at``, and the
    folders ``named``. Does nothing unless ``attempt`` is the current one.

    ``delete``: deletes a checkpoint, commit.json first; returns "" or why it leaves it alone, which is logged once.
    Returns the deleted folders. An error of one deletion is raised after the others.
    """
    if not run.is_current_attempt(attempt):
        return []
    present = checkpoints(run)
    pins = pinned(run)
    last_of_stage = {c.stage: c.path for c in present}
    needed = set(named) | set(last_of_stage.values())
    needed |= {c.path for c in present[-keep:]}
    needed |= {c.path for c in present if c.record.get("kind") == EXTERNAL}
    needed |= {c.path for c in present if (c.stage, c.samples_seen) in pins or c.samples_seen in keep_at}
    deleted = []
    failed: Optional[Exception] = None
    for path in _folders(run):
        match = _FOLDER.match(path.name)
        if path in needed or match is None or int(match.group(1)) > attempt or not path.is_dir():
            continue
        try:
            reason = delete(path)
        except (OSError, FlipError) as error:
            failed = failed or error
            continue
        if reason:
            _log_once("%s is left alone: %s" % (path, reason))
        else:
            deleted.append(path)
    if failed:
        raise failed
    return deleted


def _log_once(text: str) -> None:
    if text not in _logged:
        _logged.add(text)
        log.warning("%s", text)


def summary(checkpoint: SavedCheckpoint) -> Dict[str, Any]:
    """The checkpoint in a result: {path, stage, samples, digest}.

    ``digest``: SHA-256 of commit.json, which lists the checksum of every file.
    """
    return {
        "path": "%s/%s" % (checkpoint.path.parent.name, checkpoint.path.name),
        "stage": checkpoint.stage,
        "samples": checkpoint.samples_seen,
        "digest": sha256(checkpoint.path / COMMIT_FILE),
    }


def summary_at(run: RunDir, samples_seen: int) -> Optional[Dict[str, Any]]:
    """``summary`` of the newest checkpoint at S = ``samples_seen``, or None."""
    at_samples = [c for c in checkpoints(run, "%d-*" % samples_seen) if c.samples_seen == samples_seen]
    if at_samples:
        return summary(at_samples[-1])
    return None


def pin(run: RunDir, by: RunDir, stage: str, samples_seen: int) -> None:
    """Keep the checkpoint of ``stage`` at S = ``samples_seen`` until the run or evaluation job ``by`` is over.

    ``by`` must exist: pins by runs that no longer exist are deleted. Raises OSError if the pin cannot be written.
    """
    run_folder(run.pins)
    for path, record in _pins(run):
        if not os.path.isdir(record["by"]):  # checked at submission: a node might not see that folder
            deletion.delete_file(path, missing_ok=True)  # another command may delete it too
    name = hashlib.sha256(("%s %s %d" % (by.path, stage, samples_seen)).encode()).hexdigest()[:16]
    record = {"by": str(by.path), "stage": stage, "samples": samples_seen, "time": time.time()}
    write_json(run.pins / ("%s.json" % name), record)


def pinned(run: RunDir) -> Set[Tuple[str, int]]:
    """(stage, S) of the pinned checkpoints. Raises OSError if a pin cannot be read: then nothing may be deleted."""
    return {(record["stage"], record["samples"]) for _, record in _pins(run) if not _is_over(record)}


def pin_holders(run: RunDir) -> Set[Path]:
    """The run directories that pin a checkpoint of this run. Raises as ``pinned`` does."""
    return {
        RunDir(record["by"]).path for _, record in _pins(run) if os.path.isdir(record["by"]) and not _is_over(record)
    }


def _is_over(record: Dict[str, Any]) -> bool:
    """Whether the holder of a pin no longer needs the checkpoint: it is complete, or it is a side job that failed or
    was cancelled. Such a job never continues, but a failed or cancelled run may."""
    holder = RunDir(record["by"])
    if holder.is_complete():
        return True
    if not is_side_job(holder):
        return False
    try:
        end = read_record(holder.attempt(holder.newest_attempt()) / "end.json") or {}
    except ValueError:  # damaged: the job may still continue
        end = {}
    return holder.cancel.exists() or end.get("action") == "stop"


def _pins(run: RunDir) -> Iterator[Tuple[Path, Dict[str, Any]]]:
    for path in (run.pins / name for name in list_names(run.pins) if name.endswith(".json")):
        try:
            record = read_record(path, PIN)
        except ValueError as error:
            raise OSError("%s, so this is not a valid pin" % error)
        if record is not None:  # else deleted in the meantime
            yield path, record
