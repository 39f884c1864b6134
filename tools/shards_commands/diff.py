"""The command diff."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict

from flip.data.manifest.manifest import Manifest
from tools.shards_commands.compare import Difference, compare
from tools.shards_commands.output import Outcome

DIFFERENT = 1
"""Exit code, as diff(1) has it; errors are 65 and more."""
SHOWN = 20


def diff(options: argparse.Namespace) -> Outcome:
    """What differs between two manifests."""
    found = compare(Manifest.load(options.old), Manifest.load(options.new))
    report = {"equal": found.equal, **asdict(found)}
    for name in ("excepted", "readmitted"):  # JSON knows no numbers for names
        report[name] = [{"id": id, "reason": reason} for id, reason in sorted(report[name].items())]
    return Outcome(report, 0 if found.equal else DIFFERENT, "\n".join(_lines(found)))


def _lines(found: Difference) -> Iterator[str]:
    old, new = found.digest
    if found.equal:
        yield f"the same data set, digest {new}"
        yield from _filters(found)
        return
    yield f"digest {old} -> {new}"
    yield from _filters(found)
    for name, (before, after) in (("samples", found.samples), ("R (samples per chunk)", found.chunk)):
        yield f"{name} {before:,}" + (f" -> {after:,}" if before != after else ", the same")
    yield from _some("shards added", found.added)
    yield from _some("shards removed", found.removed)
    changed = []
    for one in found.changed:
        numbers = f"{one.samples[0]:,} -> {one.samples[1]:,} samples, {one.bytes[0]:,} -> {one.bytes[1]:,} bytes"
        changed.append(f"{one.name}: {'other bytes, the same numbers' if one.content else numbers}")
    yield from _some("shards changed", changed)
    for title, samples in (("samples excepted", found.excepted), ("samples excepted no more", found.readmitted)):
        yield from _some(title, [f"{id}: {reason}" for id, reason in sorted(samples.items())])
    if found.order_changes:
        if found.ids_stay:
            yield "Sample ids stay: what is new comes after them."
        yield "A run's order changes: global batch t names other samples. It cannot go on with the other manifest."
    elif found.changed:
        yield "A run's order stays, but some of the samples are other ones under the same ids."
    else:
        yield "A run's order stays; only the samples excepted or not are replaced or not."


def _filters(found: Difference) -> Iterator[str]:
    old, new = (", ".join(names) or "none" for names in found.filters)
    if old != new:
        yield f"filters {old} -> {new}"


def _some(title: str, entries: list[str]) -> Iterator[str]:
    if entries:
        yield f"{title}: {len(entries):,}"
        yield from (f"  {entry}" for entry in entries[:SHOWN])
        if len(entries) > SHOWN:
            yield f"  and {len(entries) - SHOWN:,} more (--json has all)"
