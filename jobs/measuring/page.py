"""The page of a measurement, as blocks: one screen of verdicts, then the numbers of each row.

It names no user, path or host, so that it can be sent to others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.common.text import duration, shortened
from jobs.measuring.rows import NO_TIME
from jobs.measuring.verdicts import BROKEN, ORDER, SLOW, UNKNOWN, WORKS, MachineVerdict, judge
from jobs.pages.document import Block, Fold, Table, Text, heading
from jobs.planning.measurement import MEASURED, SKIPPED, MeasuredRow, Measurement

TITLE = "Measurement of a machine"
NOTHING = "Nothing. Plans use these numbers if the cluster profile names their file: measured: FOLDER/measured.json"
NAMED = 2
"""Rows that are named of those that were left out for the same reason; the last table has all."""
REHEARSAL = "Rehearsal: the GPU computed nothing. The rows ran, and their numbers and verdicts mean nothing."
COLUMNS = {
    "gbytes": "GB/s",
    "samples_per_second": "samples/s",
    "megabytes_per_second": "MB/s",
    "milliseconds": "ms",
    "core_gflops": "GFLOP/s a core",
    "tflops": "TFLOP/s",
    "gbps": "Gbit/s",
    "first_step_seconds": "first step, s",
    "utilisation": "share of the peak",
    "megabytes": "MB",
    "planned_megabytes": "MB, planned",
    "microseconds": "microseconds of a core",
    "short": "short side of an image, px",
    "kernel": "visible-patch kernel",
    "markers": "restart markers",
    "number": "device",
    "longest": "share of a step",
}
"""Key of a value -> head of its column."""

STEP_COLUMNS = (
    "samples_per_second", "milliseconds", "tflops", "core_gflops", "utilisation", "first_step_seconds",
    "recompilations", "megabytes", "planned_megabytes",
)  # fmt: skip


def blocks(measurement: Measurement) -> list[Block]:
    verdicts = judge(measurement)
    parts: list[Block] = [Text(TITLE, 1)]
    if measurement.rehearsal:
        parts.append(Text(REHEARSAL, tone="trouble"))
    return [
        *parts,
        Text(headline(verdicts), tone="headline"),
        *(Text(line) for line in named(verdicts)),
        *(Text(line) for line in left_out(measurement)),
        Text(described(measurement), tone="quiet"),
        *_verdict_tables(verdicts),
        *_numbers(measurement),
        _rows(measurement),
        heading("Versions"),
        Table([{"package": name, "version": version} for name, version in versions(measurement).items()]),
    ]


def headline(verdicts: Sequence[MachineVerdict]) -> str:
    """How many verdicts of each kind there are: "2 do not work, 1 is slow, 8 work"."""
    if not verdicts:
        return "no verdicts"
    counts = Counter(verdict.verdict for verdict in verdicts)
    return ", ".join(f"{counts[name]} {_plural(name, counts[name])}" for name in ORDER if counts[name])


def named(verdicts: Sequence[MachineVerdict]) -> list[str]:
    """What does not work, what is slow, and what is not measured, by name: a line each."""
    lines = []
    for kind in ORDER[:-1]:
        subjects = [verdict.about for verdict in verdicts if verdict.verdict == kind]
        if subjects:
            lines.append(f"{kind[0].upper()}{kind[1:]}: {'; '.join(subjects)}.")
    return lines


def left_out(measurement: Measurement) -> list[str]:
    """What this machine cannot show, with the reason: a line for each reason. Rows without time have a verdict."""
    reasons: dict[str, list[str]] = {}
    for row in measurement.rows:
        if row.status == SKIPPED and row.detail != NO_TIME:
            reasons.setdefault(row.detail, []).append(row.what)
    return [f"Left out ({reason}): {shortened(rows, NAMED, '; ')}." for reason, rows in reasons.items()]


def described(measurement: Measurement) -> str:
    """What was measured, and when."""
    machine = measurement.machine
    gpus = "No GPU; "
    if machine.gpus:
        gpus = f"{machine.gpus} x {machine.gpu}, driver {machine.driver}; "
    names = f" ({', '.join(measurement.names)})" if measurement.names else ""
    origin = measurement.origin[0].upper() + measurement.origin[1:]
    return (
        f"{origin}{names} in {duration(60 * measurement.minutes)}. {gpus}{machine.cores} cores of {machine.processor};"
        f" {machine.memory_gb:g} GB; {machine.platform}."
    )


def versions(measurement: Measurement) -> dict[str, str]:
    of_packages = {"python": measurement.python, **measurement.packages}
    if measurement.machine.driver:
        of_packages["driver"] = measurement.machine.driver
    return of_packages


def terminal_text(measurement: Measurement) -> str:
    """The verdicts for a terminal."""
    verdicts = judge(measurement)
    wide = max((len(verdict.about) for verdict in verdicts), default=0)
    lines = [described(measurement), ""]
    for verdict in verdicts:
        lines.append(f"{verdict.about:{wide}}  {verdict.verdict:{len(BROKEN)}}  {verdict.because}")
        if verdict.then:
            lines.append(f"{'':{wide}}  {'':{len(BROKEN)}}  -> {verdict.then}")
    return "\n".join([*lines, "", headline(verdicts)])


def _verdict_tables(verdicts: Sequence[MachineVerdict]) -> list[Block]:
    """Verdicts that ask for an action, with cause and remedy; then those that work, with their numbers."""
    parts: list[Block] = []
    acts = [each for each in verdicts if each.verdict != WORKS]
    if acts:
        rows = [
            {"what": each.about, "verdict": each.verdict, "because": each.because, "what to do": each.then or "-"}
            for each in acts
        ]
        trouble = [each.verdict in (BROKEN, SLOW) for each in acts]
        parts += [heading("What to do"), Table(rows, trouble, long=["because", "what to do"], text=["verdict"])]
    elif verdicts:
        parts += [heading("What to do"), Text(NOTHING)]
    works = [{"what": each.about, "measured": each.because} for each in verdicts if each.verdict == WORKS]
    if works:
        parts += [heading("What works"), Table(works, long=["measured"])]
    return parts


def _numbers(measurement: Measurement) -> list[Block]:
    """A table per measured row; steps together."""
    parts: list[Block] = []
    steps = measurement.kind("step")
    if steps:
        rows = [{"step": row.what, **_cells(row.values, STEP_COLUMNS)} for row in steps]
        parts += [heading("Training steps"), Table(rows)]
    for row in measurement.rows:
        if row.status == MEASURED and row not in steps:
            parts += [heading(row.what[0].upper() + row.what[1:]), *_tables(row)]
    return parts


def _tables(row: MeasuredRow) -> list[Block]:
    """The single values of a row, and a table for each of its lists of rows."""
    parts: list[Block] = []
    single = {key: value for key, value in row.values.items() if not isinstance(value, list | dict)}
    if single:
        parts.append(Table([{"value": _name(key), "is": _cell(value)} for key, value in single.items()], text=["is"]))
    for key, value in row.values.items():
        if isinstance(value, dict) and value:
            parts.append(Table([{"of": name, _name(key): _cell(each)} for name, each in value.items()]))
        if isinstance(value, list) and value and isinstance(value[0], dict):
            parts.append(Table([{_name(name): _cell(each) for name, each in entry.items()} for entry in value]))
    return parts


def _rows(measurement: Measurement) -> Block:
    """Where the minutes went."""
    rows = [
        {"row": row.what, "status": row.status, "s": f"{row.seconds:.1f}", "why": row.detail or "-"}
        for row in measurement.rows
    ]
    seconds = sum(row.seconds for row in measurement.rows)
    return Fold(f"{len(rows)} rows, {duration(seconds)}", [Table(rows, long=["why"], text=["status"])])


def _cells(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, str]:
    return {_name(key): _cell(values.get(key)) for key in keys}


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return str(value)


def _name(key: str) -> str:
    return COLUMNS.get(key, key.replace("_", " "))


def _plural(verdict: str, count: int) -> str:
    forms = {BROKEN: "do not work", SLOW: "are slow", UNKNOWN: "are not measured"}
    single = {SLOW: "is slow", UNKNOWN: "is not measured"}
    if count == 1:
        return single.get(verdict, verdict)
    return forms.get(verdict, "work")
