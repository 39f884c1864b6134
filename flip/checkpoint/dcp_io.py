"""Writing a rank's shard of a checkpoint, with its checksum, and what may go wrong with it."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

from flip.checkpoint.remote import Remote
from flip.distributed.parallel import copies, copy_number
from flip.runs import commit
from flip.runs.errors import ConfigError, DataError, FlipError, PermissionDenied, StorageError

DAMAGED = "damaged"


class Problem(NamedTuple):
    """What keeps a checkpoint from being written or read, by its cause (``flip.runs.errors``)."""

    cause: str
    text: str

    @property
    def passes(self) -> bool:
        """Whether a second try may do better."""
        return self.cause in ("storage", DAMAGED)

    @classmethod
    def of(cls, error: BaseException) -> Problem:
        if isinstance(error, FlipError):
            return cls(error.cause, str(error).rstrip("."))
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return cls("storage", f"no space left on the device ({error.filename or 'checkpoint folder'})")
        return cls(DAMAGED if isinstance(error, commit.Damaged) else "storage", str(error))


def raised(problem: Problem) -> type[FlipError]:
    """The error that all ranks raise of one rank's problem."""
    kinds = (ConfigError, DataError, PermissionDenied, StorageError)
    return {kind.cause: kind for kind in kinds}.get(problem.cause, StorageError)


def own_part(state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors of which this rank writes a part, so that every part is written once.

    All ranks decide alike, by the order of the names and the full sizes, and need not exchange plans. Rank 0 writes
    what is not sharded: then a rank that loads opens one file beside its own. Several copies write about as much each.
    """
    own, written = {}, Counter[int]()
    for name, tensor in state.items():
        writes = rank == 0
        if hasattr(tensor, "placements"):
            copy = min(range(copies(tensor)), key=written.__getitem__)
            written[copy] += tensor.numel()
            writes = copy == copy_number(tensor)
        if writes:
            own[name] = tensor
    return own


class Writer(dcp.HuggingFaceStorageWriter):
    """Writes this rank's shard into a folder or to a URL, and knows what it wrote: file -> bytes, sha256 (and ETag)."""

    def __init__(self, path: Path, remote: Remote | None = None, rank: int = 0) -> None:
        super().__init__(str(path), save_distributed=True)
        self._shard = rank + 1
        self.files: dict[str, dict[str, Any]] = {}
        self.fs = _Files(self.files, remote)
        self.sync_files = remote is None
        # What DCP copies ahead it waits for on the stream that trains, for each tensor, even where all lie on the host.
        self.per_thread_copy_ahead = 0

    def save(self, part: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Write ``part``, of ``own_part``, as DCP plans it, and return what was written.

        ``dcp.save`` would also send the plans of all ranks to rank 0 and back, as pickles.
        """
        planner = dcp.DefaultSavePlanner()
        planner.set_up_planner(part)
        self.set_up_storage_writer(is_coordinator=False)
        plan = self.prepare_local_plan(planner.create_local_plan())
        plan = dataclasses.replace(plan, storage_data={"shard_index": self._shard})
        self.write_data(planner.finish_plan(plan), planner).wait()
        return self.files


class _Files(FileSystem):
    """Checksums are of the bytes in memory. The save then reads the files back from the storage and compares."""

    def __init__(self, files: dict[str, dict[str, Any]], remote: Remote | None) -> None:
        self._files, self._remote = files, remote

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        facts = self._files.setdefault(Path(path).name, {})
        if self._remote is not None:
            yield _Upload(self._remote, Path(path).name, facts)
            return
        with super().create_stream(path, mode) as stream:
            yield _Stream(stream, facts)


class _Stream:
    """A file that is written in one go, by DCP's safetensors form."""

    def __init__(self, stream: Any, facts: dict[str, Any]) -> None:
        self._stream, self._facts, self._digest, self._bytes = stream, facts, hashlib.sha256(), 0
        self.fileno, self.flush = stream.fileno, stream.flush

    def tell(self) -> int:
        return self._bytes

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._bytes += len(data)
        return int(self._stream.write(data))

    def close(self) -> None:
        self._stream.close()
        self._facts.update(bytes=self._bytes, sha256=self._digest.hexdigest())


class _Upload:
    """The same to a URL. DCP hands over the whole file at once, so nothing is kept here."""

    def __init__(self, remote: Remote, name: str, facts: dict[str, Any]) -> None:
        self._remote, self._name, self._facts = remote, name, facts

    def tell(self) -> int:
        return 0

    def write(self, data: bytes) -> int:
        assert not self._facts, "written in one go"
        self._facts.update(self._remote.put(self._name, data), sha256=hashlib.sha256(data).hexdigest())
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
