"""Moves runs to the trash, for ``flip rm``, and deletes their checkpoints in object storage.

Only ``flip clean`` deletes what lies in the trash. A checkpoint in object storage cannot be moved there: it is deleted
for good, its commit.json first, and only if this run directory has written it and its owner.json names this run
directory.
No target of a deletion comes from a record: the address of a checkpoint is compared with the computed ones of this run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flip.checkpoint.remote_folder import RemoteFolder
from flip.data.storage.retry import RetryPolicy
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError, FlipError, PermissionDenied, StorageError
from flip.runs.lifecycle import ENDED, UNREADABLE
from flip.runs.rundir import RunDir
from jobs.common.cli import command
from jobs.submission import cleanup
from jobs.submission.apply import lock, move_to_trash
from jobs.submitted_runs import clusters
from jobs.workloads import submitted

_POLICY = RetryPolicy(deadline=60.0)
"""A person waits for the answer."""


@dataclass
class Removal:
    """A run that can be moved to the trash. ``bytes``: in its run directory."""

    run: RunDir
    bytes: int
    url: str = ""
    """``checkpoint.url`` of its configuration."""
    checkpoints: list[checkpoint_folder.SavedCheckpoint] = field(default_factory=list)
    """Its checkpoints in object storage, which are deleted."""
    target: Path | None = None
    """Its place in the trash, after it was moved."""

    @property
    def remote_bytes(self) -> int:
        """Of its checkpoints in object storage."""
        files = [file_record for entry in self.checkpoints for file_record in entry.record["files"].values()]
        return sum(int(file_record["bytes"]) for file_record in files)


def plan(runs: Sequence[RunDir]) -> tuple[list[Removal], dict[Path, str]]:
    """(runs that can be moved to the trash, path of another run -> why it stays). One query for all states."""
    states = clusters.states(runs)
    removals: list[Removal] = []
    spared: dict[Path, str] = {}
    leaving = {run.path for run in runs}
    for run in runs:
        reason = _why_it_stays(run, states[run.path].state, leaving)
        if reason:
            spared[run.path] = reason
            continue
        try:
            removals.append(_removal(run))
        except (FlipError, *UNREADABLE) as error:
            spared[run.path] = str(error)
    return removals, spared


def remove(removals: Sequence[Removal]) -> list[FlipError]:
    """Delete the remote checkpoints of runs and move the runs to the trash; returns the errors.

    Holds the lock of each sweep, so that nothing is submitted meanwhile, and looks at the states again.
    """
    errors: list[FlipError] = []
    for removal in removals:
        try:
            with lock(removal.run.path.parent):
                _, spared = plan([removal.run])
                if spared:
                    raise ConfigError(f"not moved: {spared[removal.run.path]}", str(removal.run.path))
                _delete_checkpoints(removal)
                removal.target = move_to_trash(removal.run.path)
        except FlipError as error:
            errors.append(error)
        except OSError as error:
            errors.append(StorageError(f"not moved: {error.strerror or error}", str(removal.run.path)))
    return errors


def _why_it_stays(run: RunDir, state: str, leaving: set[Path]) -> str:
    if run.path.is_symlink() or run.path.parent.is_symlink():
        return "it, or its sweep, is a symbolic link"
    if state not in ENDED:
        return f"it is {state}: {command('cancel', run.path)}"
    try:
        holders = checkpoint_folder.pin_holders(run) - leaving
    except OSError as error:
        return f"who needs its checkpoints cannot be read: {error}"
    if holders:
        return f"a checkpoint of it is needed by {', '.join(sorted(map(str, holders)))}"
    return ""


def _removal(run: RunDir) -> Removal:
    """Raises OSError if the run contains a folder of another user, and what its records raise."""
    total = cleanup.measure(run.path)[0]
    remote = [entry for entry in checkpoint_folder.checkpoints(run) if entry.record.get("url")]
    if not remote:
        return Removal(run, total)
    return Removal(run, total, submitted.of_run(run).checkpoint_url(), remote)


def _delete_checkpoints(removal: Removal) -> None:
    """Raises PermissionDenied if a checkpoint in object storage is not this run's alone, and what the storage
    raises."""
    if not removal.checkpoints:
        return
    folder = RemoteFolder(removal.run, removal.url, _POLICY)
    for entry in removal.checkpoints:
        reason = folder.discard(entry.path, entry.record["url"], list(entry.record["files"]), _POLICY)
        if reason:
            remedy = f"Delete these files by hand, then that folder: {entry.path}"
            raise PermissionDenied(f"not moved: {reason}", str(removal.run.path), remedy=remedy)
