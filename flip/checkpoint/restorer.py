"""Reading the commits of a run, all ranks together: the newest that is whole, or one that is named, and its tensors."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DEFAULT_EXTRA_METADATA_KEY,
    DTYPE_MAP,
    SAVED_OFFSETS_KEY,
    _HFStorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from flip.checkpoint import export_record
from flip.checkpoint.dcp_io import DAMAGED, Problem, raised
from flip.checkpoint.remote import AT_ONCE, Remote, refuse_foreign
from flip.data.storage.retry import Patience
from flip.distributed.collectives import all_gather_json, broadcast_json, run_on_first
from flip.distributed.parallel import World
from flip.runs import commit
from flip.runs.errors import DataError, FlipError
from flip.runs.rundir import RunDir

log = logging.getLogger(__name__)

HEAD = 1 << 18
"""Bytes of a file that are read first for its header."""
GAP, TOGETHER = 1 << 20, 1 << 26
"""Bytes between two parts of a file that are read over for one request, and of a request for several parts at most."""


class Restorer:
    """Picks and loads the commits of a run. All methods are collective: call them on all ranks.

    A try with storage at a URL is repeated with ``patience``. Only ``attempt``, where it holds the run, sets aside one
    that is damaged. An address in a record of another user is followed only below ``url``.
    """

    def __init__(
        self, run: RunDir, attempt: int, world: World, patience: Patience | None = None, url: str = ""
    ) -> None:
        self._run, self._attempt, self._world, self._url = run, attempt, world, url
        self._patience = patience or Patience()
        self._headers: tuple[Path, Headers] | None = None
        self.parent = ""
        """Folder name of the commit that this attempt went on from."""

    def newest(self) -> commit.Commit | None:
        """The newest commit whose files are what it says, agreed by all ranks; None where the run has none yet.

        A damaged one is set aside with a warning, and the one before is taken. Raises DataError where all are damaged:
        a run never starts from zero by itself.
        """

        def look() -> tuple[list[str], bool]:
            return [str(one.path) for one in reversed(commit.commits(self._run))], commit.traces(self._run)

        paths, traces = run_on_first(look, self._world.storage)
        for path in map(Path, paths):
            damaged = self._together(lambda path=path: self._verify(path))  # type: ignore[misc]
            if damaged is None:
                self.parent = f"{path.parent.name}/{path.name}"
                return commit.read(path)
            if damaged.cause != DAMAGED:
                raise raised(damaged)(damaged.text)
            log.warning(
                "checkpoint %s is damaged (%s); taking the one before", f"{path.parent.name}/{path.name}", damaged.text
            )
            if self._world.first and self._run.holds(self._attempt):
                commit.set_aside(path)
        if traces:
            raise DataError(
                "all checkpoints are damaged",
                self._run.checkpoints,
                remedy="Restore one from a copy, or move the folder `checkpoints` away to begin again from zero.",
            )
        return None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self._world.first

    def open_other(self, find: Callable[[], commit.Commit], run: str) -> commit.Commit:
        """The verified commit of another ``run`` that ``find`` returns on every rank. Raises DataError if one
        cannot."""
        problem = self._together(find)
        if problem is not None:
            raise DataError(f"the run cannot begin: {problem.text}", run)
        self.parent = str(find().path)
        return self.open(Path(self.parent))

    def open(self, path: Path) -> commit.Commit:
        """The commit in a folder, verified, for ``load``. Raises DataError where it is damaged."""
        problem = self._together(lambda: self._verify(path))
        if problem is not None:
            kind = DataError if problem.cause == DAMAGED else raised(problem)
            remedy = "It was deleted since, or is damaged: name another one."
            raise kind(f"this checkpoint cannot be read: {problem.text}", path, remedy=remedy)
        return commit.read(path)

    def load(self, source: commit.Commit, state: dict[str, torch.Tensor]) -> None:
        """Fill the tensors of ``state`` in place; each must be in the checkpoint, which ``newest`` or
        ``open`` has given."""
        files = Files(source, self._patience)
        reader = Reader(files, state, self._known(files))
        self._read(lambda: fill(state, reader), source.path)

    def close(self) -> None:
        """Forget what is known of the files."""
        self._headers = None

    def _verify(self, path: Path) -> None:
        """Verify this rank's part of the files of a commit."""
        found = commit.read(path)
        if "url" not in found.record:
            commit.verify(found, part=self._world.rank, parts=self._world.size)
            return
        refuse_foreign(found, self._url)
        files = found.record["files"]
        mine = sorted(files)[self._world.rank :: self._world.size]
        Remote(found.record["url"], self._patience).verify({name: files[name] for name in mine})

    def _known(self, files: Files) -> Headers:
        """The headers of a commit's files: rank 0 reads them, once for weights and moments.

        Collective. What goes wrong there is raised on all ranks.
        """
        if self._headers is None or self._headers[0] != files.path:
            found: list[dict[str, Any]] = []
            self._read(lambda: found.append(_headers(files)) if self._world.first else None, files.path)
            facts = broadcast_json(found[0] if found else None, self._world.storage)
            self._headers = files.path, Headers.of(facts)
        return self._headers[1]

    def _read(self, work: Callable[[], object], path: Path) -> None:
        """Do it on all ranks. What goes wrong on one is raised on all. Collective."""
        problem = self._together(work)
        if problem is not None:
            raise raised(problem)(f"this checkpoint cannot be read: {problem.text}", path)

    def _together(self, work: Callable[[], object]) -> Problem | None:
        """Do it on all ranks; of their problems the first rank's that has one. Collective."""
        problem = None
        try:
            work()
        except (OSError, FlipError, commit.Damaged) as error:
            problem = Problem.of(error)
        found = (Problem(*one) for one in all_gather_json(problem, self._world.storage) if one is not None)
        return next(found, None)


def fill(state: dict[str, torch.Tensor], reader: dcp.StorageReader) -> None:
    """Read this rank's part of ``state`` as DCP plans it. ``dcp.load`` would also send pickles between ranks."""
    planner, metadata = dcp.DefaultLoadPlanner(), reader.read_metadata()
    planner.set_up_planner(state, metadata)
    reader.set_up_storage_reader(metadata, is_coordinator=False)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(planner.finish_plan(plan), planner).wait()


class Files:
    """The files of a commit, in its folder or at a URL, read by ranges of bytes."""

    def __init__(self, source: commit.Commit, patience: Patience) -> None:
        self.path, self.facts = source.path, source.record["files"]
        self.names = sorted(name for name in self.facts if name.endswith(".safetensors"))
        self.remote = Remote(source.record["url"], patience) if "url" in source.record else None

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Raises OSError, or what ``Remote.read`` does."""
        stop = min(stop, self.facts[name]["bytes"])
        if self.remote is not None:
            return self.remote.read(name, self.facts[name], start, stop)
        with open(self.path / name, "rb") as file:
            file.seek(start)
            return file.read(stop - start)


class Headers(NamedTuple):
    """What the files of a checkpoint hold, small enough for all ranks: DCP's objects are tens of times as large."""

    files: list[str]
    tensors: dict[str, tuple[torch.dtype, torch.Size, Any]]
    """Name -> dtype, size, and an array with a row for each part: its offsets, its lengths, the byte at which it begins
    in its file, and which file."""

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Headers:
        """``facts``: of ``_headers``."""
        tensors = {}
        for name, (dtype, rows) in facts["tensors"].items():
            table = np.array(rows, dtype=np.int64)
            ends = table[:, : table.shape[1] // 2 - 1] + table[:, table.shape[1] // 2 - 1 : -2]
            tensors[name] = DTYPE_MAP[dtype], torch.Size(ends.max(axis=0).tolist()), table
        return cls(facts["files"], tensors)


def _headers(files: Files) -> dict[str, Any]:
    """Read the header of every file, as safetensors has it, with the offsets that DCP adds. A value of JSON: ``files``,
    and ``tensors``: name -> [dtype, rows as in ``Headers``]. Raises Damaged."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        headers = list(pool.map(partial(_header, files), files.names))
    tensors: dict[str, tuple[str, list[list[int]]]] = {}
    for number, (begin, header) in enumerate(headers):
        saved = json.loads(header.pop(DEFAULT_EXTRA_METADATA_KEY, {}).get(CUSTOM_METADATA_KEY, "{}"))
        for name, facts in header.items():
            shape, rows = facts["shape"], tensors.setdefault(name, (facts["dtype"], []))[1]
            offsets = saved[name][SAVED_OFFSETS_KEY] if saved else [0] * len(shape)
            rows.append([*offsets, *shape, begin + facts["data_offsets"][0], number])
    return {"files": files.names, "tensors": tensors}


def _header(files: Files, name: str) -> tuple[int, dict[str, Any]]:
    """(where the tensors' bytes begin, the header) of a safetensors file. Raises Damaged."""
    head = files.read(name, 0, HEAD)
    begin = 8 + int.from_bytes(head[:8], "little")
    if begin > export_record.HEADER_LIMIT:
        raise commit.Damaged(
            f"{name} states a header of {begin:,} bytes, at most {export_record.HEADER_LIMIT:,} are read"
        )
    if begin > len(head):
        head += files.read(name, len(head), begin)
    try:
        return begin, dict(json.loads(head[8:begin]))
    except (ValueError, TypeError) as error:
        raise commit.Damaged(f"{name} has no header of safetensors: {error}") from error


@dataclass
class Place(_HFStorageInfo):
    """Where a part of a tensor lies: ``begin``, its first byte in the file."""

    begin: int

    def range(self, item: ReadItem) -> tuple[int, int]:
        """The bytes of those rows of the part that an item needs."""
        row = self.dtype.itemsize * math.prod(self.shape[1:])
        first, count = (item.storage_offsets[0], item.lengths[0]) if self.shape else (0, 1)
        return self.begin + first * row, self.begin + (first + count) * row

    def tensor(self, item: ReadItem, data: bytearray, at: int) -> torch.Tensor:
        """What an item needs, from bytes of its ``range`` that begin at ``at`` of ``data``."""
        count = math.prod(item.lengths[:1]) * math.prod(self.shape[1:])
        if not count:
            return torch.empty(item.lengths, dtype=self.dtype)
        rows = torch.frombuffer(data, dtype=self.dtype, count=count, offset=at)
        cut = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets[1:], item.lengths[1:], strict=True))
        return rows.reshape(item.lengths[:1] + self.shape[1:])[(slice(None), *cut) if self.shape else ()]


class Reader(dcp.HuggingFaceStorageReader):
    """Fills ``state`` from files whose ``headers`` are known.

    By itself DCP has each rank open every file for them at each load. Here a rank knows the parts that are its own, and
    of files at a URL reads nothing else.
    """

    def __init__(self, files: Files, state: dict[str, torch.Tensor], headers: Headers) -> None:
        super().__init__(str(files.path))
        self._files, self._state, self._headers = files, state, headers

    def read_metadata(self) -> Metadata:
        files, tensors = self._headers
        found = Metadata({}, storage_data={})
        for name in self._state.keys() & tensors.keys():
            dtype, size, parts = tensors[name]
            chunks = []
            for *at, begin, file in parts[_needed(parts, self._state[name])].tolist():
                offsets, lengths = torch.Size(at[: len(size)]), torch.Size(at[len(size) :])
                chunks.append(ChunkStorageMetadata(offsets, lengths))
                path = files[file] if self._files.remote else os.path.join(self.path, files[file])
                found.storage_data[MetadataIndex(name, offsets)] = Place(path, lengths, dtype, begin)
            found.state_dict_metadata[name] = TensorStorageMetadata(TensorProperties(dtype), size, chunks)
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if self._files.remote is None:
            return super().read_data(plan, planner)
        groups = list(_groups(plan.items, self.storage_data))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for some in (groups[at : at + AT_ONCE] for at in range(0, len(groups), AT_ONCE)):  # no more is held at once
                for (start, wanted), data in zip(some, pool.map(self._read, some), strict=True):
                    for item, place in wanted:
                        target = planner.resolve_tensor(item).detach()
                        found = place.tensor(item, data, place.range(item)[0] - start)
                        if target.size() != found.size():  # else it would be broadcast
                            raise AssertionError(f"{item.storage_index}: {target.size()} is not {found.size()}")
                        target.copy_(found)
                        planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, group: Group) -> bytearray:
        start, wanted = group
        stop = max(place.range(item)[1] for item, place in wanted)
        return bytearray(self._files.read(wanted[0][1].relative_path, start, stop))


Group = tuple[int, list[tuple[ReadItem, Place]]]
"""What one request brings: from which byte on, and what of it is needed."""


def _groups(items: Sequence[ReadItem], places: Mapping[MetadataIndex, Place]) -> Iterator[Group]:
    """Items that lie close to each other in a file are read together: most are a few kilobytes."""
    group: Group | None = None
    wanted = sorted(((item, places[item.storage_index]) for item in items), key=lambda one: _place(*one))
    for item, place in wanted:
        start, stop = place.range(item)
        if group is not None:
            first, held = group
            last, beside = held[-1][1].range(held[-1][0])[1], held[-1][1].relative_path == place.relative_path
            if beside and start <= last + GAP and stop - first <= TOGETHER:
                held.append((item, place))
                continue
            yield group
        group = start, [(item, place)]
    if group is not None:
        yield group


def _place(item: ReadItem, place: Place) -> tuple[str, int]:
    return place.relative_path, place.range(item)[0]


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
