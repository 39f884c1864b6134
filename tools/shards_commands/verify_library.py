"""Shards read again: every chunk's length, CRC and headers, every image and caption as training decodes them.

Chunks are shared out to processes of the fork server. Trouble with the storage is an error of the whole check; what is
wrong with the data is a finding.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from flip import concurrency
from flip.data.chunk_reader import ChunkReader
from flip.data.decode import Undecodable
from flip.data.manifest.manifest import Manifest
from flip.data.manifest.tar import BLOCK
from flip.data.worker import captions_of, image_of
from flip.runs.errors import ConfigError, DataError

CONFIDENCE = 0.95
_TASK = 256
"""Samples of a task, about: a process is not asked for each of single samples."""


@dataclass(frozen=True)
class Plan:
    """What is looked at. ``captions``: members that hold them; ``decode``: images and captions too."""

    chunks: Sequence[int]
    decode: bool = True
    captions: Sequence[str] = ("txt",)
    decoder: str = "simplejpeg"
    """Both decoders refuse the same files; this one is faster."""


class Bad(NamedTuple):
    """A sample that training could not use."""

    id: int
    shard: str
    ordinal: int
    reason: str


class Part(NamedTuple):
    """What one task found. ``bad``: (sample id, reason)."""

    chunks: int
    bad_chunks: int
    samples: int
    bytes: int
    bad: list[tuple[int, str]]


@dataclass
class Report:
    """The sum of all parts so far. ``resized``: shards whose file has another length than the indexed one.
    ``zeros``: shards without a member."""

    chunks: int = 0
    bad_chunks: int = 0
    samples: int = 0
    bytes: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    resized: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)

    def add(self, part: Part) -> None:
        self.chunks += part.chunks
        self.bad_chunks += part.bad_chunks
        self.samples += part.samples
        self.bytes += part.bytes
        self.bad.update(part.bad)

    def reasons(self) -> dict[str, int]:
        """Kind of reason -> samples, the most frequent first."""
        return dict(Counter(map(kind, self.bad.values())).most_common())

    def examples(self, manifest: Manifest, count: int) -> dict[str, list[Bad]]:
        """The first samples of each kind of reason."""
        found: dict[str, list[Bad]] = {name: [] for name in self.reasons()}
        for id, reason in sorted(self.bad.items()):
            if len(found[kind(reason)]) < count:
                found[kind(reason)].append(Bad(id, *manifest.locate(id), reason))
        return found


def kind(reason: str) -> str:
    """A reason without its numbers: what is counted together."""
    return re.sub(r"\b(0x[0-9a-f]+|\d+)\b", "N", reason)


def draw(manifest: Manifest, count: int, seed: int) -> list[int]:
    """``count`` different chunks, in order, all equally likely. Raises ConfigError where there are not so many."""
    if not 0 < count <= manifest.chunks:
        raise ConfigError(f"the manifest has {manifest.chunks} chunks; so many cannot be drawn", value=count)
    return sorted(np.random.default_rng(seed).choice(manifest.chunks, count, replace=False).tolist())


def upper_bound(bad: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The one-sided Clopper-Pearson limit: the share p at which so few bad among n are seen with 1 - confidence.

    n are drawn without replacement, so it is on the safe side. Without a bad one it is 1 - (1 - confidence)^(1/n),
    about 3/n.
    """
    if bad >= n:
        return 1.0
    low, high = bad / n, 1.0
    for _ in range(60):
        p = (low + high) / 2
        low, high = (p, high) if _at_most(bad, n, p) > 1 - confidence else (low, p)
    return high


def _at_most(k: int, n: int, p: float) -> float:
    """P(X <= k) of a binomial X(n, p), 0 < p < 1."""
    whole, yes, no = math.lgamma(n + 1), math.log(p), math.log1p(-p)
    logs = (whole - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * yes + (n - i) * no for i in range(k + 1))
    return min(1.0, math.fsum(map(math.exp, logs)))


def check(manifest: Manifest, plan: Plan, workers: int = 0) -> Generator[Part, None, None]:
    """What each task found, as it ends, in no order. ``workers``: processes; 0: this one does all itself.

    Closing the iterator (Ctrl-C does) ends the processes at once. Raises StorageError, PermissionDenied.
    """
    arguments = (str(manifest.folder), replace(plan, chunks=()))
    return concurrency.run(_looker, arguments, _tasks(manifest, plan), workers, "verify")


def _looker(folder: str, plan: Plan) -> Callable[[Sequence[int]], Part]:
    manifest, reader = Manifest.load(folder, check=False), ChunkReader()
    return lambda chunks: look(manifest, plan, chunks, reader)


def look(manifest: Manifest, plan: Plan, chunks: Sequence[int], reader: ChunkReader) -> Part:
    """One task: these chunks, in this process. Samples that the manifest excepts are not looked at."""
    bad, bad_chunks, samples, size = list[tuple[int, str]](), 0, 0, 0
    for j in chunks:
        ids = [id for id in manifest.chunk_ids(j) if id not in manifest.exceptions]
        if not ids:
            continue
        size += chunk_bytes(manifest, j)
        found = _chunk(manifest, plan, j, ids, reader)
        samples, bad_chunks, bad = samples + len(ids), bad_chunks + bool(found), bad + found
    return Part(len(chunks), bad_chunks, samples, size, bad)


def chunk_bytes(manifest: Manifest, j: int) -> int:
    """Bytes that chunk j is read with."""
    return sum(stop - start for _, start, stop, _ in manifest.chunk_reads(j))


def planned_bytes(manifest: Manifest, plan: Plan) -> int:
    """Bytes of all chunks of a plan."""
    if len(plan.chunks) == manifest.chunks:
        return manifest.read_bytes
    return sum(chunk_bytes(manifest, j) for j in plan.chunks)


def resized(manifest: Manifest, plan: Plan) -> list[str]:
    """Local shards of a plan whose file does not have the indexed length: cut off, replaced or appended to."""
    rows: Iterable[int] = range(len(manifest.keys))
    if len(plan.chunks) < manifest.chunks:
        ids = [id for j in plan.chunks for id in (manifest.chunk_ids(j).start, manifest.chunk_ids(j).stop - 1)]
        ends = np.searchsorted(manifest.first, ids, side="right").reshape(-1, 2) - 1
        rows = sorted({row for first, last in ends.tolist() for row in range(first, last + 1)})
    found = []
    for row in rows:
        key, indexed = manifest.keys[row], int(manifest.shards[row, 1])
        try:
            size = indexed if "://" in key else os.stat(key).st_size
        except OSError:
            continue  # the reader says it better
        if size != indexed:
            found.append(f"{key}: {size} bytes, indexed were {indexed}")
    return found


def zeros(manifest: Manifest, reader: ChunkReader) -> list[str]:
    """Shards that are zeros from the first block on, which older releases indexed as shards without samples. No chunk
    reads them. Raises StorageError, PermissionDenied.
    """
    found = []
    for row in np.flatnonzero((manifest.kept.tars if manifest.kept else manifest.shards)[:, 0] == 0).tolist():
        key = manifest.keys[row]
        try:
            if not any(reader.read(key, 0, min(BLOCK, int(manifest.shards[row, 1])), manifest.etags[row])):
                found.append(f"{key}: zeros alone, without a single member")
        except DataError as error:
            found.append(f"{key}: {error.what}")
    return found


def _tasks(manifest: Manifest, plan: Plan) -> Iterator[list[int]]:
    step = max(1, _TASK // manifest.chunk)
    yield from (list(plan.chunks[at : at + step]) for at in range(0, len(plan.chunks), step))


def _chunk(manifest: Manifest, plan: Plan, j: int, ids: Sequence[int], reader: ChunkReader) -> list[tuple[int, str]]:
    try:
        samples = reader.read_chunk(manifest, j)
    except DataError as error:
        return [(id, _without_folders(manifest, j, error)) for id in ids]
    found = []
    for id in ids if plan.decode else ():
        sample = samples[id - j * manifest.chunk]
        try:
            image_of(sample, plan.decoder)
            captions_of(sample, list(plan.captions))
        except Undecodable as error:
            found.append((id, str(error)))
    return found


def _without_folders(manifest: Manifest, j: int, error: DataError) -> str:
    """The reason as it may stand in an exception list, and so in a digest: the same where the data was moved to."""
    reason = error.what
    for key, *_ in manifest.chunk_reads(j):
        reason = reason.replace(key, os.path.basename(key))
    return reason if reason.startswith("chunk ") else f"{reason} ({os.path.basename(error.where)})"
