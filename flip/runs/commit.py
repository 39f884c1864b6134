"""The commit protocol of checkpoints (docs/contracts.md, Commits): a folder without ``commit.json`` does not exist.

Standard library, Python >= 3.6. Names carry the attempt's number, so a straggler of an older attempt can never write
into a newer one's folder: ``checkpoints/<stage>/<S>-<n>/``.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Set, Tuple

from flip.runs.errors import FlipError
from flip.runs.ownership import PathLike
from flip.runs.records import PIN
from flip.runs.rundir import RunDir, parse_int, read_record, sync_folder, write_json

COMMIT_FILE = "commit.json"


class CorruptCheckpoint(Exception):
    """A committed checkpoint whose files are not what its commit.json says."""


class Commit:
    """One committed checkpoint: its folder and what commit.json says of it."""

    def __init__(self, path: Path, record: Dict[str, Any]) -> None:
        self.path, self.record = path, record
        self.stage: str = record["stage"]
        self.samples: int = record["samples"]
        self.attempt: int = record["attempt"]

    @property
    def order(self) -> tuple:
        """Newest last: S runs on across stages, and of two at one S the later attempt's counts."""
        return (self.samples, self.attempt)

    def __repr__(self) -> str:
        return "Commit(%s/%s)" % (self.stage, self.path.name)


def folder(run: RunDir, stage: str, samples: int, attempt: int) -> Path:
    return run.checkpoints / stage / ("%d-%d" % (samples, attempt))


def sha256(path: PathLike, uncached: bool = False) -> str:
    """SHA-256 of a file. ``uncached``: read it from the storage, not from this host's page cache, where Linux can."""
    digest = hashlib.sha256()
    with open(str(path), "rb") as file:
        if uncached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # synced pages only, which ours are
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def commit(path: Path, record: Dict[str, Any], known: Optional[Dict[str, Any]] = None) -> Commit:
    """Make ``path`` a checkpoint: sync its files, list them with sizes and checksums, write commit.json last.

    ``record`` holds stage, samples, attempt and whatever the trainer needs beside tensors. ``known``: file -> bytes and
    sha256 as its writer knows them; such a file is not read here, and may lie elsewhere (``url`` of the record).
    """
    files = dict(known or {})
    for file in sorted(p for p in path.iterdir() if p.is_file() and p.name != COMMIT_FILE):
        handle = os.open(str(file), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if file.name not in files:
            files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    for above in (path, path.parent, path.parent.parent):  # the folders' own entries are new as well
        sync_folder(above)
    record = dict(record, files=files)
    write_json(path / COMMIT_FILE, record)
    return Commit(path, record)


def read_commit(path: Path) -> Commit:
    """The checkpoint in a folder. Raises Damaged where there is none, or none that can be understood."""
    try:
        record = read_record(path / COMMIT_FILE)
        if record is None:
            raise CorruptCheckpoint("%s has no %s" % (path, COMMIT_FILE))
        validate_record(record)
        return Commit(path, record)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint("%s: %s" % (path / COMMIT_FILE, error))


def validate_record(record: Any) -> None:
    """Raise ValueError, KeyError or TypeError unless this can be a commit's record.

    Files lie in its folder: where a record names others, a copy of a checkpoint would write there.
    """
    if not isinstance(record["stage"], str):
        raise ValueError("`stage` is no name")
    for key in ("samples", "attempt"):
        if type(record[key]) is not int or record[key] < 0:
            raise ValueError("`%s` is no whole number" % key)
    if not isinstance(record.get("url", ""), str):
        raise ValueError("`url` is no address")
    if not isinstance(record["files"], dict):
        raise ValueError("`files` is not a mapping")
    for name, facts in record["files"].items():
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ValueError("`files` names %r, which is no file of this folder" % name)
        if type(facts["bytes"]) is not int or not isinstance(facts["sha256"], str):
            raise ValueError("`files` does not say what %r is" % name)


def commits(run: RunDir, folders: str = "*") -> List[Commit]:
    """All committed checkpoints of a run, newest last. One whose commit.json cannot be understood is none.

    ``folders``: a pattern of ``<S>-<n>``; commit.json of others is not read.
    """
    found = []
    for mark in run.checkpoints.glob("*/%s/%s" % (folders, COMMIT_FILE)):
        try:
            found.append(read_commit(mark.parent))
        except CorruptCheckpoint:  # to be deleted by retain as anything uncommitted is
            continue
    return sorted(found, key=lambda c: c.order)


def verify(checkpoint: Commit, part: int = 0, parts: int = 1, uncached: bool = False) -> None:
    """Raise Damaged unless the files are those of commit.json; of several readers each may check its part of them.

    ``uncached``: as ``sha256`` has it, for files that this host has just written.
    """
    for name in sorted(checkpoint.record["files"])[part::parts]:
        expected, file = checkpoint.record["files"][name], checkpoint.path / name
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise CorruptCheckpoint("%s is missing" % file)
        if size != expected["bytes"]:
            raise CorruptCheckpoint("%s has %d bytes, committed were %d" % (file, size, expected["bytes"]))
        if sha256(file, uncached) != expected["sha256"]:
            raise CorruptCheckpoint("%s does not have the checksum that was committed" % file)


def mark_corrupt(path: Path) -> None:
    """Take the mark from a damaged checkpoint: it is none any more, its files stay until retain clears them away."""
    os.replace(str(path / COMMIT_FILE), str(path / "damaged.json"))
    sync_folder(path)


def uncommit(path: Path) -> None:
    """Delete the mark alone: what is left is to be deleted by ``remove``."""
    if (path / COMMIT_FILE).exists():
        (path / COMMIT_FILE).unlink()
        sync_folder(path)


def remove(path: Path) -> None:
    """Delete a checkpoint or what is left of one: commit.json first, so that it never exists in part."""
    uncommit(path)
    if path.is_dir():
        for file in list(path.iterdir()):
            file.unlink()
        path.rmdir()


def ever_committed(run: RunDir) -> bool:
    """Whether there was ever a commit here, good or damaged: such a run never begins again from zero by itself."""
    return any(any(run.checkpoints.glob("*/*/" + name)) for name in (COMMIT_FILE, "damaged.json"))


def apply_retention(
    run: RunDir, attempt: int, keep: int, named: Iterable[Path] = (), delete: Callable[[Path], None] = remove
) -> List[Path]:
    """Delete what is not needed and return it: all but the newest ``keep``, the last of every stage, the ``named``,
    and what is pinned (``flip.runs.commit``).

    ``delete``: deletes one, mark first. Does nothing unless ``attempt`` holds the run. Uncommitted folders of this and
    older attempts go as well. Raises OSError or what ``delete`` does, when all else is deleted.
    """
    if not run.is_current_attempt(attempt):
        return []
    present = commits(run)
    kept = {c.path for c in present[-keep:]} | {c.path for c in {c.stage: c for c in present}.values()} | set(named)
    needed = pinned(run)
    kept |= {c.path for c in present if (c.stage, c.samples) in needed}
    gone = []
    failed: Optional[Exception] = None
    for path in sorted(run.checkpoints.glob("*/*-*")):
        n = parse_int(path.name.rpartition("-")[2])
        if path in kept or not path.is_dir() or n is None or n > attempt:
            continue
        try:
            delete(path)
            gone.append(path)
        except (OSError, FlipError) as error:  # of one alone: no other stays for it
            failed = failed or error
    if failed:
        raise failed
    return gone


def summary(checkpoint: Commit) -> Dict[str, Any]:
    """What a result says of the checkpoint that it is of. ``digest``: of commit.json, which lists every file's."""
    return {
        "path": "%s/%s" % (checkpoint.path.parent.name, checkpoint.path.name),
        "stage": checkpoint.stage,
        "samples": checkpoint.samples,
        "digest": sha256(checkpoint.path / COMMIT_FILE),
    }


def summary_at(run: RunDir, samples: int) -> Optional[Dict[str, Any]]:
    """``brief`` of the newest checkpoint at S = ``samples``, None where there is none."""
    found = [c for c in commits(run, "%d-*" % samples) if c.samples == samples]
    return summary(found[-1]) if found else None


def pin(run: RunDir, by: RunDir, stage: str, samples: int) -> None:
    """See to it that retention spares the commit of ``stage`` at S = ``samples`` until the run ``by`` is complete.

    ``by`` must be there: pins of those that are gone are cleared away. Raises OSError where it cannot be written.
    """
    run.pins.mkdir(exist_ok=True)
    for path, record in _pins(run):
        if not os.path.isdir(record["by"]):  # told here, where runs are submitted: a node might not see that folder
            try:
                path.unlink()
            except FileNotFoundError:  # somebody else clears away too
                continue
    name = hashlib.sha256(("%s %s %d" % (by.path, stage, samples)).encode()).hexdigest()[:16]
    record = {"by": str(by.path), "stage": stage, "samples": samples, "time": time.time()}
    write_json(run.pins / ("%s.json" % name), record)


def pinned(run: RunDir) -> Set[Tuple[str, int]]:
    """(stage, S) of the commits that must stay. Raises OSError where a pin cannot be read: then nothing may go."""
    return {(record["stage"], record["samples"]) for _, record in _pins(run) if not _over(record)}


def pin_holders(run: RunDir) -> Set[Path]:
    """The run directories for which a commit of this run is kept. Raises as ``pinned`` does."""
    return {RunDir(record["by"]).path for _, record in _pins(run) if os.path.isdir(record["by"]) and not _over(record)}


def _over(record: Dict[str, Any]) -> bool:
    return RunDir(record["by"]).result.exists()


def _pins(run: RunDir) -> Iterator[Tuple[Path, Dict[str, Any]]]:
    for path in sorted(run.pins.glob("*.json")):
        try:
            record = read_record(path, PIN)
        except ValueError as error:
            raise OSError("%s, so this is no pin" % error)
        if record is None:  # removed meanwhile
            continue
        yield path, {name: record[name] for name in ("by", "stage", "samples")}
