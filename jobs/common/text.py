"""Aligned tables, and numbers, sizes and durations as text."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], indent: str = "") -> str:
    """Rows (column -> value) as aligned text: numbers to the right, other cells to the left, None as a dash."""
    _, lines, right = cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)]
        for line in lines
    )
    return "\n".join((indent + "  ".join(line)).rstrip() for line in padded)


def cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]], list[bool]]:
    """The cells of a table as escaped text.

    Returns the names of the columns, the lines (the first has the names), and for each column whether it holds numbers.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [["-" if row.get(c) is None else plain(str(row[c])) for c in columns] for row in rows]
    right = [any(_numeric(line[i]) for line in lines) for i in range(len(columns))]
    return columns, [list(columns), *lines], right


def plain(text: str) -> str:
    """Text with escapes for everything that is not printable, such as control characters of a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def plain_lines(text: str) -> str:
    """``plain`` for each line."""
    return "\n".join(map(plain, text.split("\n")))


def without_middle(text: str, width: int) -> str:
    """The text in at most ``width`` characters: beginning and end if it is longer.

    Names of runs often differ in their last characters.
    """
    end = (width - 1) // 2
    if len(text) <= width or not end:
        return text
    return f"{text[: width - 1 - end]}…{text[-end:]}"


def formatted(value: float | None, form: str) -> str | None:
    """A number by a format specification such as ``.3f``; None for None, which tables show as ``-``."""
    if value is None:
        return None
    return format(value, form)


def count(number: float | None) -> str:
    """A number of things: 950, 12,800, 413 M, 12.8 B, 5.1e20; - for None."""
    if number is None:
        return "-"
    if number >= 1e15:
        return f"{number:.3g}".replace("e+", "e")
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= scale:
            return f"{number / scale:.4g} {unit}"
    return f"{number:,.0f}"


def size(number: float | None) -> str:
    """Bytes in powers of 1000: 1.5 GB; - for None."""
    if number is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(number) < 999.5 or unit == "TB":
            break
        number /= 1000
    return f"{_three_digits(number)} {unit}"


def inherited_text(folder: Mapping[str, Any], takes_over: bool = False) -> str:
    """A remote folder with checkpoints that a run has inherited, in words. ``folder``: as --json prints it."""
    what = f"{counted(folder['commits'], 'checkpoint')} ({size(folder['bytes'])}) in {folder['address']}"
    by = "written before this run directory was copied, renamed or moved"
    if not folder["can_be_taken"]:
        return f"{what}, outside of its remote folder: it reads them and never deletes them"
    if takes_over:
        return f"{what}, {by}: it takes them over and deletes them as retention allows"
    reads = "it reads them and never deletes them"
    return f"{what}, {by}: {reads}. If no other run directory needs them, submit it with --take-over"


def duration(seconds: float | None) -> str:
    """75 -> 1 min 15 s; - for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        if minutes:
            return f"{minutes} min {rest:02d} s"
        return f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def hours_text(number: float | None) -> str:
    """Hours: 0.012, 1.25, 12.3, 1,790; - for None."""
    if number is None:
        return "-"
    return _three_digits(number)


def counted(number: float, noun: str) -> str:
    """A whole number of things: "1 minute", "78 minutes", "2,040 runs"; ``noun``: in the singular."""
    rounded = f"{number:,.0f}"
    if rounded == "1":
        return f"1 {noun}"
    return f"{rounded} {noun}s"


def shortened(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first ``most`` names, and the number of the others: "a, b and 3 more"."""
    text = separator.join(names[:most])
    if len(names) <= most:
        return text
    return f"{text} and {len(names) - most} more"


def level_percent(share: float) -> str:
    """A level such as that of chance, which may be tiny: 12.5 %, 0.0853 %."""
    return f"{100 * share:.3g} %"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in per cent, without the sign: 0.123 -> 12.3; - for None."""
    if share is None:
        return "-"
    return f"{100 * share:.{digits}f}"


def _three_digits(number: float) -> str:
    """Three significant digits; whole numbers from 1,000 on."""
    if abs(number) < 999.5:  # .3g would round more to 1e+03
        return f"{number:,.3g}"
    return f"{number:,.0f}"


def _numeric(text: str) -> bool:
    """Whether a cell starts like a number."""
    return text[:1].isdigit() or (text[:1] in "-+." and text[1:2].isdigit())
