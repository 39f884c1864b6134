"""The results of runs as one self-contained HTML page: no script, nothing fetched, fit for a phone and for paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from flip.results import Attempt, Outcome, differing
from jobs import arms, goodput
from jobs.arms import Arm
from jobs.chart import Mark, Point, Series, chart, legend, thin
from jobs.report import cells
from jobs.table import count, duration, percent

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 62rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.quiet, figcaption { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; } th:first-child, td:first-child, .text { text-align: left; }
td.long { white-space: normal; min-width: 16rem; text-align: left; }
tr.trouble td:first-child { border-left: 4px solid #d55e00; }
figure { margin: 1rem 0; }
figure svg { width: 100%; min-width: 30rem; max-width: 52rem; font: 13px system-ui, sans-serif; }
svg text { fill: #333; } svg .line, svg .bar { fill: none; stroke-width: 2; } svg .line { opacity: .8; }
svg .grid { stroke: #e4e4e4; } svg .axis { stroke: #444; fill: none; }
svg .level { stroke: #777; stroke-dasharray: 3 4; }
.legend { list-style: none; padding: 0; margin: .3rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.legend svg.key { width: 34px; height: 14px; min-width: 0; vertical-align: middle; stroke-width: 2; }
.note { border-left: 4px solid #0072b2; padding: .2rem .8rem; background: #f3f7fa; }
@media print { body { max-width: none; font-size: 10pt; } figure, table, tr { break-inside: avoid; }
  .wide { overflow: visible; } figure svg { min-width: 0; max-width: 16cm; } }
"""


def page(outcomes: Sequence[Outcome]) -> str:
    """HTML of the outcomes; every text in it that came from a file is escaped."""
    about, grouped = arms.about(outcomes), arms.group(outcomes)
    folders = list(dict.fromkeys(outcome.run.sweep for outcome in outcomes))
    title = about.get("title") or about.get("name") or ", ".join(folders)
    done = sum(outcome.state == "complete" for outcome in outcomes)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(", ".join(folders))}: {done} of {len(outcomes)} runs complete</p>',
        f"<p>{escape(about['notes'])}</p>" if about.get("notes") else "",
        "<h2>Results</h2>",
        _table(cells(grouped, outcomes), [arm.state not in ("complete", "running", "queued") for arm in grouped]),
        '<p class="quiet">Accuracy is zero-shot top-1 in per cent; in brackets the 95 % interval of one run, or the'
        " range of several seeds. "
        f" Training time, hours and samples/s: {arms.COUNTED}.</p>",
        _note(grouped),
        *_accuracy(grouped, outcomes),
        *_loss(grouped),
        *_differences(outcomes),
        *_attempts(outcomes),
        *_goodput(outcomes),
    ]
    return _document(title, [part for part in parts if part])


def _document(title: str, parts: Sequence[str]) -> str:
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
    )
    return head + "\n".join(parts) + "\n</body>\n</html>\n"


def _note(grouped: Sequence[Arm]) -> str:
    words = arms.verdict(grouped) if any(arm.complete for arm in grouped) else "No run is complete yet."
    return f'<p class="note">{escape(words)}</p>' if words else ""


def _table(rows: Sequence[Mapping[str, Any]], trouble: Sequence[bool] = (), long: Sequence[str] = ()) -> str:
    """An HTML table; rows in ``trouble`` are marked, columns in ``long`` may wrap."""
    heads = list(rows[0])
    lines = ["<tr>" + "".join(f"<th{_kind(head, long)}>{escape(head)}</th>" for head in heads) + "</tr>"]
    for i, row in enumerate(rows):
        marked = ' class="trouble"' if i < len(trouble) and trouble[i] else ""
        columns = "".join(f"<td{_kind(head, long)}>{escape(str(row[head]))}</td>" for head in heads)
        lines.append(f"<tr{marked}>{columns}</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _kind(head: str, long: Sequence[str]) -> str:
    return ' class="long"' if head in long else ""


# -- figures -----------------------------------------------------------------------------------------------------------


def _accuracy(grouped: Sequence[Arm], outcomes: Sequence[Outcome]) -> list[str]:
    """One figure per test set, with the validation curves in each; one of those alone where nothing is tested yet."""
    roles = arms.sets(outcomes)
    validation = next((name for name, role in roles.items() if role == "validation"), "")
    tests = [name for name, role in roles.items() if role == "test" and any(arm.score(name) for arm in grouped)]
    seconds = [s for outcome in outcomes if (s := outcome.progress["seconds"]) is not None]
    scale, unit = _time(max(seconds, default=0.0))
    parts = ["<h2>Accuracy against training time</h2>"] if roles else []
    for test in tests or ([""] if validation else []):
        series = [
            Series(
                arm.name,
                [line for o in arm.outcomes if (line := _curve(o, validation, scale))],
                [mark for o in arm.outcomes if (mark := _mark(o, test, scale, arm.name)) is not None],
            )
            for arm in grouped
        ]
        chance = next((100 * s.chance for arm in grouped if (s := arm.score(test)) and s.chance), None)
        level = None if chance is None else (chance, f"chance, {chance:.2g} %")
        drawn = chart(series, f"training time, {unit}", "zero-shot top-1, %", level=level)
        said = f"Large markers: {test}, scored once at the end, with 95 % intervals." if test else ""
        said += f" Lines: {validation}, during training." if validation else ""
        parts.append(_figure(drawn, [arm.name for arm in grouped], said.strip()))
    return parts


def _figure(drawn: str, names: Sequence[str], caption: str) -> str:
    return f'<figure><div class="wide">{drawn}</div>{legend(names)}<figcaption>{escape(caption)}</figcaption></figure>'


def _time(longest: float) -> tuple[float, str]:
    """(seconds of a unit, its name) that suits the longest run."""
    if longest < 600:
        return 1.0, "seconds"
    return (60.0, "minutes") if longest < 3 * 3600 else (3600.0, "hours")


def _curve(outcome: Outcome, name: str, scale: float) -> list[Point]:
    """(time, per cent) of an evaluation set in training."""
    return [
        (point["seconds"] / scale, 100 * item["top1"])
        for point in outcome.curve()
        if point["seconds"] is not None
        for item in point.get("evaluations", ())
        if item["name"] == name
    ]


def _mark(outcome: Outcome, name: str, scale: float, arm: str) -> Mark | None:
    item = next((item for item in outcome.evaluations if item["name"] == name), None)
    seconds = outcome.progress["seconds"]
    if item is None or seconds is None:
        return None
    low, high = item.get("interval") or (item["top1"], item["top1"])
    label = f"{arm}: {percent(item['top1'])} % ({percent(low)} to {percent(high)}) after {duration(seconds)}"
    return Mark(seconds / scale, 100 * item["top1"], 100 * low, 100 * high, label)


def _thousands(most: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if most >= scale:
            return scale, unit
    return 1.0, ""


def _loss(grouped: Sequence[Arm]) -> list[str]:
    def line(outcome: Outcome) -> list[Point]:
        return thin([(entry["samples"], entry["loss"]) for entry in outcome.metrics if entry.get("loss") is not None])

    lines = [[points for outcome in arm.outcomes if (points := line(outcome))] for arm in grouped]
    most = max((points[-1][0] for found in lines for points in found), default=0.0)
    scale, unit = _thousands(most)
    scaled = [
        Series(arm.name, [[(x / scale, y) for x, y in points] for points in found])
        for arm, found in zip(grouped, lines, strict=True)
    ]
    drawn = chart(scaled, "samples seen" + (f", {unit}" if unit else ""), "training loss", zero=False)
    caption = "Means of neighbouring steps. The loss depends on the batch and the mask: compare arms by accuracy."
    return ["<h2>Training loss</h2>", _figure(drawn, [arm.name for arm in grouped], caption)]


# -- facts -------------------------------------------------------------------------------------------------------------


def _differences(outcomes: Sequence[Outcome]) -> list[str]:
    keys = differing(outcomes)
    if not keys:
        return []
    rows = [{"setting": key, **{o.run.name: o.settings.get(key, "-") for o in outcomes}} for key in keys]
    return ["<h2>What differs between the runs</h2>", _table(rows)]


def _attempts(outcomes: Sequence[Outcome]) -> list[str]:
    """Why every attempt ended, and where every run that is not complete stands."""
    rows = []
    for outcome in outcomes:
        attempts: list[Attempt | None] = [*outcome.attempts] or [None]
        for attempt in attempts:
            end: Mapping[str, Any] = attempt.end if attempt else {}
            running = outcome.state if attempt is attempts[-1] else "unknown"
            rows.append(
                {
                    "run": outcome.run.name,
                    "attempt": attempt.number if attempt else "-",
                    "began at sample": count(attempt.start.get("resumes_from")) if attempt else "-",
                    "ended": end.get("cause") or running,
                    "then": end.get("action", "-"),
                    "reason": end.get("reason") or (outcome.reason if not end else ""),
                }
            )
    return ["<h2>Attempts</h2>", _table(rows, long=["reason"])]


def _goodput(outcomes: Sequence[Outcome]) -> list[str]:
    """What the runs' time went to; of those that run, until they last said something."""
    accounts = goodput.with_sums([outcome for outcome in outcomes if outcome.attempts])
    if not accounts:
        return []
    notes = [f'<p class="note">{escape(words)}</p>' for words in goodput.advice(accounts)]
    return ["<h2>What the time went to</h2>", _table(goodput.cells(accounts)), *notes]
