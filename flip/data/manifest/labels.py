"""Class labels of a data set: how they are read, counted by the index, and compared with the number of class names.

The settings of a manifest hold the counts, so that a plan compares them without reading a shard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flip.data.manifest.manifest import Manifest

MEMBER = "cls"
"""The member with the label of a sample."""
MOST = 1 << 16
"""Most different labels that are counted."""
LARGEST = 1 << 31
REMEDY = "Name the classes of this data set: evaluate.sets.NAME.classes, or --classes."


def parse_label(data: bytes) -> int | None:
    """The label that a member states; None if it is not a whole number from 0 on."""
    try:
        label = int(data)
    except ValueError:
        return None
    if 0 <= label < LARGEST:
        return label
    return None


@dataclass
class LabelCounts:
    """Samples by label. ``known``: whether every sample was counted."""

    counts: Counter[int] = field(default_factory=Counter)
    unusable: int = 0
    """Samples whose label is not a whole number."""
    known: bool = True

    def count(self, data: bytes) -> None:
        """Count the label of a sample."""
        label = parse_label(data)
        if label is None:
            self.unusable += 1
        else:
            self.counts[label] += 1
            self._limit()

    def add(self, other: LabelCounts) -> None:
        """Add the samples of another part of the data set."""
        self.counts.update(other.counts)
        self.unusable += other.unusable
        self.known = self.known and other.known
        self._limit()

    def _limit(self) -> None:
        if len(self.counts) > MOST:
            self.known = False
        if not self.known:
            self.counts.clear()

    def json(self) -> dict[str, Any] | None:
        """The counts as JSON; None if they are not known."""
        if not self.known:
            return None
        return {"counts": {str(label): self.counts[label] for label in sorted(self.counts)}, "unusable": self.unusable}

    @classmethod
    def of_json(cls, value: Mapping[str, Any] | None) -> LabelCounts:
        """The inverse of ``json``, also of damaged values, which count as not known."""
        try:
            if value is not None:
                counts = {int(label): int(number) for label, number in value["counts"].items()}
                return cls(Counter(counts), int(value["unusable"]))
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        return cls(known=False)

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> LabelCounts:
        """The counts in a manifest's settings. Not known if samples are excluded, because the counts include them."""
        return cls.of_json(None if manifest.exceptions else manifest.settings.get("labels"))

    def defect(self, samples: int, classes: int) -> str:
        """Why the labels of ``samples`` samples do not fit the numbers 0 .. ``classes`` - 1; empty if they do."""
        outside = {label: number for label, number in self.counts.items() if label >= classes}
        without = samples - self.counts.total() - self.unusable
        if outside:
            if classes == 1:
                names = "1 class name"
            else:
                names = f"{classes:,} class names"
            number = sum(outside.values())
            return f"{number:,} of {samples:,} labels have no class name: the largest is {max(outside)}, with {names}"
        if self.unusable:
            return f"{self.unusable:,} of {samples:,} labels are not whole numbers from 0 on"
        if without > 0:
            return f"{without:,} of {samples:,} samples have no label"
        return ""


def defect_of(manifest: Manifest, classes: int) -> str:
    """``LabelCounts.defect`` by the counts of a manifest; empty also if it has none: its samples are not read."""
    counts = LabelCounts.of_manifest(manifest)
    if counts.known:
        return counts.defect(manifest.samples, classes)
    return ""
