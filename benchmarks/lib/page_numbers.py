"""Updates the numbers of a page in docs/ from a file of results; the page names the key of each number.

| `storage.gets_per_s` | 1,470 | what it is |       a row whose first cell is a key: the second is its value
| | `events` | `error` |                            a header with names: rows below have a cell for each of them
at 1,470 (`storage.gets_per_s`) requests            a number before a key in brackets
"""

from __future__ import annotations

import re
from typing import Any

_ROW = re.compile(r"\| `([\w.]+)` \|")
_INLINE = re.compile(r"[-\d.,]*\d \(`(\w+\.[\w.]+)`\)")


def fill(text: str, numbers: dict[str, Any]) -> str:
    """The page with the values of ``numbers``. Raises KeyError for an unknown key."""
    lines = []
    header = list[str]()
    for line in text.split("\n"):
        if not line.startswith("|"):
            header = []
        elif not header:
            header = _cells(line)
        row = _ROW.match(line)
        lines.append(
            _row(line, header, _look(numbers, row[1])) if row else _INLINE.sub(lambda m: _inline(m, numbers), line)
        )
    return "\n".join(lines)


def shown(value: float | str) -> str:
    """A number as pages write it: with commas, and no more digits than the file has."""
    if isinstance(value, str):
        return value
    if float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:,}"


def _look(numbers: dict[str, Any], key: str) -> Any:
    value: Any = numbers
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise KeyError(key)
        value = value[part]
    return value


def _row(line: str, header: list[str], value: Any) -> str:
    cells = _cells(line)
    if not isinstance(value, dict):
        cells[1] = shown(value)
    else:
        for i, name in enumerate(header):
            if name.startswith("`"):
                cells[i] = shown(value[name.strip("`")])
    return f"| {' | '.join(cells)} |"


def _inline(match: re.Match[str], numbers: dict[str, Any]) -> str:
    return f"{shown(_look(numbers, match[1]))} (`{match[1]}`)"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
