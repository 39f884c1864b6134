"""`shards verify`: reads chunks again (all or a random sample), checks CRCs and decodes images and captions.

`check` runs the tasks in processes and yields one `Part` per task; `Report` sums them; `upper_bound` is the confidence
limit for a sample of chunks. `verify` is the command; with ``--out`` it writes a manifest that excludes bad samples.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flip import concurrency
from flip.concurrency import cores
from flip.data.chunk_reader import ChunkReader
from flip.data.decode import Undecodable
from flip.data.manifest.manifest import Manifest
from flip.data.manifest.tar import BLOCK
from flip.data.worker import captions_of, image_of
from flip.runs.errors import COMPLETE, DATA, ConfigError, DataError, FlipError
from tools.shards_commands.manifest import excepting, kind
from tools.shards_commands.output import Bar, Outcome, captions, claim, number

INTERRUPTED = 130
CONFIDENCE = 0.95
_TASK = 256
"""Approximate number of samples per task."""


@dataclass(frozen=True)
class Plan:
    """What to check. ``captions``: the caption members; ``decode``: whether to decode images and captions."""

    chunks: Sequence[int]
    decode: bool = True
    captions: Sequence[str] = ("txt",)
    decoder: str = "simplejpeg"
    """Both decoders reject the same files; this one is faster."""


class Bad(NamedTuple):
    """A sample that training cannot use."""

    id: int
    shard: str
    ordinal: int
    reason: str


class Part(NamedTuple):
    """Result of one task. ``bad``: (sample id, reason)."""

    chunks: int
    bad_chunks: int
    samples: int
    bytes: int
    bad: list[tuple[int, str]]


@dataclass
class Report:
    """Sum of all parts so far. ``resized``: shards whose length differs from the indexed length; ``zeros``: shards
    without a member."""

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
        """Kind of reason -> number of samples, most frequent first."""
        return dict(Counter(map(kind, self.bad.values())).most_common())

    def examples(self, manifest: Manifest, count: int) -> dict[str, list[Bad]]:
        """The first samples of each kind of reason."""
        found: dict[str, list[Bad]] = {name: [] for name in self.reasons()}
        for id, reason in sorted(self.bad.items()):
            if len(found[kind(reason)]) < count:
                found[kind(reason)].append(Bad(id, *manifest.locate(id), reason))
        return found


def draw(manifest: Manifest, count: int, seed: int) -> list[int]:
    """Draw ``count`` different chunks uniformly; sorted. Raises ConfigError if there are fewer."""
    if not 0 < count <= manifest.chunks:
        raise ConfigError(f"the manifest has {manifest.chunks} chunks; so many cannot be drawn", value=count)
    return sorted(np.random.default_rng(seed).choice(manifest.chunks, count, replace=False).tolist())


def upper_bound(bad: int, n: int, confidence: float = CONFIDENCE) -> float:
    """One-sided Clopper-Pearson upper bound of the share of bad chunks, given ``bad`` among ``n`` drawn.

    Conservative, as the draw is without replacement. For ``bad == 0`` it is 1 - (1 - confidence)^(1/n), about 3/n.
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
    """Yield the result of each task in order of completion. ``workers``: processes; 0: run in this process.

    Closing the iterator (Ctrl-C does) ends the processes at once. Raises StorageError, PermissionDenied.
    """
    arguments = (str(manifest.folder), replace(plan, chunks=()))
    return concurrency.map_in_processes(_looker, arguments, _tasks(manifest, plan), workers, "verify")


def _looker(folder: str, plan: Plan) -> Callable[[Sequence[int]], Part]:
    manifest, reader = Manifest.load(folder, check=False), ChunkReader()
    return lambda chunks: look(manifest, plan, chunks, reader)


def look(manifest: Manifest, plan: Plan, chunks: Sequence[int], reader: ChunkReader) -> Part:
    """Check these chunks in this process. Samples that the manifest excludes are skipped."""
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
    """Bytes read for chunk j."""
    return sum(stop - start for _, start, stop, _ in manifest.chunk_reads(j))


def planned_bytes(manifest: Manifest, plan: Plan) -> int:
    """Bytes of all chunks of a plan."""
    if len(plan.chunks) == manifest.chunks:
        return manifest.read_bytes
    return sum(chunk_bytes(manifest, j) for j in plan.chunks)


def resized(manifest: Manifest, plan: Plan) -> list[str]:
    """Local shards of a plan whose file length differs from the index: truncated, replaced or appended to."""
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
    """Shards that start with a block of zeros, which older releases indexed as shards without samples.

    No chunk reads them. Raises StorageError, PermissionDenied.
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
    """The reason without folder names: it becomes part of the digest, which must not depend on the location."""
    reason = error.what
    for key, *_ in manifest.chunk_reads(j):
        reason = reason.replace(key, os.path.basename(key))
    return reason if reason.startswith("chunk ") else f"{reason} ({os.path.basename(error.where)})"


def verify(options: argparse.Namespace) -> Outcome:
    """Check all or some chunks; with ``--out``, write a manifest that excludes the bad samples."""
    if options.workers < 0:
        raise ConfigError("must not be negative", "--workers", options.workers)
    manifest = Manifest.load(options.manifest)
    plan = Plan(_chunks(manifest, options), options.decode, captions(options))
    if options.out:
        claim(Path(options.out).absolute())
    report, begin = Report(), time.monotonic()
    report.resized, report.zeros = resized(manifest, plan), zeros(manifest, ChunkReader())
    ended = _run(manifest, plan, options.workers or cores(), report)
    found = _facts(manifest, report, len(plan.chunks), time.monotonic() - begin, options)
    if isinstance(ended, FlipError):
        print(_text(found, manifest, options, "until then: "), file=sys.stderr)
        raise ended
    if ended:
        return Outcome(found | {"interrupted": True}, INTERRUPTED, _text(found, manifest, options, "interrupted: "))
    if options.out and report.bad:
        new = excepting(manifest, report.bad, options.out)
        found |= {"written": str(new.folder), "digest": new.digest}
    left = report.resized or report.zeros or (report.bad and not options.out)
    return Outcome(found, DATA if left else COMPLETE, _text(found, manifest, options))


def _chunks(manifest: Manifest, options: argparse.Namespace) -> range | list[int]:
    if options.sample is not None:
        if not 0 < options.sample <= 1:
            raise ConfigError("a share lies above 0 and not above 1", "--sample", options.sample)
        return draw(manifest, max(1, round(options.sample * manifest.chunks)), options.seed)
    if options.chunks is not None:
        return draw(manifest, options.chunks, options.seed)
    return range(manifest.chunks)


def _run(manifest: Manifest, plan: Plan, workers: int, report: Report) -> FlipError | KeyboardInterrupt | None:
    """Fill the report; returns the error that ended the check early, if any."""
    total = planned_bytes(manifest, plan)
    with Bar("verifying", "B") as bar, closing(check(manifest, plan, min(workers, len(plan.chunks)))) as parts:
        try:
            for part in parts:
                report.add(part)
                bar(report.bytes, total, f"{len(report.bad):,} bad" if report.bad else "")
        except (FlipError, KeyboardInterrupt) as error:
            return error
    return None


def _facts(
    manifest: Manifest, report: Report, planned: int, seconds: float, options: argparse.Namespace
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "manifest": str(manifest.folder),
        "chunks_checked": report.chunks,
        "chunks": manifest.chunks,
        "samples_checked": report.samples,
        "excepted_before": len(manifest.exceptions),
        "decoded": options.decode,
        "bad": len(report.bad),
        "bad_chunks": report.bad_chunks,
        "reasons": report.reasons(),
        "examples": [
            one._asdict() for several in report.examples(manifest, options.examples).values() for one in several
        ],
        "resized_shards": report.resized,
        "shards_without_members": report.zeros,
        "megabytes_per_second": round(report.bytes / 1e6 / seconds, 1),
        "samples_per_second": round(report.samples / seconds, 1),
        "seconds": round(seconds, 1),
    }
    if report.chunks == planned < manifest.chunks:  # they are read in order: of the first ones nothing follows for all
        bound = upper_bound(report.bad_chunks, report.chunks)
        found |= {"seed": options.seed, "confidence": CONFIDENCE, "bad_share_at_most": bound}
    return found


def _text(found: dict[str, Any], manifest: Manifest, options: argparse.Namespace, before: str = "") -> str:
    lines = [
        f"{before}{found['samples_checked']:,} samples in {found['chunks_checked']:,} of {found['chunks']:,} chunks "
        f"{'read and decoded' if found['decoded'] else 'read'}; {found['megabytes_per_second']:,} MB/s, "
        f"{found['samples_per_second']:,} samples/s, {found['seconds']:,} s; {found['bad']:,} bad"
    ]
    examples = [Bad(**one) for one in found["examples"]]
    for reason, count in found["reasons"].items():
        lines.append(f"  {count:,} x {reason}")
        lines += [
            f"      id {one.id}: {one.shard}, sample {one.ordinal}: {one.reason}"
            for one in examples
            if kind(one.reason) == reason
        ]
    lines += [f"  a shard of another length: {one}" for one in found["resized_shards"]]
    lines += [f"  a shard without samples: {one}" for one in found["shards_without_members"]]
    if "bad_share_at_most" in found:
        undecoded = "" if found["decoded"] else " (images and captions were not decoded)"
        lines.append(
            f"{found['bad_chunks']:,} of {found['chunks_checked']:,} chunks drawn (seed {found['seed']}) hold a bad "
            f"sample{undecoded}: at {found['confidence']:.0%} confidence at most "
            f"{number(100 * found['bad_share_at_most'])} % of all chunks do (one-sided "
            "Clopper-Pearson), and so at most that share of samples is bad"
        )
    if found.get("written"):
        lines.append(f"{found['written']}: a manifest that excepts them, digest {found['digest']}")
    elif options.out and not before:
        lines.append("nothing to leave out: no manifest was written")
    elif found["bad"] and not before:
        lines.append(f"To leave them out: python tools/shards.py verify {manifest.folder} --out NEW_FOLDER")
    return "\n".join(lines)
