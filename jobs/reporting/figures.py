"""Figures of a report: accuracy against cost, scaling curves, training curves."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from flip.evaluation.metrics.score import Score, score_of
from flip.monitoring.metrics_reader import Column
from flip.monitoring.results import Outcome
from jobs.common.text import level_percent, percent
from jobs.pages.charts import Level, Mark, Plot, Point, Series, smooth, thin
from jobs.pages.document import Block, Figure, Fold, Table, Text, heading
from jobs.reporting import laws, scaling_laws, seed_groups
from jobs.reporting.scaling_laws import Curve
from jobs.reporting.seed_groups import GroupScore, SeedGroup

MANY = 12
BEST = 7
"""Of more than MANY groups only the BEST get styles of their own; the others are grey."""

VARIES = "†"
"""Mark of groups whose throughput varied."""

Styles = Sequence[int | None]
LAWS = (
    f"Power law: {laws.POWER.formula}; log-odds, if the mean accuracy is below 50 %: {laws.LOG_ODDS.formula}. Least"
    " squares in the logarithms, with 95 % intervals by Student's t. Lack of fit: F test against the spread of runs at"
    " equal x; below p = 0.05 the law is refused and not drawn; not tested without such runs. A law needs"
    f" {scaling_laws.MIN_RUNS} runs at three values of x; do not extrapolate."
)


def focus(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome]) -> list[int | None]:
    """Style of every group: a number, or None for grey."""
    if len(grouped) <= MANY:
        return list(range(len(grouped)))
    roles = seed_groups.sets(outcomes)

    def rank(i: int) -> tuple[float, int]:
        scores = [score.mean for name in roles if (score := grouped[i].score(name)) is not None]
        return (-(scores[0] if scores else -1.0), i)

    best = sorted(range(len(grouped)), key=rank)[:BEST]
    return [best.index(i) if i in best else None for i in range(len(grouped))]


def _others(styles: Styles) -> str:
    """The end of a caption: how many groups are grey."""
    grey = sum(style is None for style in styles)
    if grey:
        return f" Grey: {grey} others."
    return ""


Cost = Callable[[Outcome, float | None, float | None], float | None]
"""(run, samples seen, training seconds) -> cost."""

Step = tuple[int, float, float]
"""A score on the way: samples seen, cost, per cent."""


# -- accuracy against cost ---------------------------------------------------------------------------------------------


def accuracy(grouped: Sequence[SeedGroup], outcomes: Sequence[Outcome], styles: Styles) -> list[Block]:
    """A large chart of accuracy against the measured cost; the other costs and sets are folded.

    The large chart shows the first set with a course over training, tests first, or else the first set.
    """
    charts_of = {name: plots for name in seed_groups.sets(outcomes) if (plots := _plots(name, grouped, styles))}
    if not charts_of:
        return []
    lead = next((name for name, (first, *_) in charts_of.items() if any(s.lines for s in first.series)), None)
    lead = lead or next(iter(charts_of))
    captions = {name: _caption(name, plots) + _others(styles) for name, plots in charts_of.items()}
    notes = ""
    if any(group.throughput_varies for group in grouped):
        notes += f" {VARIES}: the throughput varied, so this is not the cost of the method."
    large = replace(charts_of[lead].pop(0), large=True)
    more = [
        Figure(f"accuracy-{name}{'-more' if name == lead else ''}", plots, captions[name] + _break_note(plots))
        for name, plots in charts_of.items()
        if plots
    ]
    folded = []
    if more:
        folded = [Fold("Other costs and evaluation sets", more)]
    caption = captions[lead] + _break_note([large]) + notes
    return [heading("Accuracy against cost"), Figure(f"accuracy-{lead}", [large], caption), *folded]


def _break_note(plots: Sequence[Plot]) -> str:
    """Explains the mark of a broken axis, if a chart has it."""
    if any(plot.is_broken for plot in plots):
        return " Two strokes at the foot of a vertical axis: it does not start at 0."
    return ""


def _plots(name: str, grouped: Sequence[SeedGroup], styles: Styles) -> list[Plot]:
    """The charts of one set, one per cost, without empty ones. Models of others have no cost: they are level lines."""
    scores = {i: score for i, group in enumerate(grouped) if (score := group.score(name)) is not None}
    if not scores:
        return []
    label = next(iter(scores.values())).label
    shown = [
        i for i, group in enumerate(grouped) if not group.is_published and (i not in scores or scores[i].label == label)
    ]
    chance = next((score.chance for score in scores.values() if score.chance), None)
    levels = []
    if chance is not None:
        levels = [Level(100 * chance, f"chance, {level_percent(chance)}")]
    for i, score in scores.items():
        if grouped[i].is_published and score.label == label:
            levels.append(Level(100 * score.mean, f"{grouped[i].name} {percent(score.mean)}", must_show=True))
    plots = []
    for cost, axis in _costs(grouped):
        series = [_series(grouped[i], name, label, cost, styles[i]) for i in shown]
        plots.append(Plot(axis, f"{name}, {label}, %", series, levels=levels))
    return [plot for plot in plots if not plot.empty]


def _series(group: SeedGroup, name: str, label: str, cost: Cost, style: int | None) -> Series:
    """The course and the final score of one group; of several seeds the means, and each seed faintly."""
    score = group.score(name)
    words = [group.name]
    if score is not None:
        words += [percent(score.mean)]
    if group.throughput_varies:
        words += [VARIES]
    finals = _finals(group, name, cost)
    scored = [outcome for outcome, _, _ in finals] or list(group.outcomes)
    courses = [_course(outcome, name, label, cost) for outcome in scored]
    if len(scored) == 1:
        lines = courses
        marks = [_mark(*final[1:], group.name) for final in finals]
        faint = []
        dots = []
    else:
        lines = [_mean_course(courses)]
        faint = [_points(course) for course in courses]
        marks = []
        dots = [(x, 100 * final.value) for _, x, final in finals]
        if score is not None and finals:
            marks = [_mean_mark([x for _, x, _ in finals], score, group.name)]
    if style is None:
        faint = []
        dots = []
    drawn = [_points(line) for line in lines if len({x for _, x, _ in line}) > 1]
    faint = [line for line in faint if len({x for x, _ in line}) > 1]
    return Series(group.name, drawn, marks, style, label=" ".join(words), faint=faint, dots=dots)


def _caption(name: str, plots: Sequence[Plot]) -> str:
    course = any(item.lines for plot in plots for item in plot.series)
    caption = f"{name}: markers are final scores with 95 % intervals"
    if any(item.dots for plot in plots for item in plot.series):
        caption += ", of several seeds their mean with the range; faint: each seed"
    return caption + ("; lines are the course of training." if course else "; it is scored once, at the end.")


def _costs(grouped: Sequence[SeedGroup]) -> list[tuple[Cost, str]]:
    unit = seed_groups.hours_unit(grouped)
    return [
        (
            lambda outcome, samples_seen, seconds: (
                None if seconds is None else seed_groups.hours(outcome, unit, seconds)
            ),
            unit,
        ),
        (lambda outcome, samples_seen, seconds: seed_groups.flops(outcome, samples_seen), "training FLOPs"),
        (lambda outcome, samples_seen, seconds: samples_seen, "samples seen"),
        (lambda outcome, samples_seen, seconds: None if seconds is None else seconds / 3600, "hours of training"),
    ]


def _course(outcome: Outcome, name: str, label: str, cost: Cost) -> list[Step]:
    """The scores of a run on the set by the metric, over cost; the final one last."""
    points = [(point["samples"], point["seconds"], point.get("evaluations", ())) for point in outcome.curve()]
    progress = outcome.progress
    if points and progress["samples"] is not None and progress["samples"] > points[-1][0]:
        points.append((progress["samples"], progress["seconds"], outcome.evaluations))
    steps = []
    for samples_seen, seconds, items in points:
        x = cost(outcome, samples_seen, seconds)
        scores = [score_of(item) for item in items if item["name"] == name]
        steps += [(samples_seen, x, 100 * score.value) for score in scores if score.label == label and x is not None]
    return steps


def _mean_course(courses: Sequence[Sequence[Step]]) -> list[Step]:
    """The mean of several courses at the samples that all have."""
    tables = [{samples_seen: (x, y) for samples_seen, x, y in course} for course in courses]
    if tables:
        common = set.intersection(*(set(table) for table in tables))
    else:
        common = set()
    means = []
    for samples_seen in sorted(common):
        xs, ys = zip(*(table[samples_seen] for table in tables), strict=True)
        means.append((samples_seen, fmean(xs), fmean(ys)))
    return means


def _points(course: Sequence[Step]) -> list[Point]:
    return [(x, y) for _, x, y in course]


def _finals(group: SeedGroup, name: str, cost: Cost) -> list[tuple[Outcome, float, Score]]:
    """(run, cost, final score on the set) of every run that has both."""
    finals = []
    for outcome, score in group.items(name):
        x = cost(outcome, outcome.progress["samples"], outcome.progress["seconds"])
        if x is not None:
            finals.append((outcome, x, score))
    return finals


def _mark(x: float, score: Score, name: str) -> Mark:
    low, high = score.interval or (score.value, score.value)
    label = f"{name}: {percent(score.value)} %"
    if score.interval:
        label += f" ({percent(low)} to {percent(high)})"
    return Mark(x, 100 * score.value, 100 * low, 100 * high, label)


def _mean_mark(xs: Sequence[float], score: GroupScore, name: str) -> Mark:
    """The mean of several seeds at their mean cost, with their range."""
    assert score.low is not None and score.high is not None
    label = f"{name}: {percent(score.mean)} % (mean of {score.runs}, {percent(score.low)} to {percent(score.high)})"
    return Mark(fmean(xs), 100 * score.mean, 100 * score.low, 100 * score.high, label)


# -- scaling -----------------------------------------------------------------------------------------------------------


def scaling_figures(outcomes: Sequence[Outcome]) -> list[Block]:
    """Error of complete runs along every axis with at least two values, with their laws."""
    tests = [name for name, role in seed_groups.sets(outcomes).items() if role == "test"]
    blocks: list[Block] = []
    for test in tests:
        curves = scaling_laws.curves(outcomes, test)
        plots = []
        rows = []
        for axis in dict.fromkeys(curve.axis for curve in curves):
            along = [curve for curve in curves if curve.axis == axis]
            many = len(along) > MANY
            series = [_law(curve, None if many else i) for i, curve in enumerate(along)]
            plots.append(Plot(axis, f"{test}, error, %", series, log_x=True, log_y=True))
            rows += [_exponent(test, curve) for curve in along if curve.law]
        if plots:
            caption = f"Error on {test} of complete runs of one design along each axis, with 95 % intervals; both axes"
            if rows:
                caption += " logarithmic. Dashed, with a band of 95 %: fitted laws."
            else:
                caption += " logarithmic."
            blocks.append(Figure(f"scaling-{test}", plots, caption))
        if rows:
            blocks += [Table(rows, text=["along", "of", "law", "lack of fit"])]
    if not blocks:
        return []
    if any(isinstance(block, Table) for block in blocks):
        blocks.append(Text(LAWS, tone="quiet"))
    return [heading("Scaling curves"), *blocks]


def _law(curve: Curve, style: int | None) -> Series:
    marks = [
        Mark(t.x, 100 * t.error, 100 * t.low, 100 * t.high, f"{t.name}: error {percent(t.error)} %")
        for t in curve.trials
    ]
    if curve.law is None or curve.law.refused:
        means: dict[float, list[float]] = {}
        for trial in curve.trials:
            means.setdefault(trial.x, []).append(100 * trial.error)
        line = [(x, sum(values) / len(values)) for x, values in means.items()]
        return Series(curve.name, [line] if curve.axis != scaling_laws.AXES[0].name else [], marks, style)
    line_ = curve.law.line(curve.trials[0].x, curve.trials[-1].x)
    fitted = [(x, 100 * y) for x, y, _, _ in line_]
    band = [(x, 100 * low, 100 * high) for x, _, low, high in line_]
    return Series(curve.name, [], marks, style, fitted, band)


def _exponent(test: str, curve: Curve) -> dict[str, str]:
    law = curve.law
    assert law is not None
    (b,) = law.exponents()
    if law.form is laws.POWER:
        double = f"error {100 * (2**-b.value - 1):+.1f} %"
    else:
        double = f"odds times {2**b.value:.2f}"
    exponent = f"{b.value:.3f} ({b.low:.3f} to {b.high:.3f})"
    if law.refused:
        exponent = double = "does not fit"
    row = {"test": test, "along": curve.axis, "of": curve.name, "runs": str(law.runs), "law": law.form.name}
    return row | {"exponent b": exponent, "at twice x": double, "lack of fit": str(law.lack or "not tested")}


# -- training ----------------------------------------------------------------------------------------------------------


def loss(grouped: Sequence[SeedGroup], styles: Styles) -> list[Block]:
    """Training loss and accuracy within the batch against samples seen: smoothed, over the raw values."""
    plots = []
    for field, label in (("loss", "training loss"), ("accuracy", "accuracy within the batch, %")):
        series = []
        for group, style in zip(grouped, styles, strict=True):
            lines = []
            raw = []
            for outcome in group.outcomes:
                xs, ys = _logged(outcome, field)
                if len(xs):
                    lines.append(thin(xs, smooth(ys), 100 if style is not None else 60))
                    if style is not None:
                        raw += [thin(xs, ys)]
            series.append(Series(group.name, lines, (), style, faint=raw))
        plots.append(Plot("samples seen", label, series))
    caption = "Means over a tenth of the run around each step; faint: as logged."
    caption += " Both depend on the batch and the mask: compare groups by their tests."
    return [heading("Training curves"), Figure("training", plots, caption + _others(styles))]


def _logged(outcome: Outcome, field: str) -> tuple[Column, Column]:
    """Samples and finite values of the logged steps."""
    values = outcome.metrics[field]
    is_measured = np.isfinite(values)
    return outcome.metrics["samples"][is_measured], (100.0 if field == "accuracy" else 1.0) * values[is_measured]
