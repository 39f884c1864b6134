"""The command verify."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from flip.concurrency import cores
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.manifest import Manifest
from flip.runs.errors import COMPLETE, DATA, ConfigError, FlipError
from tools.shards_commands import verify_library as checks
from tools.shards_commands.manifest import excepting
from tools.shards_commands.output import Bar, Outcome, captions, claim, number
from tools.shards_commands.verify_library import Plan, Report

INTERRUPTED = 130


def verify(options: argparse.Namespace) -> Outcome:
    """Read chunks again, all or some; with --out, write a manifest that excepts what is bad."""
    if options.workers < 0:
        raise ConfigError("must not be negative", "--workers", options.workers)
    manifest = Manifest.load(options.manifest)
    plan = Plan(_chunks(manifest, options), options.decode, captions(options))
    if options.out:
        claim(Path(options.out).absolute())
    report, begin = Report(), time.monotonic()
    report.resized, report.zeros = checks.resized(manifest, plan), checks.zeros(manifest, ChunkReader())
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
        return checks.draw(manifest, max(1, round(options.sample * manifest.chunks)), options.seed)
    if options.chunks is not None:
        return checks.draw(manifest, options.chunks, options.seed)
    return range(manifest.chunks)


def _run(manifest: Manifest, plan: Plan, workers: int, report: Report) -> FlipError | KeyboardInterrupt | None:
    """Fill the report; what ended it before all was looked at. What was found by then stands in it."""
    total = checks.planned_bytes(manifest, plan)
    with Bar("verifying", "B") as bar, closing(checks.check(manifest, plan, min(workers, len(plan.chunks)))) as parts:
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
        bound = checks.upper_bound(report.bad_chunks, report.chunks)
        found |= {"seed": options.seed, "confidence": checks.CONFIDENCE, "bad_share_at_most": bound}
    return found


def _text(found: dict[str, Any], manifest: Manifest, options: argparse.Namespace, before: str = "") -> str:
    lines = [
        f"{before}{found['samples_checked']:,} samples in {found['chunks_checked']:,} of {found['chunks']:,} chunks "
        f"{'read and decoded' if found['decoded'] else 'read'}; {found['megabytes_per_second']:,} MB/s, "
        f"{found['samples_per_second']:,} samples/s, {found['seconds']:,} s; {found['bad']:,} bad"
    ]
    examples = [checks.Bad(**one) for one in found["examples"]]
    for reason, count in found["reasons"].items():
        lines.append(f"  {count:,} x {reason}")
        lines += [
            f"      id {one.id}: {one.shard}, sample {one.ordinal}: {one.reason}"
            for one in examples
            if checks.kind(one.reason) == reason
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
