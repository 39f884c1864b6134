"""Accuracy against training time as in Figure 1 of the paper: our runs and the paper's points in one chart.

Time is relative, because the paper's machines are others: 1 is the run that a row with ``time: 1`` describes.
"""

from collections.abc import Mapping, Sequence

from jobs.common.text import percent
from jobs.pages.charts import Mark, Plot, Series
from jobs.pages.document import Block, Figure, heading
from jobs.reporting import seed_groups
from jobs.reporting.seed_groups import SeedGroup
from jobs.sweeps.published import Published, published

SET = "imagenet"

Placed = tuple[float, Mark]


def time_figure(grouped: Sequence[SeedGroup]) -> list[Block]:
    """The chart, if the sweep reproduces a figure of the paper (rows with ``time``); else nothing."""
    entries = seed_groups.sweep_record([outcome for group in grouped for outcome in group.outcomes]).get("rows", [])
    rows = [row for row in map(published, entries) if row.time is not None]
    if not rows:
        return []
    masks = list(dict.fromkeys(_mask(row) for row in rows))
    series = [_paper(mask, [row for row in rows if _mask(row) == mask], style) for style, mask in enumerate(masks)]
    placed = _placed(grouped)
    series += [_series(f"ours, mask {mask}", placed.get(mask, []), style) for style, mask in enumerate(masks)]
    label = "training time, 1: no mask, the shortest run"
    plot = Plot(label, f"{SET}, top-1, %", [each for each in series if each.marks], large=True, legend=True)
    caption = "Accuracy against training time, as in Figure 1 of the paper: its points, and these runs with intervals."
    if not placed:
        caption += " Points of these runs need the complete run of time 1, by whose hours the others are divided."
    return [heading("Accuracy against training time, and the paper's"), Figure("paper-time", [plot], caption)]


def _mask(row: Published) -> str:
    return f"{float(row.needs['stages.pretrain.mask']):g}"


def _paper(mask: str, rows: Sequence[Published], style: int) -> Series:
    points = [(row.time, row.top1[SET]) for row in rows if row.time is not None and SET in row.top1]
    marks = [Mark(x, y, y, y, f"paper, mask {mask}: {y:.1f}") for x, y in points]
    return Series(f"paper, mask {mask}", [sorted(points)], marks, style + 3)


def _placed(grouped: Sequence[SeedGroup]) -> Mapping[str, list[Placed]]:
    """Mask -> (relative time, mark) of complete groups; empty without a complete run of time 1."""
    unit = seed_groups.hours_unit(grouped)
    hours = [group.mean(lambda outcome: seed_groups.hours(outcome, unit)) for group in grouped]
    done = [(group, spent) for group, spent in zip(grouped, hours, strict=True) if spent and group.complete]
    base = next((spent for group, spent in done if group.published and group.published.time == 1), None)
    if base is None:
        return {}
    placed: dict[str, list[Placed]] = {}
    for group, spent in done:
        score = group.score(SET)
        if score is None:
            continue
        low, high = (score.mean if each is None else each for each in (score.low, score.high))
        label = f"{group.name}: {percent(score.mean)} %"
        mark = Mark(spent / base, 100 * score.mean, 100 * low, 100 * high, label)
        placed.setdefault(f"{float(group.mask.split(' > ')[0]):g}", []).append((spent, mark))
    return placed


def _series(name: str, placed: Sequence[Placed], style: int) -> Series:
    marks = [mark for _, mark in sorted(placed, key=lambda each: each[0])]
    return Series(name, [[(mark.x, mark.y) for mark in marks]] if len(marks) > 1 else [], marks, style)
