"""Reading the commits of a run, all ranks together: the newest that is whole, or one that is named, and its tensors."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._hf_utils import _HFStorageInfo
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from flip import commit
from flip.config.schema import Init
from flip.data.retry import Patience
from flip.exitcodes import DataError, FlipError
from flip.origin import open_commit
from flip.parallel import World
from flip.remote import Remote
from flip.rundir import RunDir
from flip.writer import DAMAGED, Problem, raised

log = logging.getLogger(__name__)


class Restorer:
    """Picks and loads the commits of a run. All methods are collective: call them on all ranks.

    A try with storage at a URL is repeated with ``patience``. Only ``attempt``, where it holds the run, sets aside one
    that is damaged.
    """

    def __init__(self, run: RunDir, attempt: int, world: World, patience: Patience | None = None) -> None:
        self._run, self._attempt, self._world = run, attempt, world
        self._patience = patience or Patience()
        self._copy: Path | None = None
        self._headers: tuple[Path, Headers] | None = None
        self.parent = ""
        """Folder name of the commit that this attempt went on from."""

    def newest(self) -> commit.Commit | None:
        """The newest commit whose files are what it says, agreed by all ranks; None where the run has none yet.

        A damaged one is set aside with a warning, and the one before is taken. Raises DataError where all are damaged:
        a run never starts from zero by itself.
        """
        choices: list[Any] = [None, None]
        if self._world.first:
            choices = [[str(c.path) for c in reversed(commit.commits(self._run))], commit.traces(self._run)]
        distributed.broadcast_object_list(choices, src=0, group=self._world.storage)
        copy = self._scratch()
        for path in map(Path, choices[0]):
            damaged = self._together(lambda path=path: self._fetch(path, copy))  # type: ignore[misc]
            if damaged is None:
                self.parent = f"{path.parent.name}/{path.name}"
                return commit.read(path)
            self._release()
            if damaged.cause != DAMAGED:
                raise raised(damaged)(damaged.text)
            log.warning(
                "checkpoint %s is damaged (%s); taking the one before", f"{path.parent.name}/{path.name}", damaged.text
            )
            if self._world.first and self._run.holds(self._attempt):
                commit.set_aside(path)
        if choices[1]:
            raise DataError(
                "all checkpoints are damaged",
                self._run.checkpoints,
                remedy="Restore one from a copy, or move the folder `checkpoints` away to begin again from zero.",
            )
        return None

    def origin(self, init: Init) -> commit.Commit:
        """The commit of another run that ``init`` names, verified. DataError where it is not what was submitted."""
        problem = self._together(lambda: open_commit(init))
        if problem is not None:
            raise DataError(f"the run cannot begin: {problem.text}", init.run)
        self.parent = str(open_commit(init).path)
        return self.open(Path(self.parent))

    def open(self, path: Path) -> commit.Commit:
        """The commit in a folder, verified and at hand for ``load``. Raises DataError where it is damaged."""
        copy = self._scratch()
        problem = self._together(lambda: self._fetch(path, copy))
        if problem is not None:
            self._release()
            kind = DataError if problem.cause == DAMAGED else raised(problem)
            remedy = "It was deleted since, or is damaged: name another one."
            raise kind(f"this checkpoint cannot be read: {problem.text}", path, remedy=remedy)
        return commit.read(path)

    def load(self, source: commit.Commit, state: dict[str, torch.Tensor]) -> None:
        """Fill the tensors of ``state`` in place; each must be in the checkpoint, which ``newest`` or
        ``open`` has given."""
        folder = self._copy or source.path
        reader = Reader(folder, state, partial(self._known, source.path, folder))
        dcp.load(state, storage_reader=reader, process_group=self._world.storage)

    def close(self) -> None:
        self._release()

    def _scratch(self) -> Path:
        """Where this node's ranks share a copy of a checkpoint."""
        copies = self._gather(str(scratch(self._run, self._world.rank)))
        return Path(copies[self._world.rank - self._world.local_rank])

    def _fetch(self, path: Path, copy: Path) -> None:
        """Verify this rank's part of a commit; of one at a URL, copy all of it to this node, once for its ranks."""
        found = commit.read(path)
        if "url" not in found.record:
            commit.verify(found, part=self._world.rank, parts=self._world.size)
            return
        self._copy = copy
        if self._world.local_rank == 0:
            shutil.rmtree(copy, ignore_errors=True)  # of an attempt that was killed
            copy.mkdir(mode=0o700)
            Remote(found.record["url"], self._patience).fetch(found.record["files"], copy)

    def _known(self, path: Path, folder: Path) -> Headers:
        """The headers of a commit, whose files lie in ``folder``: rank 0 reads them, once for weights and moments.

        Collective. What goes wrong there is raised on all ranks.
        """
        if self._headers is None or self._headers[0] != path:
            told: list[Any] = [None, ""]
            if self._world.first:
                try:
                    told[0] = Headers.of(folder)
                except Exception as error:  # whatever it is: the other ranks wait, and end of the same
                    told[1] = str(error)
            distributed.broadcast_object_list(told, src=0, group=self._world.storage)
            if told[0] is None:
                raise RuntimeError(told[1])
            self._headers = path, told[0]
        return self._headers[1]

    def _release(self) -> None:
        """Delete the copy of a checkpoint from a URL. All ranks must be through with it."""
        self._headers = None
        if self._copy is not None and self._world.local_rank == 0:
            shutil.rmtree(self._copy, ignore_errors=True)
        self._copy = None

    def _together(self, work: Callable[[], object]) -> Problem | None:
        """Do it on all ranks; of their problems the first rank's that has one. Collective."""
        problem = None
        try:
            work()
        except (OSError, CheckpointException, FlipError, commit.Damaged) as error:
            problem = Problem.of(error)
        return next((p for p in self._gather(problem) if p is not None), None)

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self._world.size
        distributed.all_gather_object(values, value, group=self._world.storage)
        return values


class Headers(NamedTuple):
    """What the files of a checkpoint hold, small enough for all ranks: DCP's objects are tens of times as large."""

    files: list[str]
    tensors: dict[str, tuple[torch.dtype, torch.Size, Any]]
    """Name -> dtype, size, and an array with a row for each part: its offsets, its lengths, and which file."""

    @classmethod
    def of(cls, folder: Path) -> Headers:
        """Opens every file."""
        found = dcp.HuggingFaceStorageReader(str(folder)).read_metadata()
        files: dict[str, int] = {}
        parts: dict[str, list[list[int]]] = {}
        for index, info in found.storage_data.items():
            file = files.setdefault(os.path.basename(info.relative_path), len(files))
            parts.setdefault(index.fqn, []).append([*index.offset, *info.shape, file])
        tensors = {
            name: (tensor.properties.dtype, tensor.size, np.array(parts[name]))
            for name, tensor in found.state_dict_metadata.items()
            if isinstance(tensor, TensorStorageMetadata)
        }
        return cls(list(files), tensors)


class Reader(dcp.HuggingFaceStorageReader):
    """Fills ``state`` from a folder whose ``headers`` are known, or asked for by all ranks together.

    By itself DCP has each rank open every file for them at each load. Here a rank knows the parts that are its own.
    """

    def __init__(self, folder: Path, state: dict[str, torch.Tensor], headers: Callable[[], Headers]) -> None:
        super().__init__(str(folder))
        self._state, self._headers = state, headers

    def read_metadata(self) -> Metadata:
        files, tensors = self._headers()
        found = Metadata({}, storage_data={})
        for name in self._state.keys() & tensors.keys():
            dtype, size, parts = tensors[name]
            chunks = []
            for *at, file in parts[_needed(parts, self._state[name])].tolist():
                offsets, lengths = torch.Size(at[: len(size)]), torch.Size(at[len(size) :])
                chunks.append(ChunkStorageMetadata(offsets, lengths))
                info = _HFStorageInfo(os.path.join(self.path, files[file]), lengths, dtype)
                found.storage_data[MetadataIndex(name, offsets)] = info
            found.state_dict_metadata[name] = TensorStorageMetadata(TensorProperties(dtype), size, chunks)
        return found


def _needed(parts: Any, tensor: torch.Tensor) -> Any:
    """Which parts this rank's shard of a tensor overlaps: a bool for each row; all of a tensor that is not sharded."""
    if not hasattr(tensor, "__create_chunk_list__"):
        return np.ones(len(parts), dtype=bool)
    begin, length = parts[:, : tensor.ndim], parts[:, tensor.ndim : 2 * tensor.ndim]
    needed = np.zeros(len(parts), dtype=bool)
    for one in tensor.__create_chunk_list__():
        first, end = np.array(one.offsets), np.add(one.offsets, one.sizes)
        needed |= ((begin < end) & (begin + length > first)).all(axis=1)
    return needed


def scratch(run: RunDir, rank: int) -> Path:
    """Where a node's first rank copies a checkpoint to, in the temporary folder."""
    token = hashlib.sha256(str(run.path).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"flip-{os.getuid()}-{token}-{rank}"
