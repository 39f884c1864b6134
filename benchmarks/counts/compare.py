"""Two results side by side, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.counts.rows import Row

LONGEST = 40
"""Names that came or went are listed up to this number."""


def table(rows: Sequence[Row]) -> str:
    """One result."""
    lines = ["| row | product | lab | sum |", "|---|---|---|---|"]
    for row in rows:
        if row.lab is None:
            lines.append(f"| {row.name} | {row.value:,} | | |")
        else:
            lines.append(f"| {row.name} | {row.value:,} | {row.lab:,} | {row.total:,} |")
    return "\n".join(lines) + "\n"


def compared(before: Sequence[Row], after: Sequence[Row], revisions: tuple[str, str]) -> str:
    """The numbers of both results, then the names of the product that came and went.

    A row that one of them lacks has a dash. Where ``lab/`` is counted, too, a number reads product + lab = sum, and the
    change is that of the sum.
    """
    earlier = {row.name: row for row in before}
    later = {row.name: row for row in after}
    lines = [f"| row | before ({revisions[0]}) | after ({revisions[1]}) | change |", "|---|---|---|---|"]
    for name in {**earlier, **later}:
        lines.append(_line(name, earlier.get(name), later.get(name)))
    for name in earlier.keys() & later.keys():
        lines += _difference(earlier[name], later[name])
    return "\n".join(lines) + "\n"


def _line(name: str, before: Row | None, after: Row | None) -> str:
    if before is None or after is None:
        change = "-"
    else:
        change = f"{round(after.total - before.total, 1):+,}"
    return f"| {name} | {_value(before)} | {_value(after)} | {change} |"


def _value(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.lab is None:
        return f"{row.value:,}"
    return f"{row.value:,} + {row.lab:,} = {row.total:,}"


def _difference(before: Row, after: Row) -> list[str]:
    """A section with the names of one row that came and went; empty without any."""
    gone = sorted(set(before.names) - set(after.names))
    new = sorted(set(after.names) - set(before.names))
    if not gone and not new:
        return []
    return ["", f"## {before.name}", "", f"- gone ({len(gone)}): {_names(gone)}", f"- new ({len(new)}): {_names(new)}"]


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:LONGEST])
    if len(names) > LONGEST:
        shown += f" and {len(names) - LONGEST} more"
    return shown or "none"
