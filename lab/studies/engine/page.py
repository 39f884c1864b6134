"""Writes the page of a study, its figures and further files; blocks that several studies have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from flip.files.creation import output_folder
from flip.runs.rundir import write_text
from jobs.common.text import percent, table
from jobs.pages import charts
from jobs.pages.chart_files import files
from jobs.pages.document import Block, Figure, Table, Text, heading
from jobs.pages.markdown import markdown
from lab.studies.engine.results import Results
from lab.studies.engine.study import Study

CORES = 2
"""Of the machine for which plans state hours."""


def write(docs: Path, study: Study, results: Results) -> list[Path]:
    """Write NAME.md, and figures and further files in NAME/; returns the paths. Raises OSError."""
    blocks = study.sections(results)
    figures = [block for block in blocks if isinstance(block, Figure)]
    content = {f"{file}.svg": charts.svg(plot) for figure in figures for file, plot in files(figure)}
    content |= study.files(results)
    output_folder(results.folder)
    for file, text in content.items():
        write_text(results.folder / file, text)
    page = docs / f"{study.name}.md"
    write_text(page, f"{study.head}\n\n{markdown(blocks, study.name)}")
    return [page, *(results.folder / file for file in content)]


def plan(results: Results) -> str:
    """The runs without a result, with samples and core-hours, as text. It has every run that may be asked for."""
    study = results.study
    missing = [run for run in results.missing() if run.name not in results.records]
    if not missing:
        return "no run is missing"
    hours = [study.cost(run, results.times) / 3600 for run in missing]
    rows = [
        {
            "run": f"{run.sweep}/{run.name}",
            "samples": f"{study.samples(run, results.times):,}",
            "core-hours": f"{h:.2f}",
        }
        for run, h in zip(missing, hours, strict=True)
    ]
    total = f"total: {sum(hours) / CORES:.1f} hours of {CORES} cores, start-up and evaluation not counted"
    return f"{table(rows)}\n{total}"


def paragraphs(text: str) -> list[Block]:
    return [Text(" ".join(paragraph.split())) for paragraph in text.split("\n\n")]


def section(title: str, columns: str, lines: Iterable[Sequence[str]], note: str = "", text: str = "") -> list[Block]:
    """A heading, a table and a note; nothing without lines. ``columns``, and those with text, are separated by |."""
    cells = [dict(zip(columns.split("|"), line, strict=True)) for line in lines]
    if cells:
        return [heading(title, 3), Table(cells, text=text.split("|")), *([Text(note)] if note else [])]
    return []


def rates_table(
    results: Results, columns: Sequence[str], arms: Iterable[tuple[Sequence[str], str]]
) -> list[dict[str, str]]:
    """Validation scores of the trials. ``arms``: cells of the first columns, and name of the learning rates.

    A choice is marked if it is at the edge of the tried range, and if the trials of this study would choose another.
    Losses are shown if trials have them.
    """
    rows = []
    for cells, rates in arms:
        tried = results.tried(rates)
        chosen = results.peaks.get(rates)
        shown = "-"
        if chosen is not None:
            shown = f"{chosen:g}"
            if chosen in (tried[0], tried[-1]):
                shown += " (at the edge of the range)"
            best = results.best(rates)
            if best not in (None, chosen):
                shown += f" (these trials: {best:g})"
        scores = sorted(results.trials[rates].items())
        values = ", ".join(f"{peak:g}: {percent(value)}" for peak, value in scores) or "-"
        row = dict(zip(columns, cells, strict=True))
        if any(results.losses.values()):
            losses = [f"{peak:g}: {value:.3f}" for peak, value in sorted(results.losses[rates].items())]
            row["validation loss, by peak lr"] = ", ".join(losses) or "-"
        rows.append(row | {"validation top-1, %, by peak lr": values, "chosen": shown})
    return rows


def interval(value: float, low: float, high: float) -> str:
    """A difference in points, and its interval in brackets."""
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"
