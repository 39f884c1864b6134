"""Outcomes of runs, and short forms of a report: rows for JSON and CSV, and text for a terminal.

The blocks of the page and of the Markdown report come from ``jobs.reporting.report``.
"""

import csv
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flip.monitoring.results import Outcome, differing, read_run, row, set_roles
from flip.runs.rundir import RunDir
from jobs.common.terminal import Page, TextTable
from jobs.reporting import axes, paper_comparison, ranking, seed_groups
from jobs.reporting.report import damage, result_cells, varying_throughput
from jobs.reporting.seed_groups import by_sweep_order
from jobs.submitted_runs.clusters import states


def outcomes(runs: Sequence[RunDir]) -> list[Outcome]:
    """Outcomes of the runs in the order of their sweep, with states from their cluster."""
    state_by_run = states(runs)
    results = [read_run(run.path, state_by_run[run.path]) for run in runs]
    with ThreadPoolExecutor(2) as pool:  # reading metric lines releases the GIL
        list(pool.map(lambda outcome: outcome.metrics, results))
    return by_sweep_order(results)


def rows(results: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One flat mapping per run (``flip.monitoring.results.row``), all with the same keys.

    A run with published numbers also has ``paper.row``, and for each test ``paper.SET.top1`` (0..1) and
    ``.comparable``: yes, or why not.
    """
    settings = differing(outcome.settings for outcome in results)
    roles = set_roles(results)
    table_rows = [row(outcome, settings, roles) for outcome in results]
    published_of = {
        id(outcome): group.published
        for group in seed_groups.group_by_seed(results)
        for outcome in group.outcomes
        if group.published
    }
    for outcome, each in zip(results, table_rows, strict=True):
        if (published := published_of.get(id(outcome))) is None:
            continue
        each["paper.row"] = published.row
        for name, number in published.top1.items():
            why = "; ".join(paper_comparison.obstacles(published, [outcome], name))
            each |= {f"paper.{name}.top1": number / 100, f"paper.{name}.comparable": why or "yes"}
    keys = dict.fromkeys(key for each in table_rows for key in each)
    return [{key: each.get(key) for key in keys} for each in table_rows]


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writerow({key: _cell(key) for key in rows[0]})
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    """The value; text that a spreadsheet would take for a formula gets an apostrophe."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return value


def terminal_page(results: Sequence[Outcome], table_: str = "") -> Page:
    """Results by seed group, comparison with the paper, notes, and reasons of runs that are not complete."""
    grouped = axes.in_order(seed_groups.group_by_seed(results))
    unit = seed_groups.hours_unit(grouped)
    drop = ["attempts", "samples", "FLOPs", unit, "scored in", "samples/s", "training", "seeds", "done", "mask"]
    drop += [axis.name for axis in axes.axes(grouped)]
    lines: list[str | TextTable] = [TextTable(result_cells(grouped, results), drop=tuple(drop))]
    if any(group.complete for group in grouped):
        for headline in ranking.headlines(grouped, results):
            lines += filter(None, (headline.sentence, headline.explanation))
        lines.append(
            "scores: per cent, top-1 unless a column names another metric; in brackets the 95 % interval, of several"
            " seeds the range; scored in fp32 unless a column says otherwise"
        )
        lines.append(f"samples/s, training, {unit}: {seed_groups.COUNTED}")
        lines += filter(None, (seed_groups.seeds_caution(grouped), varying_throughput(results)))
    if compared := paper_comparison.compare(grouped, results, table_):
        compared_rows = paper_comparison.cells(compared)
        lines += ["", TextTable(compared_rows, {"why": 12}, ("why", "run", "verdict")), ""]
    for outcome in results:
        if outcome.state != "complete":
            why = ""
            if outcome.reason:
                why = f": {outcome.reason}"
            lines.append(f"{outcome.run.name} is {outcome.state}{why}")
    return Page(*lines, *damage(results))
