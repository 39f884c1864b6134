"""`shards diff`: how two manifests differ, and whether a run can continue with the other one.

`compare` computes the difference, `diff` is the command. Exit code 1 means different, as for diff(1).
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from flip.data.manifest.manifest import ChunkTable, Manifest
from tools.shards_commands.output import CommandResult

DIFFERENT = 1
"""Exit code if the manifests differ, as for diff(1). Errors have codes of 65 and more."""
SHOWN = 20

Shards = dict[str, tuple[int, int]]
"""Name -> (samples, bytes of the file), in the manifest's order."""


@dataclass(frozen=True)
class ChangedShard:
    """A shard that is in both manifests, with different numbers or different bytes."""

    name: str
    samples: tuple[int, int]
    bytes: tuple[int, int]
    content: bool = False
    """The numbers are equal, but the CRC of a chunk of this shard differs."""


@dataclass(frozen=True)
class ManifestDifference:
    """What differs from an old to a new manifest; pairs are (old, new)."""

    equal: bool
    """Whether both are the same data set, regardless of location."""
    digest: tuple[str, str]
    chunk: tuple[int, int]
    samples: tuple[int, int]
    added: list[str]
    removed: list[str]
    changed: list[ChangedShard]
    excepted: dict[int, str]
    """Samples that only the new manifest excludes: id -> reason."""
    readmitted: dict[int, str]
    """Samples that only the old manifest excludes."""
    filters: tuple[list[str], list[str]]
    """Filters given when the shards were indexed."""
    order_changes: bool
    """Whether global batch t of a run would contain other samples."""
    ids_stay: bool
    """Whether each sample of the old manifest has the same id in the new one."""


def compare(old: Manifest, new: Manifest) -> ManifestDifference:
    """The difference from ``old`` to ``new``.

    Shards are matched by position if the manifests differ in nothing but paths and exceptions, else by key if any key
    is in both, else by the part of the key below the folder that all shards of a manifest share.
    """
    same_place = bool(set(old.keys) & set(new.keys))
    before = shards(old, same_place)
    if _same_samples(old, new):
        after = before
    else:
        after = shards(new, same_place)
    rewritten = _rewritten(old, new, list(before))
    changed = [
        ChangedShard(
            name, (before[name][0], after[name][0]), (before[name][1], after[name][1]), before[name] == after[name]
        )
        for name in before
        if name in after and (before[name] != after[name] or name in rewritten)
    ]
    old_counts, new_counts = ([(name, count) for name, (count, _) in side.items()] for side in (before, after))
    same_filter = _same_filter(old, new)
    return ManifestDifference(
        equal=old.digest == new.digest,
        digest=(old.digest, new.digest),
        chunk=(old.chunk, new.chunk),
        samples=(old.samples, new.samples),
        added=[name for name in after if name not in before],
        removed=[name for name in before if name not in after],
        changed=changed,
        excepted={id: reason for id, reason in new.exceptions.items() if id not in old.exceptions},
        readmitted={id: reason for id, reason in old.exceptions.items() if id not in new.exceptions},
        filters=(old.settings.get("filters", []), new.settings.get("filters", [])),
        order_changes=old_counts != new_counts or old.chunk != new.chunk or not same_filter,
        ids_stay=old_counts == new_counts[: len(old_counts)] and same_filter,
    )


def _same_samples(old: Manifest, new: Manifest) -> bool:
    """Whether all samples and chunks are the same, wherever the shards are."""
    tables: list[tuple[Any, Any]] = [
        (old.shards, new.shards), (old.offsets, new.offsets), (old.checksums, new.checksums),
    ]  # fmt: skip
    same = old.chunk == new.chunk and all(np.array_equal(a, b) for a, b in tables)
    return same and _same_filter(old, new)


def _same_filter(old: ChunkTable, new: ChunkTable) -> bool:
    """Whether filters keep the same samples of the shards."""
    if old.sample_filter is None or new.sample_filter is None:
        return old.sample_filter is new.sample_filter
    counts = np.array_equal(old.sample_filter.tars[:, 0], new.sample_filter.tars[:, 0])
    return counts and np.array_equal(old.sample_filter.bits, new.sample_filter.bits)


def shards(table: ChunkTable, full_keys: bool) -> Shards:
    """Shards by name."""
    if full_keys:
        names = table.keys
    else:
        names = below_common(table.keys)
    return {name: (int(row[0]), int(row[1])) for name, row in zip(names, table.shards, strict=True)}


def below_common(keys: Sequence[str]) -> list[str]:
    """Keys without their common leading folders."""
    parts = [key.split("/") for key in keys]
    depth = 0
    while all(len(part) > depth + 1 and part[depth] == parts[0][depth] for part in parts):
        depth += 1
    return ["/".join(part[depth:]) for part in parts]


def _rewritten(old: Manifest, new: Manifest, names: Sequence[str]) -> set[str]:
    """Names of shards whose chunks have a different CRC; empty unless ``new`` begins with all samples of ``old``."""
    tables: list[tuple[Any, Any]] = [(old.shards, new.shards), (old.offsets, new.offsets)]
    if old.chunk != new.chunk or not all(np.array_equal(a, b[: len(a)]) for a, b in tables):
        return set()
    name_of = dict(zip(old.keys, names, strict=True))
    if old.samples == new.samples:
        same = old.chunks
    else:
        same = old.samples // old.chunk
    chunks = np.flatnonzero(np.asarray(old.checksums[:same]) != np.asarray(new.checksums[:same])).tolist()
    readers = [{name_of[key] for key, *_ in old.chunk_reads(j)} for j in chunks]
    rewritten = set[str]().union(*(names for names in readers if len(names) == 1))
    for several in readers:  # a chunk of several shards: any of them, unless a rewritten one explains it
        if not several & rewritten:
            rewritten |= several
    return rewritten


def diff(options: argparse.Namespace) -> CommandResult:
    """Compare two manifests."""
    difference = compare(Manifest.load(options.old), Manifest.load(options.new))
    report = asdict(difference)
    for name in ("excepted", "readmitted"):  # JSON has no numbers as keys
        report[name] = [{"id": id, "reason": reason} for id, reason in sorted(report[name].items())]
    return CommandResult(report, 0 if difference.equal else DIFFERENT, "\n".join(_lines(difference)))


def _lines(difference: ManifestDifference) -> Iterator[str]:
    old, new = difference.digest
    yield f"the same data set, digest {new}" if difference.equal else f"digest {old} -> {new}"
    before, after = (", ".join(names) or "none" for names in difference.filters)
    if before != after:
        yield f"filters {before} -> {after}"
    if difference.equal:
        return
    for name, (a, b) in (("samples", difference.samples), ("R (samples per chunk)", difference.chunk)):
        yield f"{name} {a:,}" + (f" -> {b:,}" if a != b else ", the same")
    changed = [
        f"{shard.name}: "
        + (
            "other bytes, the same numbers"
            if shard.content
            else "{:,} -> {:,} samples, {:,} -> {:,} bytes".format(*shard.samples, *shard.bytes)
        )
        for shard in difference.changed
    ]
    excepted, readmitted = (
        [f"{id}: {reason}" for id, reason in sorted(samples.items())]
        for samples in (difference.excepted, difference.readmitted)
    )
    yield from _section("shards added", difference.added)
    yield from _section("shards removed", difference.removed)
    yield from _section("shards changed", changed)
    yield from _section("samples excluded", excepted)
    yield from _section("samples no longer excluded", readmitted)
    if difference.order_changes:
        if difference.ids_stay:
            yield "Sample ids do not change" + (": new samples come after the old ones." if difference.added else ".")
        yield "The sample order of a run changes, so a run cannot continue with the other manifest."
    elif difference.changed:
        yield "The sample order of a run stays the same, but some ids name different samples."
    else:
        yield "The sample order of a run stays the same; only replacements of excluded samples differ."


def _section(title: str, entries: list[str]) -> Iterator[str]:
    if entries:
        yield f"{title}: {len(entries):,}"
        yield from (f"  {entry}" for entry in entries[:SHOWN])
        if len(entries) > SHOWN:
            yield f"  and {len(entries) - SHOWN:,} more (--json has all)"
