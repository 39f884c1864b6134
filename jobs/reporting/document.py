"""What a report is made of, whatever it is written as: texts, tables and figures, in order."""

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
    """Rows of one kind, at least one. Cells are text."""

    rows: Sequence[Mapping[str, Any]]
    trouble: Sequence[bool] = ()
    """Rows that need a look."""
    long: Sequence[str] = ()
    """Columns of sentences."""
    text: Sequence[str] = ()
    """Columns of short texts, set to the left."""


@dataclass(frozen=True)
class Figure:
    """Charts side by side that share a legend."""

    name: str
    """Of its files: letters, digits, dashes."""
    plots: Sequence[Plot]
    caption: str = ""
    names: Sequence[tuple[str, int | None]] = field(default_factory=list)
    """The legend: (name, style); style None is grey."""


Block = Text | Table | Figure


def heading(words: str) -> Text:
    return Text(words, 2)
