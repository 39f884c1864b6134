"""Finds, verifies and loads the checkpoints of a run, all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flip.checkpoint.remote import RemoteCheckpoint, refuse_foreign
from flip.checkpoint.safetensors_io import CheckpointFiles, CheckpointIndex, read_headers, read_tensors
from flip.data.storage.retry import DEFAULT_POLICY, RetryPolicy
from flip.distributed.collectives import DAMAGED, broadcast_json, run_on_all, run_on_first
from flip.distributed.parallel import World
from flip.runs import checkpoint_folder
from flip.runs.errors import DataError
from flip.runs.rundir import RunDir

log = logging.getLogger(__name__)


class CheckpointRestorer:
    """Finds and loads the checkpoints of a run. All methods are collective.

    Args:
        attempt: if it holds the run, it sets damaged checkpoints aside; 0: never.
        retry_policy: how long a request to storage at a URL is repeated.
        url: an address in a record of another user is followed only below this one.
    """

    def __init__(
        self, run: RunDir, attempt: int, world: World, retry_policy: RetryPolicy = DEFAULT_POLICY, url: str = ""
    ) -> None:
        self._run = run
        self._attempt = attempt
        self.world = world
        self._url = url
        self._retry_policy = retry_policy
        self._index: tuple[Path, CheckpointIndex] | None = None
        self.parent = ""
        """Folder name of the checkpoint that this attempt resumed from."""

    def newest(self) -> checkpoint_folder.SavedCheckpoint | None:
        """The newest intact checkpoint, agreed by all ranks; None if the run has no checkpoint yet.

        Sets a damaged checkpoint aside with a warning and takes the one before. Raises DataError if all are damaged: a
        run never starts from zero by itself.
        """

        def scan() -> tuple[list[str], bool]:
            paths = [str(c.path) for c in reversed(checkpoint_folder.checkpoints(self._run))]
            return paths, checkpoint_folder.ever_had_checkpoint(self._run)

        paths, ever_had_checkpoint = run_on_first(scan, self.world.checkpoint_group)
        for path in map(Path, paths):
            name = f"{path.parent.name}/{path.name}"
            failure = run_on_all(lambda path=path: self._verify(path), self.world.checkpoint_group)  # type: ignore[misc]
            if failure is None:
                self.parent = name
                return checkpoint_folder.read_checkpoint(path)
            if failure.cause != DAMAGED:
                raise failure.error_class(failure.text)
            log.warning("checkpoint %s is damaged (%s); taking the one before", name, failure.text)
            if self.world.is_rank0 and self._run.is_current_attempt(self._attempt):
                checkpoint_folder.mark_corrupt(path)
        if ever_had_checkpoint:
            remedy = "Restore one from a copy, or move the folder `checkpoints` away to start again from zero."
            raise DataError("all checkpoints are damaged", self._run.checkpoints, remedy=remedy)
        return None

    def open_other(
        self, find: Callable[[], checkpoint_folder.SavedCheckpoint], run: str
    ) -> checkpoint_folder.SavedCheckpoint:
        """The verified checkpoint of another run, which ``find`` returns on every rank, as the parent of this run's.

        Raises the kind of error that ``find`` raised on a rank: DataError if the checkpoint is gone.
        """
        checkpoints = list[checkpoint_folder.SavedCheckpoint]()
        failure = run_on_all(lambda: checkpoints.append(find()), self.world.checkpoint_group)
        if failure is not None:
            raise failure.error_class(f"the run cannot start: {failure.text}", run)
        self.parent = str(checkpoints[0].path)
        return self.open(Path(self.parent))

    def open(self, path: Path) -> checkpoint_folder.SavedCheckpoint:
        """The checkpoint in a folder, verified, for ``load``. Raises DataError if it is damaged."""
        failure = run_on_all(lambda: self._verify(path), self.world.checkpoint_group)
        if failure is not None:
            kind = failure.error_class
            if failure.cause == DAMAGED:
                kind = DataError
            remedy = "It was deleted since, or is damaged: name another one."
            raise kind(f"this checkpoint cannot be read: {failure.text}", path, remedy=remedy)
        return checkpoint_folder.read_checkpoint(path)

    def load(
        self, source: checkpoint_folder.SavedCheckpoint, state: dict[str, torch.Tensor], left_out: tuple[str, ...] = ()
    ) -> None:
        """Fill the tensors of ``state`` in place from a checkpoint that ``newest``, ``open`` or ``open_other``
        returned.

        ``left_out``: starts of the names of parameters that the checkpoint may have besides (``read_tensors``).
        Rank 0 reads the headers of its files for all ranks, once for several loads from the same checkpoint.
        """
        record = source.record
        remote = None
        if "url" in record:
            remote = RemoteCheckpoint(record["url"], self._retry_policy)
        files = CheckpointFiles(source.path, record["files"], remote)
        if self._index is None or self._index[0] != source.path:
            headers: dict[str, Any] = {}
            self._read(lambda: headers.update(read_headers(files)) if self.world.is_rank0 else None, source.path)
            self._index = source.path, CheckpointIndex.of(broadcast_json(headers, self.world.checkpoint_group))
        index = self._index[1]
        self._read(lambda: read_tensors(files, state, index, left_out), source.path)

    def close(self) -> None:
        """Free the index of the checkpoint that was loaded."""
        self._index = None

    def _verify(self, path: Path) -> None:
        """Verify this rank's share of the files of a checkpoint."""
        source = checkpoint_folder.read_checkpoint(path)
        rank = self.world.rank
        size = self.world.size
        if "url" not in source.record:
            checkpoint_folder.verify(source, part=rank, parts=size)
            return
        refuse_foreign(source, self._url)
        files = source.record["files"]
        RemoteCheckpoint(source.record["url"], self._retry_policy).verify(
            {name: files[name] for name in sorted(files)[rank::size]}
        )

    def _read(self, function: Callable[[], object], path: Path) -> None:
        """Call ``function`` on all ranks; a failure of one is raised on all."""
        failure = run_on_all(function, self.world.checkpoint_group)
        if failure is not None:
            raise failure.error_class(f"this checkpoint cannot be read: {failure.text}", path)
