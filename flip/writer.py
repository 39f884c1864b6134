"""Writing a rank's shard of a checkpoint, with its checksum, and what may go wrong with it."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from flip import commit
from flip.exitcodes import ConfigError, DataError, FlipError, PermissionDenied, StorageError
from flip.remote import Remote

DAMAGED = "damaged"


class Problem(NamedTuple):
    """What keeps a checkpoint from being written or read, by its cause (``flip.exitcodes``)."""

    cause: str
    text: str

    @property
    def passes(self) -> bool:
        """Whether a second try may do better."""
        return self.cause in ("storage", DAMAGED)

    @classmethod
    def of(cls, error: BaseException) -> Problem:
        """What really happened: DCP wraps the errors of its ranks."""
        if isinstance(error, CheckpointException):
            for failure, _trace in error.failures.values():
                return cls.of(failure)
        if isinstance(error, FlipError):
            return cls(error.cause, str(error).rstrip("."))
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return cls("storage", f"no space left on the device ({error.filename or 'checkpoint folder'})")
        return cls(DAMAGED if isinstance(error, commit.Damaged) else "storage", str(error))


def raised(problem: Problem) -> type[FlipError]:
    """The error that all ranks raise of one rank's problem."""
    kinds = (ConfigError, DataError, PermissionDenied, StorageError)
    return {kind.cause: kind for kind in kinds}.get(problem.cause, StorageError)


class Writer(dcp.HuggingFaceStorageWriter):
    """Writes this rank's shard into a folder or to a URL, and knows what it wrote: file -> bytes, sha256 (and ETag)."""

    def __init__(self, path: Path, remote: Remote | None = None) -> None:
        super().__init__(str(path), save_distributed=True)
        self.files: dict[str, dict[str, Any]] = {}
        self.fs = _Files(self.files, remote)
        self.sync_files = remote is None
        # What DCP copies ahead it waits for on the stream that trains, for each tensor, even where all lie on the host.
        self.per_thread_copy_ahead = 0


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
