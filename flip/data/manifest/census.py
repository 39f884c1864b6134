"""Which members the samples of shards have, and how many samples have an image and a caption.

A scan counts samples by kind, independent of the members that training reads; `Completeness` evaluates the kinds. Other
members therefore need no new scan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flip.common.image_formats import EXTENSIONS
from flip.data.manifest import labels
from flip.data.manifest.labels import LabelCounts
from flip.data.manifest.tar import Sample
from flip.runs.errors import DataError

MOST = 256
"""Most kinds that are counted separately in a shard. Usual shards have a handful."""

_IMAGES = frozenset(EXTENSIONS)
_NAMED = 8
_LABEL_BYTES = 64
"""Bytes of a label that are parsed; white space around a number counts."""


class SampleKind(NamedTuple):
    """Properties that samples are counted by."""

    members: tuple[str, ...]
    """Extensions, sorted."""
    empty: tuple[str, ...] = ()
    """Extensions of empty members."""
    apart: bool = False
    """Whether another sample of the shard has the same key: the members of a sample are not adjacent."""


APPLE_DOUBLE = SampleKind(("._*",))
"""Files ``._NAME`` of a folder, whose key is the folder."""
OTHER = SampleKind(("*",))
"""All kinds of a shard beyond ``MOST``."""


@dataclass
class Census:
    """Samples of a shard by kind and by label, and members without a sample by reason."""

    kinds: Counter[SampleKind] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    labels: LabelCounts = field(default_factory=LabelCounts)

    def json(self) -> dict[str, Any]:
        kinds = [[*kind, count] for kind, count in self.kinds.items() if count]
        return {"kinds": kinds, "skipped": self.skipped, "labels": self.labels.json()}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Census:
        rows = ((SampleKind(tuple(members), tuple(empty), apart), n) for members, empty, apart, n in value["kinds"])
        return cls(Counter(dict(rows)), Counter(value["skipped"]), LabelCounts.of_json(value["labels"]))


class Counting:
    """Builds the census of a shard from its samples, in the order of the tar."""

    def __init__(self) -> None:
        self.census = Census()
        self._halves: dict[str, SampleKind] = {}
        """Samples that can be a part of another sample, by key. Valid shards have none."""

    def add(self, samples: Iterable[Sample], buffer: memoryview) -> None:
        """Add the next samples, whose members are in ``buffer``."""
        kinds = self.census.kinds
        for sample in samples:
            names = sample.members
            if labels.MEMBER in names:
                start, size = names[labels.MEMBER]
                self.census.labels.count(bytes(buffer[start : start + min(size, _LABEL_BYTES)]))
            empty = tuple(sorted(name for name, (_, size) in names.items() if not size))
            kind = SampleKind(tuple(sorted(names)), empty)
            if sample.key.endswith("/"):
                kind = APPLE_DOUBLE
            elif len(names) == 1 or _IMAGES.isdisjoint(names):
                kind = self._half(sample.key, kind)
            kinds[kind if kind in kinds or len(kinds) < MOST else OTHER] += 1

    def _half(self, key: str, kind: SampleKind) -> SampleKind:
        before = self._halves.get(key)
        kinds = self.census.kinds
        if before is None:
            self._halves[key] = kind
            return kind
        if not before.apart and kinds[before]:
            kinds[before] -= 1
            self._halves[key] = before._replace(apart=True)
            kinds[before._replace(apart=True)] += 1
        return kind._replace(apart=True)


class Incomplete(DataError):
    """Too few samples have an image and a caption. ``report``: the numbers."""

    def __init__(self, what: str, where: str, remedy: str, report: dict[str, Any]) -> None:
        super().__init__(what, where, remedy=remedy)
        self.report = report


class Completeness:
    """Counts samples that have an image and a caption.

    Args:
        captions: members that count as captions; of MEMBER:FIELD, MEMBER counts.
        least: share of complete samples below which ``check`` raises an error.
    """

    def __init__(self, captions: Sequence[str], least: float = 0.0) -> None:
        self.captions = [name.partition(":")[0].lower() for name in captions]
        self.least = least
        self.complete = 0
        self.incomplete = Counter[str]()
        """Samples by reason."""
        self.skipped = Counter[str]()
        self._others = Counter[str]()

    def add(self, census: Census) -> None:
        """Add the samples of a shard."""
        self.skipped.update(census.skipped)
        for kind, count in census.kinds.items():
            reason = self._reason(kind)
            if not reason:
                self.complete += count
            elif count:
                self.incomplete[reason] += count
                if kind not in (OTHER, APPLE_DOUBLE):
                    self._others.update({name: count for name in kind.members if name not in _IMAGES})
                    self._others = Counter(dict(self._others.most_common(MOST)))

    def _reason(self, kind: SampleKind) -> str:
        """Why samples of this kind are incomplete; empty if they are complete."""
        image = next((name for name in EXTENSIONS if name in kind.members), None)
        texts = [name for name in self.captions if name in kind.members]
        if kind == APPLE_DOUBLE:
            return "AppleDouble files"
        if kind == OTHER:
            return f"of more than {MOST} kinds in one shard"
        if image is None or not texts:
            if kind.apart:
                return "members of one sample that do not follow each other"
            if image is None:
                if texts:
                    return "caption without an image"
                return "neither image nor caption"
            return "image without a caption"
        if image in kind.empty:
            return "empty image"
        if set(texts) <= set(kind.empty):
            return "empty caption"
        return ""

    def report(self) -> dict[str, Any]:
        """The numbers, with names as in ``--json``."""
        incomplete = dict(self.incomplete.most_common())
        skipped = dict(self.skipped.most_common())
        return (
            {"complete": self.complete, "incomplete": sum(incomplete.values())}
            | ({"incomplete_by_reason": incomplete} if incomplete else {})
            | ({"skipped_members": skipped} if skipped else {})
        )

    def check(self, where: str) -> None:
        """Raise Incomplete if the share of complete samples is below ``least``."""
        total = self.complete + sum(self.incomplete.values())
        if self.complete >= self.least * total:
            return
        reasons = "; ".join(f"{count:,} x {reason}" for reason, count in self.incomplete.most_common())
        what = (
            f"{self.complete:,} of {total:,} samples have an image and a caption ({' or '.join(self.captions)}), less "
            f"than the share of --min-complete {self.least:g}: {reasons}"
        )
        remedy = f"{self._remedy()} To index them as they are: --min-complete 0. Nothing is scanned again."
        raise Incomplete(what, where, remedy, self.report())

    def _remedy(self) -> str:
        reason = self.incomplete.most_common(1)[0][0]
        if reason == self._reason(APPLE_DOUBLE):
            return "Write the shards again without these files (COPYFILE_DISABLE=1 tar ...)."
        if "follow" in reason:
            return "Write the shards again with the members of a sample one after the other (tar --sort=name)."
        if "image" in reason and "caption" not in reason or reason == "caption without an image":
            return f"Images are members named {', '.join(EXTENSIONS)}."
        others = [name for name, _ in self._others.most_common() if name not in self.captions][:_NAMED]
        present = ""
        if others:
            present = f"Members that are there: {', '.join(others)}. "
        return f"{present}Name the members that hold captions with --captions."
