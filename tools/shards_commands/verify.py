"""`shards verify`: reads chunks again (all or a random sample), checks CRCs and decodes images and captions.

`check` runs the tasks in processes and yields one `Report` per task; `upper_bound` is the confidence
limit for a sample of chunks. `verify` is the command; with ``--out`` it writes a manifest that excludes bad samples.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flip import concurrency
from flip.common.host import cores
from flip.data.chunk_reader import ChunkReader
from flip.data.decode import DecodeError, noting_place, place_of
from flip.data.manifest.manifest import Manifest
from flip.data.prefetch import chunk_bytes
from flip.data.sample_members import CAPTION_NOT_UTF8, captions_are_utf8, captions_of, image_of
from flip.data.storage.base import is_remote
from flip.runs.errors import COMPLETE, DATA, ConfigError, DataError, FlipError
from jobs.common.cli import INTERRUPTED, command
from jobs.common.terminal import ProgressBar
from tools.shards_commands.manifest import excepting, kind, position
from tools.shards_commands.output import CommandResult, captions, claim, number

CONFIDENCE = 0.95
_TASK = 256
"""Approximate number of samples per task."""


@dataclass(frozen=True)
class VerificationPlan:
    """What to check. ``captions``: the caption members; ``decode``: whether to decode images and captions."""

    chunks: Sequence[int]
    decode: bool = True
    captions: Sequence[str] = ("txt",)


@dataclass
class Report:
    """Result of one task, or the sum of all tasks so far."""

    chunks: int = 0
    bad_chunks: int = 0
    samples: int = 0
    bytes: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    """Sample id -> why training cannot use the sample."""
    not_utf8: set[int] = field(default_factory=set)
    """Ids of usable samples whose captions are not UTF-8."""

    def add(self, part: Report) -> None:
        self.chunks += part.chunks
        self.bad_chunks += part.bad_chunks
        self.samples += part.samples
        self.bytes += part.bytes
        self.bad.update(part.bad)
        self.not_utf8 |= part.not_utf8

    def reasons(self) -> dict[str, int]:
        """Kind of reason -> number of samples, most frequent first."""
        return dict(Counter(map(kind, self.bad.values())).most_common())

    def examples(self, manifest: Manifest, count: int) -> list[dict[str, Any]]:
        """The first samples of each kind of reason."""
        by_kind: dict[str, list[dict[str, Any]]] = {name: [] for name in self.reasons()}
        for id, reason in sorted(self.bad.items()):
            if len(by_kind[kind(reason)]) < count:
                by_kind[kind(reason)].append(position(manifest, id) | {"reason": reason})
        return [example for examples in by_kind.values() for example in examples]


def draw(manifest: Manifest, count: int, seed: int) -> list[int]:
    """Draw ``count`` different chunks uniformly; sorted. Raises ConfigError if there are fewer."""
    if not 0 < count <= manifest.chunks:
        raise ConfigError(f"must be 1 to {manifest.chunks}: the manifest has {manifest.chunks} chunks", value=count)
    return sorted(np.random.default_rng(seed).choice(manifest.chunks, count, replace=False).tolist())


def upper_bound(bad: int, n: int, confidence: float = CONFIDENCE) -> float:
    """One-sided Clopper-Pearson upper bound of the share of bad chunks, given ``bad`` among ``n`` drawn.

    Conservative, as the draw is without replacement. For ``bad == 0`` it is 1 - (1 - confidence)^(1/n), about 3/n.
    """
    if bad >= n:
        return 1.0
    low = bad / n
    high = 1.0
    for _ in range(60):
        p = (low + high) / 2
        if _at_most(bad, n, p) > 1 - confidence:
            low = p
            high = high
        else:
            low = low
            high = p
    return high


def _at_most(k: int, n: int, p: float) -> float:
    """P(X <= k) of a binomial X(n, p), 0 < p < 1."""
    lgamma = math.lgamma
    log_p = math.log(p)
    log_q = math.log1p(-p)
    logs = (lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) + i * log_p + (n - i) * log_q for i in range(k + 1))
    return min(1.0, math.fsum(map(math.exp, logs)))


def check(manifest: Manifest, plan: VerificationPlan, workers: int = 0) -> Generator[Report, None, None]:
    """Yield the result of each task in order of completion. ``workers``: processes; 0: run in this process.

    Closing the iterator (Ctrl-C does) ends the processes at once. Raises StorageError, PermissionDenied.
    """
    arguments = (str(manifest.folder), replace(plan, chunks=()))
    return concurrency.map_in_processes(_looker, arguments, _tasks(manifest, plan), workers, "verify")


def _looker(folder: str, plan: VerificationPlan) -> Callable[[Sequence[int]], Report]:
    manifest = Manifest.load(folder, check=False)
    reader = ChunkReader()
    return lambda chunks: look(manifest, plan, chunks, reader)


def look(manifest: Manifest, plan: VerificationPlan, chunks: Sequence[int], reader: ChunkReader) -> Report:
    """Check these chunks in this process. Samples that the manifest excludes are skipped."""
    report = Report(chunks=len(chunks))
    for j in chunks:
        ids = [id for id in manifest.chunk_ids(j) if id not in manifest.exceptions]
        if ids:
            bad, not_utf8 = _bad_samples(manifest, plan, j, ids, reader)
            report.add(Report(0, int(bool(bad)), len(ids), chunk_bytes(manifest, j), bad, not_utf8))
    return report


def planned_bytes(manifest: Manifest, plan: VerificationPlan) -> int:
    """Bytes of all chunks of a plan."""
    if len(plan.chunks) == manifest.chunks:
        return manifest.read_bytes
    return sum(chunk_bytes(manifest, j) for j in plan.chunks)


def resized(manifest: Manifest, plan: VerificationPlan) -> list[str]:
    """Local shards of a plan whose file length differs from the index: truncated, replaced or appended to."""
    read = set(manifest.keys)
    if len(plan.chunks) < manifest.chunks:
        read = {key for j in plan.chunks for key, *_ in manifest.chunk_reads(j)}
    lines = []
    for key, indexed in zip(manifest.keys, manifest.shards[:, 1].tolist(), strict=True):
        if key in read and "://" not in key:
            with suppress(OSError):  # reading the chunks reports it
                size = os.stat(key).st_size
                if size != indexed:
                    lines.append(f"{key}: {size} bytes, indexed were {indexed}")
    return lines


def _tasks(manifest: Manifest, plan: VerificationPlan) -> Iterator[list[int]]:
    step = max(1, _TASK // manifest.chunk)
    yield from (list(plan.chunks[start : start + step]) for start in range(0, len(plan.chunks), step))


def _bad_samples(
    manifest: Manifest, plan: VerificationPlan, j: int, ids: Sequence[int], reader: ChunkReader
) -> tuple[dict[int, str], set[int]]:
    """Bad samples of a chunk with their reasons, and the ids of others whose captions are not UTF-8."""
    try:
        samples = reader.read_chunk(manifest, j)
    except DataError as error:
        return dict.fromkeys(ids, _without_folders(manifest, j, error)), set()
    bad = dict[int, str]()
    not_utf8 = set[int]()
    if not plan.decode:
        ids = ()
    for id in ids:
        sample = samples[id - j * manifest.chunk]
        try:
            with noting_place(partial(place_of, manifest, id)):
                image_of(sample, "simplejpeg")  # both decoders reject the same files; this one is faster
                captions_of(sample, list(plan.captions))
        except DecodeError as error:
            bad[id] = str(error)
            continue
        if not captions_are_utf8(sample, plan.captions):
            not_utf8.add(id)
    return bad, not_utf8


def _without_folders(manifest: Manifest, j: int, error: DataError) -> str:
    """The reason without folder names: it becomes part of the digest, which must not depend on the location."""
    reason = error.what
    for key, *_ in manifest.chunk_reads(j):
        reason = reason.replace(key, os.path.basename(key))
    if reason.startswith("chunk "):
        return reason
    return f"{reason} ({os.path.basename(error.where)})"


def verify(options: argparse.Namespace) -> CommandResult:
    """Check all or some chunks; with ``--out``, write a manifest that excludes the bad samples."""
    manifest = Manifest.load(options.manifest)
    plan = VerificationPlan(_chunks(manifest, options), options.decode, captions(options, manifest, "txt,cls"))
    if options.out:
        claim(Path(options.out).absolute())
    report = Report()
    start_time = time.monotonic()
    shard_errors = {"resized_shards": resized(manifest, plan)}
    stopped_by = _run(manifest, plan, options.workers or cores(), report)
    seconds = time.monotonic() - start_time
    facts = _facts(manifest, report, len(plan.chunks), seconds, options) | shard_errors
    if isinstance(stopped_by, FlipError):
        print(_text(facts, manifest, options, "until then: "), file=sys.stderr)
        raise stopped_by
    if stopped_by:
        return CommandResult(
            facts | {"interrupted": True}, INTERRUPTED, _text(facts, manifest, options, "interrupted: ")
        )
    if options.out and report.bad:
        try:
            new = excepting(manifest, report.bad, options.out)
        except FlipError:
            print(_text(facts, manifest, options, "no manifest was written: "), file=sys.stderr)
            raise
        facts |= {"written": str(new.folder), "digest": new.digest}
    left = any(shard_errors.values()) or (report.bad and not options.out)
    return CommandResult(facts, DATA if left else COMPLETE, _text(facts, manifest, options))


def _chunks(manifest: Manifest, options: argparse.Namespace) -> range | list[int]:
    if options.sample is not None:
        return draw(manifest, max(1, round(options.sample * manifest.chunks)), options.seed)
    if options.chunks is not None:
        return draw(manifest, options.chunks, options.seed)
    return range(manifest.chunks)


def _run(
    manifest: Manifest, plan: VerificationPlan, workers: int, report: Report
) -> FlipError | KeyboardInterrupt | None:
    """Fill the report; returns the error that ended the check early, if any."""
    total = planned_bytes(manifest, plan)
    with ProgressBar("verifying", "B") as bar, closing(check(manifest, plan, min(workers, len(plan.chunks)))) as parts:
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
    facts: dict[str, Any] = {
        "manifest": str(manifest.folder),
        "chunks_checked": report.chunks,
        "chunks": manifest.chunks,
        "samples_checked": report.samples,
        "excepted_before": len(manifest.exceptions),
        "decoded": options.decode,
        "bad": len(report.bad),
        "bad_chunks": report.bad_chunks,
        "reasons": report.reasons(),
        "examples": report.examples(manifest, options.examples),
        "warnings": {CAPTION_NOT_UTF8: len(report.not_utf8)} if report.not_utf8 else {},
        "warning_examples": [position(manifest, id) for id in sorted(report.not_utf8)[: options.examples]],
        "megabytes_per_second": round(report.bytes / 1e6 / seconds, 1),
        "samples_per_second": round(report.samples / seconds, 1),
        "seconds": round(seconds, 1),
    }
    if report.chunks == planned < manifest.chunks:  # chunks are checked in order, so a part of a draw is not random
        bound = upper_bound(report.bad_chunks, report.chunks)
        facts |= {"seed": options.seed, "confidence": CONFIDENCE, "bad_share_at_most": bound}
    return facts


def _text(facts: dict[str, Any], manifest: Manifest, options: argparse.Namespace, before: str = "") -> str:
    lines = [
        f"{before}{facts['samples_checked']:,} samples in {facts['chunks_checked']:,} of {facts['chunks']:,} chunks "
        f"{'read and decoded' if facts['decoded'] else 'read'}; {facts['megabytes_per_second']:,} MB/s, "
        f"{facts['samples_per_second']:,} samples/s, {facts['seconds']:,} s; {facts['bad']:,} bad"
    ]
    for reason, count in facts["reasons"].items():
        lines.append(f"  {count:,} x {reason}")
        for example in facts["examples"]:
            if kind(example["reason"]) == reason:
                lines.append("      id {id}: {shard}, sample {ordinal}: {reason}".format(**example))
    for warning, count in facts["warnings"].items():
        lines.append(f"  warning: {count:,} x {warning}: read with replacement characters")
        lines += ["      id {id}: {shard}, sample {ordinal}".format(**example) for example in facts["warning_examples"]]
    lines += [f"  shard of a different length: {shard}" for shard in facts["resized_shards"]]
    if "bad_share_at_most" in facts:
        undecoded = ""
        if not facts["decoded"]:
            undecoded = " (images and captions were not decoded)"
        lines.append(
            f"{facts['bad_chunks']:,} of {facts['chunks_checked']:,} chunks drawn (seed {facts['seed']}) contain a bad "
            f"sample{undecoded}. At {facts['confidence']:.0%} confidence, at most "
            f"{number(100 * facts['bad_share_at_most'])} % of all chunks do (one-sided Clopper-Pearson), and at most "
            "that share of samples is bad"
        )
    if facts.get("written"):
        lines.append(f"{facts['written']}: a manifest that excludes them, digest {facts['digest']}")
    elif options.out and not before:
        lines.append("nothing to exclude: no manifest was written")
    elif facts["bad"] and not before:
        if any(reason.startswith("the shard is missing") for reason in facts["reasons"]):
            moved = command("shards", "move", _place(manifest.folder), "--to", "FOLDER", "--out", "NEW_FOLDER")
            lines.append(f"Restore the missing shards. If all shards are in another folder now: {moved}")
        again = command("shards", "verify", _place(manifest.folder), "--out", "NEW_FOLDER")
        lines.append(f"To exclude them: {again}")
    return "\n".join(lines)


def _place(folder: object) -> str:
    """The address, or the absolute path, of a manifest."""
    if is_remote(str(folder)):
        return str(folder)
    return os.path.abspath(str(folder))
