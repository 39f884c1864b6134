"""How were the images of a loader decoded: by the visible-patch kernel, or as a whole, and why? No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_SHOWN = 6
"""Reasons in a log line."""

REPLACEMENT = "in place of samples that cannot be used"


@dataclass
class DecodeCounts:
    """Images so far; the counts add up over loader processes and stages."""

    by_kernel: int = 0
    """Images whose visible patches the kernel computed."""
    whole: Counter[str] = field(default_factory=Counter)
    """Reason -> images that were decoded as a whole."""
    fallbacks: Counter[str] = field(default_factory=Counter)
    """Decoder and class of its error -> images that it left to the next decoder."""

    def record(self) -> dict[str, Any]:
        """The counts as plain data, for ``from_record`` of another process."""
        return {"by_kernel": self.by_kernel, "whole": dict(self.whole), "fallbacks": dict(self.fallbacks)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> DecodeCounts:
        return cls(record["by_kernel"], Counter(record["whole"]), Counter(record["fallbacks"]))

    def __add__(self, other: DecodeCounts) -> DecodeCounts:
        by_kernel = self.by_kernel + other.by_kernel
        return DecodeCounts(by_kernel, self.whole + other.whole, self.fallbacks + other.fallbacks)

    @property
    def images(self) -> int:
        return self.by_kernel + self.whole.total()

    def vector(self) -> list[float]:
        """Images, images by the kernel, and images that a decoder left to the next: ranks add these."""
        return [self.images, self.by_kernel, self.fallbacks.total()]

    def summary(self) -> str:
        """The counts as one line, the most frequent reasons first."""
        if not self.images:
            return "no image yet"
        parts = [f"{self.by_kernel:,} of {self.images:,} images ({share_text(self.by_kernel, self.images)})"]
        if self.whole:
            parts.append(f"decoded as a whole: {reasons_text(self.whole)}")
        if self.fallbacks:
            parts.append(f"left to the next decoder after an error: {reasons_text(self.fallbacks)}")
        return "; ".join(parts)


def share_text(part: int, total: int) -> str:
    """A share in per cent that is 0 or 100 only if it is exactly that."""
    if part in (0, total):
        return f"{100 * part // max(total, 1)} %"
    return f"{min(max(100 * part / total, 0.1), 99.9):.1f} %"


def reasons_text(counts: Counter[str]) -> str:
    """Counts with their reasons, the most frequent first: "60 PNG, 2 progressive"."""
    shown = counts.most_common(_SHOWN)
    parts = [f"{number:,} {reason}" for reason, number in shown]
    rest = counts.total() - sum(number for _, number in shown)
    if rest:
        parts.append(f"{rest:,} others")
    return ", ".join(parts)
