"""The content of a report as blocks (jobs/pages/document.py), for finished, running and failed sweeps."""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby

from flip.evaluation.metrics.result_files import precision
from flip.evaluation.metrics.score import TOP_1, score_of
from flip.monitoring.metrics_reader import STEADY
from flip.monitoring.results import Outcome, differing
from jobs.common.cli import command
from jobs.common.text import count, duration, formatted, hours_text, percent, shortened
from jobs.pages.document import Block, Fold, Table, Text, anchor, heading
from jobs.reporting import axes, faults, goodput, paper_comparison, ranking, seed_groups
from jobs.reporting.axes import GridAxis
from jobs.reporting.examples import IMAGES, examples
from jobs.reporting.figures import VARIES, accuracy, focus, loss, scaling_figures
from jobs.reporting.paper_figure import time_figure
from jobs.reporting.seed_groups import GroupScore, SeedGroup

ROWS_PER_RUN = 6
"""Most rows of attempts per run; flip explain shows all attempts."""
EQUAL = 0.05
"""Relative difference below which two speeds or costs count as equal: runs of one design differ by a few per cent."""
COLUMNS = 8
"""Most runs in one matrix of settings, for print."""

RESTART_PARTS = (
    "Detect: from the last recorded work until the launcher sees the end. Decide: until the other ranks have ended."
    " Start: until the next attempt restores. Replay: steps since the last checkpoint. As requeue: the same with a"
    " requeue, by the requeues or the first start of the run."
)
SCORES = (
    "Scores are top-1 in per cent unless a column names another metric; in brackets the 95 % interval of one run, or"
    " the range of several seeds. The best value of a column is marked, the best score only if it is distinguishable"
    f" from all others; costs and speeds within {100 * EQUAL:.0f} % count as equal. Scores are computed in fp32 unless"
    " a column says otherwise."
    f" Training time, hours and samples/s: {seed_groups.COUNTED}."
)


def findings(
    outcomes: Sequence[Outcome], now: float | None = None, table: str = "", images: int = IMAGES
) -> list[Block]:
    """All blocks of the report. ``now``: its time, in seconds. ``table``: a table of the paper to compare with.
    ``images``: test images to show."""
    sweep_record = seed_groups.sweep_record(outcomes)
    grouped = axes.in_order(seed_groups.group_by_seed(outcomes))
    styles = focus(grouped, outcomes)
    blocks: list[Block] = [Text(title(outcomes), 1)]
    blocks += _headlines(grouped, outcomes)
    blocks += [Text(_states(outcomes, now), tone="quiet")]
    blocks += _trouble(outcomes)
    if sweep_record.get("notes"):
        blocks += [Text(sweep_record["notes"])]
    blocks += accuracy(grouped, outcomes, styles)
    blocks += [heading("Results"), *_grid(grouped, outcomes), _results(grouped, outcomes), Text(SCORES, tone="quiet")]
    blocks += [Text(note, tone="note") for note in (_note(grouped), varying_throughput(outcomes)) if note]
    blocks += [*time_figure(grouped), *_paper(grouped, outcomes, table)]
    blocks += examples(grouped, outcomes, images)
    blocks += _differences(grouped, outcomes)
    blocks += loss(grouped, styles)
    blocks += scaling_figures(outcomes)
    blocks += _time(outcomes)
    blocks += _runs(grouped, outcomes)
    return blocks


def _headlines(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome]) -> list[Block]:
    blocks: list[Block] = []
    for headline in ranking.headlines(grouped, outcomes):
        blocks.append(Text(headline.sentence, tone="headline"))
        if headline.explanation:
            blocks.append(Text(headline.explanation, tone="quiet"))
        if headline.further:
            texts = [Text(text, tone="quiet") for text in headline.further]
            blocks.append(Fold("The other test sets", texts))
    return blocks


def title(outcomes: Sequence[Outcome]) -> str:
    sweep_record = seed_groups.sweep_record(outcomes)
    return sweep_record.get("title") or sweep_record.get("name") or ", ".join(_folders(outcomes))


def _folders(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.run.sweep for outcome in outcomes))


def _states(outcomes: Sequence[Outcome], now: float | None) -> str:
    """Number of runs per state, and the time."""
    states = Counter(outcome.state for outcome in outcomes)
    done = states.pop("complete", 0)
    parts = [f"{done} of {len(outcomes)} runs complete", *(f"{n} {state}" for state, n in states.items())]
    when = ""
    if now is not None:
        when = time.strftime(" (%Y-%m-%d %H:%M)", time.localtime(now))
    return f"{', '.join(_folders(outcomes))}: {', '.join(parts)}{when}"


def _trouble(outcomes: Sequence[Outcome]) -> list[Block]:
    """Runs that stopped for good, and what to do about them; damaged files."""
    stopped = [outcome for outcome in outcomes if outcome.state in ("failed", "unknown", "stopped")]
    damaged = [Text(problem, tone="trouble") for problem in damage(outcomes)]
    if not stopped:
        return [*damaged]
    first = stopped[0]
    lines = [f"{o.run.name} is {o.state}: {o.reason or 'reason unknown'}" for o in stopped[:ROWS_PER_RUN]]
    if len(stopped) > ROWS_PER_RUN:
        lines += [f"and {len(stopped) - ROWS_PER_RUN} more"]
    how = f"Why: {command('explain', first.run.path)}. Restart failed runs: flip submit SWEEP --retry."
    return [Text(f"{'; '.join(lines)}. {how}", tone="trouble"), *damaged]


def damage(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for each damaged file that the reason of its run does not name."""
    return [
        f"A file of {o.run.name} is damaged: {problem}"
        for o in outcomes
        for problem in o.damage
        if problem not in o.reason
    ]


def varying_throughput(outcomes: Sequence[Outcome]) -> str:
    """A caution about runs whose throughput varies, or empty."""
    names = [outcome.run.name for outcome in outcomes if outcome.throughput_varies]
    if not names:
        return ""
    shown = shortened(names, ROWS_PER_RUN)
    return (
        f"Throughput varies ({VARIES}): {shown}. The lower quartile of samples/s is below {100 * STEADY:.0f} % of the"
        " upper one, as on a shared or throttled machine: training time and hours are not the cost of the method."
    )


def _note(grouped: Sequence[SeedGroup]) -> str:
    if any(group.complete for group in grouped):
        return seed_groups.seeds_caution(grouped)
    return "No run is complete yet."


# -- results -----------------------------------------------------------------------------------------------------------


def _results(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome]) -> Table:
    fine = ("complete", "running", "queued", "waiting")
    marked = [any(outcome.state not in fine for outcome in group.outcomes) for group in grouped]
    links = [anchor(f"run {label}") for label in seed_groups.labels(grouped)]
    rows = result_cells(grouped, outcomes)
    links += [""] * (len(rows) - len(links))
    best = _best(grouped, outcomes)
    text = ["state", "mask", *(axis.name for axis in axes.axes(grouped))]
    return Table(rows, marked, text=text, best=best, links=links)


def _grid(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome]) -> list[Block]:
    """For a grid of two axes, each test set as a table of both."""
    grid = axes.axes(grouped)
    if len(grid) != 2:
        return []
    first, second = grid
    rows_of = {(first.positions[i], second.positions[i]): i for i in range(len(grouped))}
    tables: list[list[Block]] = []
    for name, role in seed_groups.sets(outcomes).items():
        if any(group.score(name) is not None for group in grouped):
            label = seed_groups.set_label(grouped, name)
            caption = f"{_column(name, role, label)} by {first.name} and {second.name}"
            tables.append([Text(caption, tone="quiet"), _crossed(name, label, grouped, rows_of, first, second)])
    if not tables:
        return []
    lead, *others = tables
    if not others:
        return lead
    return [*lead, Fold("The other sets by both", [block for blocks in others for block in blocks])]


def _crossed(
    name: str,
    label: str | None,
    grouped: Sequence[SeedGroup],
    rows_of: Mapping[tuple[int | None, int | None], int],
    first: GridAxis,
    second: GridAxis,
) -> Table:
    """The scores of a set: a row per value of the first axis, a column per value of the second.

    ``rows_of``: (position on the first axis, on the second) -> index of the group.
    """
    clear = ranking.clear_best(grouped, name)
    rows = []
    best: dict[str, list[int]] = {}
    for y, value in enumerate(first.values):
        row = {first.name: value}
        for x, other in enumerate(second.values):
            column = f"{second.name} {other}"
            index = rows_of.get((y, x))
            row[column] = "-"
            if index is not None:
                row[column] = _score_cell(grouped[index].score(name), label)
            if clear is not None and clear.index == index:
                best[column] = [y]
        rows.append(row)
    return Table(rows, best=best)


def _best(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome]) -> dict[str, list[int]]:
    """Column -> rows with the best value: of scores and speed the highest, of costs the lowest.

    Only complete groups count, for speed and cost only steady ones. A column of equal costs has no best, and a score
    only one that is distinguishable from all others.
    """
    steady = {i: group for i, group in enumerate(grouped) if group.complete and not group.throughput_varies}
    unit = seed_groups.hours_unit(grouped)
    best = dict[str, list[int]]()
    for name, role in seed_groups.sets(outcomes).items():
        if (standing := ranking.clear_best(grouped, name)) is not None:
            best[_column(name, role, seed_groups.set_label(grouped, name))] = [standing.index]
    columns: dict[str, dict[int, float | None]] = {}
    columns["samples/s"] = {i: group.progress("samples_per_second") for i, group in steady.items()}
    columns["training"] = {i: group.progress("seconds") for i, group in steady.items()}
    columns[unit] = {i: group.mean(lambda outcome: seed_groups.hours(outcome, unit)) for i, group in steady.items()}
    for column, values in columns.items():
        measured = {i: value for i, value in values.items() if value is not None}
        highest = column == "samples/s"
        if marked := _distinct_best(measured, highest):
            best[column] = marked
    return best


def _distinct_best(values: Mapping[int, float], highest: bool) -> list[int]:
    """Rows with the best speed or cost: all within EQUAL of it, or none if every row is."""
    if not values:
        return []
    chosen = max(values.values()) if highest else min(values.values())
    alike = [i for i, value in values.items() if abs(value - chosen) <= EQUAL * chosen]
    if len(alike) == len(values):
        return []
    return alike


def _column(name: str, role: str, label: str | None) -> str:
    """The name of the set, with its role unless it is a test, and with the metric unless it is top-1."""
    notes = []
    if role not in (name, "test"):
        notes = [role]
    if label is not None and label != TOP_1:
        notes.append(label)
    if notes:
        return f"{name} ({', '.join(notes)})"
    return name


def _seeds(group: SeedGroup) -> str:
    done = len(group.complete)
    all_ = len(group.outcomes)
    if group.is_published:
        return "-"
    if done == all_:
        return str(all_)
    return f"{done} of {all_}"


def _score_cell(score: GroupScore | None, label: str | None) -> str:
    """The score, with its metric if the column has no common one."""
    if score is None:
        return "-"
    if label is not None:
        return str(score)
    return f"{score} {score.label}"


def result_cells(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome]) -> list[dict[str, str]]:
    """The rows of the results table, as text: a row per group, then the baselines of the sweep."""
    unit = seed_groups.hours_unit(grouped)
    sets = seed_groups.sets(outcomes)
    unfinished = any(outcome.state != "complete" for outcome in outcomes)
    seeds = any(len(group.outcomes) > 1 for group in grouped)
    scored = any(group.precision not in ("", "fp32") for group in grouped)
    labels = {name: seed_groups.set_label(grouped, name) for name in sets}
    grid = axes.axes(grouped)
    masks = {group.mask for group in grouped}
    shows_masks = len(masks) > 1 or (not grid and masks != {seed_groups.NO_MASK})
    rows = []
    for i, (label, group) in enumerate(zip(seed_groups.labels(grouped), grouped, strict=True)):
        row = {"run": label, "state": group.state}
        if unfinished:
            if (share := group.done) is None:
                row["done"] = "-"
            else:
                row["done"] = f"{100 * share:.0f} %"
        row |= {axis.name: axis.value(i) for axis in grid}
        if shows_masks:
            row["mask"] = group.mask
        if seeds:
            row["seeds"] = _seeds(group)
        for name, role in sets.items():
            row[_column(name, role, labels[name])] = _score_cell(group.score(name), labels[name])
        if scored:
            row["scored in"] = group.precision or "-"
        speed = group.progress("samples_per_second")
        spent = group.progress("seconds")
        if speed is None:
            pace = "-"
        elif group.throughput_varies:
            pace = f"{speed:,.0f} {VARIES}"
        else:
            pace = f"{speed:,.0f}"
        flops = formatted(group.mean(seed_groups.flops), ".3g") or "-"
        row |= {
            "samples/s": pace,
            "training": duration(spent),
            unit: hours_text(group.mean(lambda outcome: seed_groups.hours(outcome, unit))),
            "FLOPs": flops.replace("e+", "e"),
            "samples": count(group.progress("samples")),
            "attempts": "/".join(str(len(outcome.attempts)) for outcome in group.outcomes),
        }
        rows.append(row)
    if all(row["FLOPs"] == "-" for row in rows):  # programs alone
        rows = [{name: cell for name, cell in row.items() if name != "FLOPs"} for row in rows]
    columns = {name: _column(name, role, labels[name]) for name, role in sets.items()}
    return rows + _baselines(outcomes, rows[0], columns)


def _baselines(
    outcomes: Sequence[Outcome], example: Mapping[str, str], columns: Mapping[str, str]
) -> list[dict[str, str]]:
    """A row for each method without training. ``example``: a row of a run. ``columns``: set -> its column."""
    rows = []
    for name, scores in seed_groups.sweep_record(outcomes).get("baselines", {}).items():
        row = {**dict.fromkeys(example, "-"), "run": name, "state": "baseline"}
        row |= {column: percent(scores[set_] / 100) for set_, column in columns.items() if set_ in scores}
        rows.append(row)
    return rows


def _paper(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome], table: str) -> list[Block]:
    lines = paper_comparison.compare(grouped, outcomes, table)
    if not lines:
        return []
    rows = paper_comparison.cells(lines)
    if all(row["why"] == "" for row in rows):
        rows = [{key: value for key, value in row.items() if key != "why"} for row in rows]
    comparison = Table(rows, [bool(line.obstacles) for line in lines], ["why"], ["run", "test", "verdict"])
    agree = sum(line.verdict.startswith("agrees") for line in lines)
    comparable = sum(not line.obstacles for line in lines)
    summary = (
        f"Of {len(lines)} published numbers {comparable} can be compared, {agree} of these agree. The gap is the result"
        " minus the published number, in points. A row is comparable if data, recipe and test are those of the paper."
    )
    return [heading("Comparison with the paper"), comparison, Text(summary, tone="quiet")]


# -- time and settings
# -------------------------------------------------------------------------------------------------------------


def _time(outcomes: Sequence[Outcome]) -> list[Block]:
    """How the runs spent their time, and how often and why they restarted."""
    started = [outcome for outcome in outcomes if outcome.attempts]
    accounts = goodput.with_sums(started)
    if not accounts:
        return []
    rows = []
    for i, (account, row) in enumerate(zip(accounts, goodput.cells(accounts), strict=True)):
        if account.runs == 1:
            members = [started[i]]
        else:
            members = [o for o in started if goodput.is_member(o, account)]
        causes = Counter(attempt.end.get("cause", "complete") for o in members for attempt in o.attempts)
        incidents = ", ".join(f"{cause} {n}" for cause, n in causes.most_common() if cause != "complete") or "-"
        parts = {key.removesuffix(" %"): value for key, value in row.items()}
        restarts = sum(len(outcome.attempts) - 1 for outcome in members)
        rows.append({**parts, "restarts": str(restarts), "incidents": incidents})
    notes = [Text(advice, tone="note") for advice in goodput.advice(accounts)[:ROWS_PER_RUN]]
    explanation = (
        "Spent: what the run occupied; the following columns are shares of it, in per cent. Useful: steps whose result"
        " stands. Repeated: steps done again after an interruption. Lost: work that was not saved. Waited: for a start,"
        " wall clock. Restarts: attempts after the first. Incidents: why attempts ended."
    )
    blocks: list[Block] = [heading("How the time was spent"), Table(rows, text=["incidents"])]
    blocks += [Text(explanation, tone="quiet"), *notes]
    named = [(account.name, fault) for account in accounts for fault in account.faults]
    if named:
        costs = Table(faults.cells(named[-faults.MOST_ROWS :]), text=["ended by", "restart"])
        blocks.append(Fold("What the newest restarts cost", [costs, Text(RESTART_PARTS, tone="quiet")]))
    return blocks


def _differences(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome]) -> list[Block]:
    """A matrix of the settings in which any two runs differ: a row per setting, a column per seed group."""
    keys = differing(outcome.settings for outcome in outcomes)
    named = list(zip(seed_groups.labels(grouped), grouped, strict=True))
    if not keys:
        return []
    rows = [{"setting": key} | _values(key, named) for key in keys]
    parts = [named[i : i + COLUMNS] for i in range(0, len(named), COLUMNS)]
    matrices = [Table([{k: row[k] for k in ("setting", *dict(part))} for row in rows]) for part in parts]
    note = "Every setting in which any two runs differ. -: it belongs to a section that the run does not have."
    return [heading("Differences between the runs"), *matrices, Text(note, tone="quiet")]


def _values(key: str, named: Sequence[tuple[str, SeedGroup]]) -> dict[str, str]:
    """The values of a setting by group, all that its runs have; of paths the last parts in which they differ."""
    values = {
        label: ", ".join(dict.fromkeys(str(outcome.settings.get(key, "-")) for outcome in group.outcomes))
        for label, group in named
    }
    paths = {value for value in values.values() if value.startswith("/")}
    common = ""
    if len(paths) > 1:
        common = os.path.commonpath(paths) + "/"
    return {label: value.removeprefix(common) for label, value in values.items()}


def _runs(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome]) -> list[Block]:
    """The details of every run: speed, folder, all scores, and how its attempts ended."""
    unit = seed_groups.hours_unit(grouped)
    blocks: list[Block] = [heading("Runs")]
    for label, group in zip(seed_groups.labels(grouped), grouped, strict=True):
        blocks.append(heading(label, 3, anchor(f"run {label}")))
        for outcome in group.outcomes:
            progress = outcome.progress
            work = seed_groups.hours(outcome, unit)
            words = [f"{outcome.run.name}: {outcome.state}"]
            if progress["samples"] is not None and progress["samples_per_second"]:
                steady = {None: "", True: ", throughput varies", False: ", steady"}[outcome.throughput_varies]
                words.append(f"{count(progress['samples'])} samples in {duration(progress['seconds'])}")
                words.append(f"{count(progress['samples_per_second'])} samples/s{steady}")
            words += [f"{count(samples)} at W = {world}" for world, samples in outcome.samples_by_world.items()]
            if work is not None:
                words.append(f"{goodput.hours_text(work)} {unit}")
            blocks.append(Text(", ".join([*words, f"folder {outcome.run.path}"]), tone="quiet"))
        details = [*_scores(group.outcomes), *_attempts(group.outcomes)]
        if details:
            blocks += [Fold(f"Scores and attempts of {label}", details)]
    return blocks


def _scores(outcomes: Sequence[Outcome]) -> list[Block]:
    """Every final score of the runs, with notes if there are any."""
    scores = [(outcome, item, score_of(item)) for outcome in outcomes for item in outcome.evaluations]
    rows = [
        {
            "run": outcome.run.name, "set": item["name"], "metric": score.label, "score": percent(score.value),
            "95 % interval": "-".join(map(percent, score.interval or ())), "chance": percent(score.chance, 2),
            "top-5": percent(item.get("top5")), "of": count(item.get("n")), "scored in": precision(item),
            "note": item.get("note", ""),
        }
        for outcome, item, score in scores
    ]  # fmt: skip
    if not any(row["note"] for row in rows):
        for row in rows:
            del row["note"]
    if rows:
        return [Table(rows, long=["note"], text=["set", "metric"])]
    return []


def _attempts(outcomes: Sequence[Outcome]) -> list[Block]:
    """Why attempts ended, for runs with several attempts or not complete; equal ones in a row are merged."""
    rows = []
    for outcome in outcomes:
        if not outcome.attempts or (outcome.state == "complete" and len(outcome.attempts) == 1):
            continue
        alike = groupby(_ends(outcome), key=lambda row: (row["ended"], row["then"], row["reason"]))
        for same in [list(group) for _, group in alike][-ROWS_PER_RUN:]:
            row = dict(same[0])
            if len(same) > 1:
                row["attempt"] = f"{same[0]['attempt']} to {same[-1]['attempt']}"
            rows.append(row)
    if rows:
        return [Table(rows, long=["reason"], text=["ended", "then"])]
    return []


def _ends(outcome: Outcome) -> list[dict[str, str]]:
    rows = []
    for attempt in outcome.attempts:
        end = attempt.end
        if attempt is outcome.attempts[-1]:
            running = outcome.state
        else:
            running = "unknown"
        reason = end.get("reason", "")
        if not end:
            reason = outcome.reason
        rows.append(
            {
                "run": outcome.run.name,
                "attempt": str(attempt.number),
                "started at sample": count(attempt.start.get("resumes_from")),
                "ended": end.get("cause") or running,
                "then": end.get("action", "-"),
                "reason": reason,
            }
        )
    return rows
