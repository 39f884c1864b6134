"""Two measurements side by side: machines, versions, verdicts, and each number that both have or one lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jobs.measuring.page import described, versions
from jobs.measuring.verdicts import judge
from jobs.pages.document import Block, Table, Text, heading
from jobs.planning.measurement import MeasuredRow, Measurement

DIFFERENT = 0.1
"""Relative difference of two numbers that is highlighted."""
SPEEDS = ("per_second", "bf16", "fp16", "fp32", "tflops", "gflops", "gbps", "gbytes", "utilisation")
"""Ends of the keys of numbers of which more is better; of all other compared ones less is."""
COSTS = ("seconds", "milliseconds", "microseconds", "megabytes", "recompilations")


def blocks(first: Measurement, second: Measurement, names: Sequence[str] = ("A", "B")) -> list[Block]:
    a, b = names
    parts: list[Block] = [Text("Two measurements", 1)]
    parts += [
        Text(f"{name}: {described(each)}", tone="quiet") for name, each in zip(names, (first, second), strict=True)
    ]
    changed = list(_changed_versions(first, second))
    if changed:
        rows = [{"version of": name, a: before or "-", b: after or "-"} for name, before, after in changed]
        parts += [heading("Versions that differ"), Table(rows, text=[a, b])]
    verdicts = list(_changed_verdicts(first, second))
    if verdicts:
        rows = [{"what": subject, a: before, b: after} for subject, before, after in verdicts]
        parts += [heading("Verdicts that differ"), Table(rows, text=[a, b])]
    return [*parts, heading("Numbers"), _numbers(first, second, a, b)]


def numbers(row: MeasuredRow) -> dict[str, float]:
    """The numbers of a row that can be compared, by their names; those of its lists too."""
    return dict(_flat(row.values, ""))


def differences(first: Measurement, second: Measurement) -> list[tuple[str, str, float | None, float | None]]:
    """(row, number, first, second) of all rows; None where a measurement lacks it."""
    rows = []
    for name in dict.fromkeys(row.name for row in (*first.rows, *second.rows)):
        before, after = (each.row(name) for each in (first, second))
        left = numbers(before) if before else {}
        right = numbers(after) if after else {}
        rows += [(name, key, left.get(key), right.get(key)) for key in dict.fromkeys((*left, *right))]
    return rows


def is_worse(key: str, before: float, after: float) -> bool:
    """Whether the second number is worse than the first one by more than DIFFERENT."""
    if is_speed(key):
        return after < (1 - DIFFERENT) * before
    return after > (1 + DIFFERENT) * before


def is_speed(key: str) -> bool:
    """Whether more is better."""
    return key.split(" ")[-1].endswith(SPEEDS)


def _numbers(first: Measurement, second: Measurement, a: str, b: str) -> Block:
    rows = []
    trouble = []
    for name, key, before, after in differences(first, second):
        ratio = "-"
        worse = False
        if before and after:
            ratio = f"{after / before:.2f}"
            worse = is_worse(key, before, after)
        rows.append(
            {"row": name, "number": key.replace("_", " "), a: _cell(before), b: _cell(after), f"{b} / {a}": ratio}
        )
        trouble.append(worse)
    if not rows:
        return Text("Neither has a measured row.", tone="note")
    return Table(rows, trouble, text=["number"])


def _changed_versions(first: Measurement, second: Measurement) -> Iterator[tuple[str, str, str]]:
    before, after = (_known(each) for each in (first, second))
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            yield name, before.get(name, ""), after.get(name, "")


def _known(measurement: Measurement) -> dict[str, str]:
    machine = measurement.machine
    return {
        "GPU": machine.gpu,
        "processor": machine.processor,
        "platform": machine.platform,
        "nodes": str(measurement.nodes),
        **versions(measurement),
    }


def _changed_verdicts(first: Measurement, second: Measurement) -> Iterator[tuple[str, str, str]]:
    before, after = ({each.about: each.verdict for each in judge(measured)} for measured in (first, second))
    for subject in dict.fromkeys((*before, *after)):
        if before.get(subject) != after.get(subject):
            yield subject, before.get(subject, "-"), after.get(subject, "-")


def _flat(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path} {key}".strip())
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{path} {_label(inner, number)}".strip())
    elif (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and path.split(" ")[-1].endswith((*SPEEDS, *COSTS))
    ):
        yield path, float(value)


def _label(entry: Any, number: int) -> str:
    """What tells an entry of a list from the others: "all-reduce 1048576", "0.5 kernel"."""
    if not isinstance(entry, dict):
        return str(number)
    words = [str(entry[key]) for key in ("kind", "bytes", "short", "mask", "number", "stage") if key in entry]
    return " ".join(words + ["kernel"] * bool(entry.get("kernel"))) or str(number)


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}"
