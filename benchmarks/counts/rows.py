"""One counted row, and the file of all rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flip.runs.rundir import write_text


@dataclass(frozen=True)
class Row:
    """One number. ``names``: what was counted, if it can be listed."""

    name: str
    value: float
    names: tuple[str, ...] = ()


def listed(name: str, names: Iterable[str]) -> Row:
    """A row that counts different names."""
    different = tuple(sorted(set(names)))
    return Row(name, len(different), different)


def write(rows: Sequence[Row], revision: str, path: Path) -> None:
    """Write the rows as JSON. ``revision``: of the counted code."""
    records = [{"name": row.name, "value": row.value, "names": list(row.names)} for row in rows]
    document = {"revision": revision, "rows": records}
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> tuple[str, list[Row]]:
    """(revision, rows) of a file that ``write`` has written."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows = [Row(record["name"], record["value"], tuple(record["names"])) for record in document["rows"]]
    return document["revision"], rows
