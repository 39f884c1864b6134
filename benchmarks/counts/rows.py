"""One counted row, and the file of all rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flip.runs.rundir import write_text


@dataclass(frozen=True)
class Row:
    """One number of the product.

    Args:
        names: what was counted, if it can be listed.
        lab: the same number of ``lab/``, if it is counted there.
        together: the number of both.
    """

    name: str
    value: float
    names: tuple[str, ...] = ()
    lab: float | None = None
    together: float | None = None

    @property
    def total(self) -> float:
        """The number of both folders, or of the product if ``lab/`` is not counted."""
        return self.value if self.together is None else self.together


def listed(name: str, names: Iterable[str]) -> Row:
    """A row that counts different names."""
    different = tuple(sorted(set(names)))
    return Row(name, len(different), different)


def with_lab(product: Sequence[Row], lab: Sequence[Row], together: Sequence[Row]) -> list[Row]:
    """The rows of the product with the numbers of ``lab/`` and of both."""
    return [
        replace(row, lab=other.value, together=both.value)
        for row, other, both in zip(product, lab, together, strict=True)
    ]


def write(rows: Sequence[Row], revision: str, path: Path) -> None:
    """Write the rows as JSON. ``revision``: of the counted code."""
    document = {"revision": revision, "rows": [asdict(row) for row in rows]}
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> tuple[str, list[Row]]:
    """(revision, rows) of a file that ``write`` has written."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(**{**record, "names": tuple(record["names"])}) for record in document["rows"]]
    return document["revision"], rows
