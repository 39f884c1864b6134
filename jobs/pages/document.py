"""Blocks of a report, independent of its format: texts, tables, figures, images, and folded parts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.pages.charts import Plot


@dataclass(frozen=True)
class Text:
    """A heading (``level`` 1 to 3) or a paragraph (0). ``tone``: headline, quiet, note, or trouble."""

    text: str
    level: int = 0
    tone: str = ""
    anchor: str = ""
    """Of a heading: the target of links to it, by default made of its text."""


@dataclass(frozen=True)
class Table:
    """Rows with the same keys, at least one. Cells are text."""

    rows: Sequence[Mapping[str, Any]]
    trouble: Sequence[bool] = ()
    """Rows to highlight."""
    long: Sequence[str] = ()
    """Columns with sentences."""
    text: Sequence[str] = ()
    """Columns with short texts, aligned to the left."""
    best: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Column -> rows with its best value."""
    links: Sequence[str] = ()
    """Per row the anchor to which its first cell links; empty: no link."""


@dataclass(frozen=True)
class Figure:
    """Charts side by side."""

    name: str
    """Stem of its files: letters, digits, dashes."""
    plots: Sequence[Plot]
    caption: str = ""


@dataclass(frozen=True)
class CaptionedImage:
    """A test image with its nearest captions, best first."""

    name: str
    label: str
    """The right caption."""
    captions: Sequence[tuple[str, float]]
    """(caption, score)."""
    jpeg: bytes = b""
    """Empty: it cannot be shown."""

    @property
    def is_right(self) -> bool:
        nearest, _ = self.captions[0]
        return nearest == self.label

    @property
    def verdict(self) -> str:
        if self.is_right:
            return "right"
        return f"wrong, label: {self.label}"


@dataclass(frozen=True)
class CaptionedImages:
    items: Sequence[CaptionedImage]


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when the reader asks for them."""

    summary: str
    blocks: Sequence[Block]


Block = Text | Table | Figure | CaptionedImages | Fold


def anchor(text: str) -> str:
    """The target of links to a heading: letters, digits and dashes."""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-") or "-"


def heading(text: str, level: int = 2, anchor: str = "") -> Text:
    return Text(text, level, anchor=anchor)
