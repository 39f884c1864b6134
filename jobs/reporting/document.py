"""Blocks of a report, independent of its format: texts, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.reporting.charts import Plot


@dataclass(frozen=True)
class Text:
    """A heading (``level`` 1, 2) or a paragraph (0). ``tone``: quiet, note, or trouble."""

    words: str
    level: int = 0
    tone: str = ""


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


@dataclass(frozen=True)
class Figure:
    """Charts side by side that share a legend."""

    name: str
    """Stem of its files: letters, digits, dashes."""
    plots: Sequence[Plot]
    caption: str = ""
    names: Sequence[tuple[str, int | None]] = field(default_factory=list)
    """The legend: (name, style); style None is grey."""


Block = Text | Table | Figure


def heading(words: str) -> Text:
    return Text(words, 2)
