"""`shards diff`: how two manifests differ, and whether a run can continue with the other one.

`compare` computes the difference, `diff` is the command. Exit code 1 means different, as for diff(1).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from flip.data.manifest.manifest import Manifest, Table
from tools.shards_commands.output import Outcome

DIFFERENT = 1
"""Exit code if the manifests differ, as for diff(1). Errors have codes of 65 and more."""
SHOWN = 20

Shards = dict[str, tuple[int, int]]
"""Name -> (samples, bytes of the file), in the manifest's order."""


@dataclass(frozen=True)
class Change:
    """A shard that is in both manifests, with different numbers or different bytes."""

    name: str
    samples: tuple[int, int]
    bytes: tuple[int, int]
    content: bool = False
    """The numbers are equal, but the CRC of a chunk of this shard differs."""


@dataclass(frozen=True)
class Difference:
    digest: tuple[str, str]
    chunk: tuple[int, int]
    samples: tuple[int, int]
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: list[Change] = field(default_factory=list)
    excepted: dict[int, str] = field(default_factory=dict)
    """Samples that only the new manifest excludes: id -> reason."""
    readmitted: dict[int, str] = field(default_factory=dict)
    """Samples that only the old manifest excludes."""
    filters: tuple[list[str], list[str]] = ([], [])
    """Filters given when the shards were indexed."""
    order_changes: bool = False
    """Whether global batch t of a run would contain other samples."""
    ids_stay: bool = True
    """Whether each sample of the old manifest has the same id in the new one."""

    @property
    def equal(self) -> bool:
        """Whether both are the same data set, regardless of location."""
        return self.digest[0] == self.digest[1]


def compare(old: Manifest, new: Manifest) -> Difference:
    """The difference from ``old`` to ``new``.

    Shards are matched by key if any key is in both, else by the part of the key below the folder that all shards of a
    manifest share.
    """
    same_place = bool(set(old.keys) & set(new.keys))
    before, after = shards(old, same_place), shards(new, same_place)
    touched = _touched(old, new, list(before))
    changed = [
        Change(name, (before[name][0], after[name][0]), (before[name][1], after[name][1]), before[name] == after[name])
        for name in before
        if name in after and (before[name] != after[name] or name in touched)
    ]
    layouts = [[(name, count) for name, (count, _) in one.items()] for one in (before, after)]
    return Difference(
        digest=(old.digest, new.digest),
        chunk=(old.chunk, new.chunk),
        samples=(old.samples, new.samples),
        added=[name for name in after if name not in before],
        removed=[name for name in before if name not in after],
        changed=changed,
        excepted={id: reason for id, reason in new.exceptions.items() if id not in old.exceptions},
        readmitted={id: reason for id, reason in old.exceptions.items() if id not in new.exceptions},
        filters=(old.settings.get("filters", []), new.settings.get("filters", [])),
        order_changes=layouts[0] != layouts[1] or old.chunk != new.chunk or not _same_kept(old, new),
        ids_stay=layouts[0] == layouts[1][: len(layouts[0])] and _same_kept(old, new),
    )


def _same_kept(old: Table, new: Table) -> bool:
    """Whether both keep the same positions of the tars."""
    if old.kept is None or new.kept is None:
        return old.kept is new.kept
    counts = np.array_equal(old.kept.tars[:, 0], new.kept.tars[:, 0])
    return counts and np.array_equal(old.kept.bits, new.kept.bits)


def shards(table: Table, whole_keys: bool) -> Shards:
    """Shards by name."""
    names = table.keys if whole_keys else below_common(table.keys)
    return {name: (int(row[0]), int(row[1])) for name, row in zip(names, table.shards, strict=True)}


def below_common(keys: Sequence[str]) -> list[str]:
    """Keys without their common leading folders."""
    parts = [key.split("/") for key in keys]
    depth = 0
    while all(len(one) > depth + 1 and one[depth] == parts[0][depth] for one in parts):
        depth += 1
    return ["/".join(one[depth:]) for one in parts]


def _touched(old: Manifest, new: Manifest, names: Sequence[str]) -> set[str]:
    """Names of shards whose chunks have a different CRC; empty unless ``new`` begins with all samples of ``old``."""
    tables: list[tuple[Any, Any]] = [(old.shards, new.shards), (old.offsets, new.offsets)]
    if old.chunk != new.chunk or not all(np.array_equal(a, b[: len(a)]) for a, b in tables):
        return set()
    rows = {key: name for key, name in zip(old.keys, names, strict=True)}
    same = old.chunks if old.samples == new.samples else old.samples // old.chunk
    other = np.flatnonzero(np.asarray(old.checksums[:same]) != np.asarray(new.checksums[:same])).tolist()
    readers = [{rows[key] for key, *_ in old.chunk_reads(j)} for j in other]
    found: set[str] = set().union(*(one for one in readers if len(one) == 1))
    for several in readers:  # which of its shards differs is not told: those known to do explain it
        if not several & found:
            found |= several
    return found


def diff(options: argparse.Namespace) -> Outcome:
    """Compare two manifests."""
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
