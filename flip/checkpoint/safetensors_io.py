"""Reads and writes the files of checkpoints: safetensors with the shard offsets of torch.distributed.checkpoint (DCP).

DCP's ``HuggingFaceStorageReader`` can read these files. DCP is not used itself: its ranks exchange plans as pickles,
each of them opens every file at each load, and a missing shard goes unnoticed.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from flip.checkpoint.export_record import HEADER_LIMIT
from flip.checkpoint.remote import PARALLEL_FILES, RemoteCheckpoint
from flip.checkpoint.safetensors_header import OFFSETS, parse_header
from flip.distributed.parallel import local, local_offsets
from flip.files.creation import OUTPUT_MODE, atomic_path, atomic_write
from flip.runs.checkpoint_folder import SHARD_FILE, CorruptCheckpoint
from flip.runs.errors import DataError

HEADER_BYTES = 1 << 18
"""Bytes of a file that are read first for its header."""
GAP_BYTES = 1 << 20
REQUEST_BYTES = 1 << 26
"""Regions of a file at most ``GAP_BYTES`` apart are read by one request of at most ``REQUEST_BYTES``."""
WEIGHTS = "model."
"""Start of the names of a model's parameters."""
_DTYPES = {
    "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I8": torch.int8, "U8": torch.uint8,
    "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BF16": torch.bfloat16,
}  # fmt: skip
ITEM_BYTES = {name: dtype.itemsize for name, dtype in _DTYPES.items()}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, mode: int = OUTPUT_MODE) -> None:
    """Write ``tensors`` to ``path`` atomically, with the permissions that a new file of ``mode`` has in that folder.

    Raises SafetensorError, OSError.
    """
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    with atomic_path(path, mode) as temporary:
        save_file(contiguous, temporary, metadata={"format": "pt"})


def write_shard(
    folder: Path, data: memoryview, rank: int, remote: RemoteCheckpoint | None = None
) -> dict[str, dict[str, Any]]:
    """Write this rank's file and return file -> bytes, sha256 of the bytes in memory (and ETag). ``data``: empty if the
    rank has no file."""
    if not data:
        return {}
    name = SHARD_FILE % (rank + 1)
    if remote is None:
        record = _write_file(folder / name, data)
    else:
        record = remote.put(name, data)
    return {name: record | {"sha256": hashlib.sha256(data).hexdigest()}}


def _write_file(path: Path, data: memoryview) -> dict[str, Any]:
    with atomic_write(path) as file:
        file.write(data)
    return {"bytes": len(data)}


class CheckpointFiles:
    """The files of a checkpoint, in a folder or at a URL, read by ranges of bytes. ``files``: those of its record."""

    def __init__(
        self, folder: Path, files: Mapping[str, Mapping[str, Any]], remote: RemoteCheckpoint | None = None
    ) -> None:
        self.folder = folder
        self._files = files
        self._remote = remote
        self.names = sorted(name for name in files if name.endswith(".safetensors"))

    def read(self, name: str, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of a file, or up to its end. Raises OSError, CorruptCheckpoint, or what
        ``RemoteCheckpoint.read`` does."""
        stop = min(stop, self.size(name))
        if stop < start:
            raise CorruptCheckpoint(f"{self.folder / name} ends before byte {start}")
        if self._remote is not None:
            return self._remote.read(name, self._files[name], start, stop)
        with open(self.folder / name, "rb") as file:
            if os.fstat(file.fileno()).st_size < stop:  # before memory is taken for it
                raise CorruptCheckpoint(f"{self.folder / name} ends before byte {stop}")
            data = bytearray(stop - start)
            file.seek(start)
            if file.readinto(data) != len(data):
                raise CorruptCheckpoint(f"{self.folder / name} ends before byte {stop}")
        return data

    def size(self, name: str) -> int:
        """Bytes of a file, as the record of the checkpoint states them."""
        return int(self._files[name]["bytes"])


class CheckpointIndex(NamedTuple):
    """The positions of all parts of all tensors in a checkpoint's files."""

    files: list[str]
    tensors: dict[str, tuple[torch.dtype, list[int], Any]]
    """Name -> dtype, shape, and an int64 array with a row for each part: its offsets in the tensor, its shape, its
    first byte in its file, and the number of the file."""

    @classmethod
    def of(cls, headers: Mapping[str, Any]) -> CheckpointIndex:
        """The index from the JSON value of ``read_headers``."""
        tensors = {}
        for name, (dtype, rows) in headers["tensors"].items():
            parts = np.array(rows, dtype=np.int64)
            ndim = parts.shape[1] // 2 - 1
            ends = parts[:, :ndim] + parts[:, ndim : 2 * ndim]
            tensors[name] = _DTYPES[dtype], ends.max(axis=0).tolist(), parts
        return cls(headers["files"], tensors)


def read_headers(files: CheckpointFiles) -> dict[str, Any]:
    """The headers of all files as a JSON value: ``files``, and ``tensors``: name -> [dtype, rows of the index].

    Raises CorruptCheckpoint.
    """
    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        headers = list(pool.map(partial(_read_header, files), files.names))
    tensors: dict[str, tuple[str, list[list[int]]]] = {}
    for number, (start, header) in enumerate(headers):
        saved = header["saved"]
        for name, entry in header["tensors"].items():
            shape = entry["shape"]
            dtype, rows = tensors.setdefault(name, (entry["dtype"], []))
            if dtype != entry["dtype"] or (rows and len(rows[0]) != 2 * len(shape) + 2):
                raise CorruptCheckpoint(f"{files.names[number]}: tensor {name[:200]!r} differs from its other parts")
            if saved:
                offsets = saved[name][OFFSETS]
            else:
                offsets = [0] * len(shape)
            rows.append([*offsets, *shape, start + entry["data_offsets"][0], number])
    return {"files": files.names, "tensors": tensors}


def _read_header(files: CheckpointFiles, name: str) -> tuple[int, dict[str, Any]]:
    """(position of the tensors' bytes, the header as of ``parse_header``) of a file. Raises CorruptCheckpoint."""
    data = files.read(name, 0, HEADER_BYTES)
    size = 8 + int.from_bytes(data[:8], "little")
    if size > HEADER_LIMIT:
        raise CorruptCheckpoint(f"{name} states a header of {size:,} bytes, at most {HEADER_LIMIT:,} are read")
    if size > len(data):
        data += files.read(name, len(data), size)
    if size > len(data):
        raise CorruptCheckpoint(f"{name} ends in its header")
    return size, parse_header(bytes(data[8:size]), name, files.size(name) - size, ITEM_BYTES)


class Region(NamedTuple):
    """Rows of a saved part that overlap this rank's part of a tensor, and their target."""

    file: str
    start: int
    stop: int
    dtype: torch.dtype
    shape: list[int]
    """Of the rows, which are read in full."""
    columns: tuple[slice, ...]
    """What is needed of each row."""
    target: Tensor

    def fill(self, data: bytearray, offset: int) -> None:
        """Copy the region from ``data``, in which it starts at ``offset``."""
        rows = torch.frombuffer(data, dtype=self.dtype, count=math.prod(self.shape), offset=offset)
        self.target.copy_(rows.reshape(self.shape)[(slice(None), *self.columns)])


def read_tensors(
    files: CheckpointFiles,
    state: Mapping[str, Tensor],
    index: CheckpointIndex | None = None,
    left_out: tuple[str, ...] = (),
) -> None:
    """Fill this rank's part of each tensor of ``state`` in place. ``index``: read from the files if None.

    If ``state`` has parameters of the model, the checkpoint may have no others, except for those whose names start with
    one of ``left_out``.

    Raises DataError if the tensors are not those of the checkpoint, and what ``CheckpointFiles.read`` raises.
    """
    index = index or CheckpointIndex.of(read_headers(files))
    _refuse_unread(state, index, left_out)
    regions = [region for name, tensor in state.items() for region in _regions(name, tensor, index)]
    groups = list(_groups(sorted(regions, key=lambda region: region[:2])))

    def read(group: list[Region]) -> bytearray:
        return files.read(group[0].file, group[0].start, max(region.stop for region in group))

    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        for i in range(0, len(groups), PARALLEL_FILES):  # bounds the memory for bytes that are read ahead
            batch = groups[i : i + PARALLEL_FILES]
            for group, data in zip(batch, pool.map(read, batch), strict=True):
                for region in group:
                    region.fill(data, region.start - group[0].start)


def _refuse_unread(state: Mapping[str, Tensor], index: CheckpointIndex, left_out: tuple[str, ...]) -> None:
    """Raise DataError if the checkpoint has parameters that the model lacks: it would compute another function."""
    if not any(name.startswith(WEIGHTS) for name in state):
        return
    unread = sorted(name for name in index.tensors.keys() - state.keys() if name.startswith(WEIGHTS))
    unread = [name for name in unread if not name.startswith(left_out)]
    if unread:
        what = f"the checkpoint has {len(unread)} parameters that the model of its configuration lacks"
        raise DataError(what, value=", ".join(unread[:3]), remedy="Use the code that trained it.")


def _regions(name: str, tensor: Tensor, index: CheckpointIndex) -> Iterator[Region]:
    """The regions of the files that make up this rank's part of a tensor."""
    if name not in index.tensors:
        raise DataError(f"the checkpoint has no tensor {name}")
    dtype, shape, parts = index.tensors[name]
    if shape != list(tensor.shape):
        raise DataError(f"{name} has the shape {shape}, the model needs {list(tensor.shape)}")
    target = local(tensor).detach()
    ndim = tensor.ndim
    missing = local(tensor).numel()
    origin = local_offsets(tensor) or [0]
    target = target if ndim else target.view(1)
    wanted = []
    if missing:
        wanted = parts[_overlapping(parts, origin, target.shape)].tolist()
    for *box, first_byte, file in wanted:
        offsets = box[:ndim] or [0]
        lengths = box[ndim:] or [1]
        low = [max(pair) for pair in zip(origin, offsets, strict=True)]
        high = [min(o + n, p + m) for o, n, p, m in zip(origin, target.shape, offsets, lengths, strict=True)]
        within = [slice(a - o, b - o) for a, b, o in zip(low, high, offsets, strict=True)]
        cut = target[tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))]
        row = dtype.itemsize * math.prod(lengths[1:])
        start = first_byte + within[0].start * row
        stop = first_byte + within[0].stop * row
        yield Region(index.files[file], start, stop, dtype, [high[0] - low[0], *lengths[1:]], (*within[1:],), cut)
        missing -= cut.numel()
    if missing:
        raise DataError(f"{name} lacks {missing:,} of its values")


def _overlapping(parts: Any, offsets: list[int], shape: torch.Size) -> Any:
    """Which parts overlap a box of the tensor: a bool for each row."""
    ndim = parts.shape[1] // 2 - 1
    starts = parts[:, :ndim]
    lengths = parts[:, ndim : 2 * ndim]
    low = np.maximum(starts, offsets[:ndim])
    high = np.minimum(starts + lengths, np.add(offsets, shape)[:ndim])
    return (low < high).all(axis=1)


def _groups(regions: list[Region]) -> Iterator[list[Region]]:
    """Regions that lie close to each other in a file are read together: most are a few kilobytes."""
    group: list[Region] = []
    for region in regions:
        if group and (
            region.file != group[0].file
            or region.start > group[-1].stop + GAP_BYTES
            or region.stop - group[0].start > REQUEST_BYTES
        ):
            yield group
            group = []
        group.append(region)
    if group:
        yield group
