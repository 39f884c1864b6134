"""Studies of arms that train at equal measured cost with paired seeds: `ArmStudy` needs a description only.

This file is the page of such a study: answers, differences of equal seeds, scores, figures, method, the runs as CSV.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jobs.common.text import counted, percent
from jobs.pages.charts import Level, Mark, Plot, Series
from jobs.pages.document import Block, Figure, Table, Text, heading
from jobs.reporting.outcomes import csv_text
from lab.studies import arms_stats, scaling_stats
from lab.studies.arms_design import Arm, ArmDesign, Round, SmallImages
from lab.studies.arms_stats import Compared
from lab.studies.engine import results as study_results
from lab.studies.engine.design import TRIAL_SEED, VALIDATION, StudyRun
from lab.studies.engine.page import interval, paragraphs, rates_table
from lab.studies.engine.results import Record, Results

__all__ = ["Arm", "ArmStudy", "Round", "SmallImages"]

DIFFERENCES = """\
Points of zero-shot top-1: first arm minus second, the mean over seeds. In brackets: the 95 % interval over seeds and
test pictures; in the column seeds alone it is that of training again on the same pictures. Seeds: the deviation of runs
from the effects of arm and seed, pooled over all arms ({pooled}). Pictures: {pictures} p: of the interval over both,
corrected for all {count} comparisons of this table (Holm); below 0.05 the verdict is more or less accurate, else
undecided. Not covered: the choice of vendors, of learning rates, and the error of the calibration, {calibration} of the
cost of an arm."""

UNPAIRED = """\
binomial variances of both arms, as if they had seen different pictures. These runs kept no answers per picture and no
weights, so that pictures cannot be paired: an upper bound, unless arms err on opposite pictures."""
PAIRED = """\
the variance of the difference of answers to the same pictures. An interval is at least as wide as that of seeds
alone."""

BASELINE = "nearest training picture"
PROBED = "linear probe, random features"
BASELINES = {"nearest": BASELINE, "probe": PROBED}
"""Method of ``baseline.py`` -> the name of its row."""

SCORES = """\
Zero-shot top-1 in per cent: the mean, in brackets each seed. {chance}Cost: core-seconds of training by the
calibration. {baseline}"""
PIXELS = """\
Nearest training picture: no model; the class of the training picture that differs least at 16 x 16 pixels, by colour
or by shape, whichever is better on validation (python -m lab.study --baseline). {probe}{near} of the {test} pictures
have a near-duplicate in training (docs/icons.md)."""
PROBE_NOTE = """Linear probe: ridge regression of the classes on 2,048 random features of the same pixels. """

METHOD = """\
Cost. A run is one process on one core (data.workers 0), so its processor time, which other load hardly changes, is its
total cost, including reading, decoding and cropping. Seconds per sample were measured once, before all runs, with two
runs side by side, on {cores} cores of {processor} (load {load} before it, {time} UTC; {name}/calibration.json). Every
arm gets {seconds:g} core-seconds; the step counts follow from that and were fixed before training. Later measurements
do not change them, so runs may share the machine.

Learning rates. {rates}

{tuning}Tests. Every arm has seeds {seeds}. {tests} are vendors that training and selection never see.
Trials do not load them; a compared run scores them once, when it is complete. The study was run once.

Evaluation view. {views} (docs/recipe.md): scores of an export in open_clip, which resizes before it crops, can differ
for pictures that are not square.

Spent: {spent:,.0f} s of training in {runs}, as measured while they ran, on a machine that may have been
shared. By the calibration, the complete plan takes {planned:,.0f} core-seconds, which is {minutes} on two
idle cores, plus some minutes for start-up and evaluation."""

TRIALS = """\
{count} per arm, the same in all arms, one trial each with seed {seed}, which no compared run has; trials have
{trial:g} of the length. {best} is used. {further}Nothing else was tuned in any arm.
{name}/choices.json records the choice, so that another machine trains the same arms."""
BY_ACCURACY = "The best on the validation vendor ({validation})"
BY_LOSS = "The smallest contrastive loss over all pictures of the validation vendor ({validation})"
FURTHER = "While the best rate of an arm is at the edge of its range, it also tries the next of {further}. "

UNTRIED = "The peak is {peak:g} in all arms. It was not tuned, so that an arm may lack its best one."

TUNING = """\
Tuning runs. Each starts from the last weights of the run with the same seed, with fresh optimizer moments, and gets
{share:g} % of its cost, which the table adds to that of the run; its samples are its own. For comparison, the run also
continues for the same time with its mask, because more training alone may help. Learning rates are chosen the same way,
by trials of the full length.

"""
VERDICTS = {"more": "more accurate", "less": "less accurate", "undecided": "undecided"}


class ArmStudy(ArmDesign):
    """A study of arms, with its page; ``ArmDesign`` describes the fields."""

    def sections(self, results: Results) -> list[Block]:
        blocks = [*answers(self, results), *arms(self, results)]
        drawn = [course(self, results), figure_of_differences(self, results)]
        blocks += [figure for figure in drawn if not figure.plots[0].empty]
        return blocks + method(self, results)

    def files(self, results: Results) -> dict[str, str]:
        """results.csv: one row per complete run. course.csv: the points of the figure of the course."""
        tables = {"results.csv": list(rows(self, results)), "course.csv": list(steps(self, results))}
        return {name: csv_text(table) for name, table in tables.items() if table}


def records(study: ArmDesign, results: Results, arm: Arm) -> dict[int, Record]:
    """Seed -> record of the complete runs of an arm."""
    runs = (study.run(arm, seed) for seed in study.seeds)
    return {run.seed: results.records[run.name] for run in runs if run.name in results.records}


def scores(study: ArmDesign, results: Results, arm: str, name: str) -> dict[int, float]:
    """Seed -> score of an arm on a set."""
    return study_results.scores(records(study, results, study.arms[arm]), name)


# -- results -----------------------------------------------------------------------------------------------------------


Comparisons = Mapping[tuple[str, str, str], Compared | None]
"""(set, arm, compared with) -> the comparison; None if too few pairs are complete."""


def comparisons(study: ArmDesign, results: Results) -> Comparisons:
    """All questions on all test sets, corrected for their number."""
    keys = [(test, first, second) for test in study.tests for _, first, second in study.questions]
    corrected = arms_stats.holm([compare(study, results, *key) for key in keys])
    return dict(zip(keys, corrected, strict=True))


def compare(study: ArmDesign, results: Results, name: str, first: str, second: str) -> Compared | None:
    """Two arms on a set, not corrected."""
    between = arms_stats.residual({arm: scores(study, results, arm, name) for arm in study.arms})
    if between is None:
        return None
    firsts, seconds = (_items(records(study, results, study.arms[arm]), name) for arm in (first, second))
    return arms_stats.compare(firsts, seconds, between)


def _items(runs: Mapping[int, Record], name: str) -> dict[int, Mapping[str, Any]]:
    """Seed -> result on a set."""
    return {seed: item for seed, run in runs.items() for item in run["evaluations"] if item["name"] == name}


def answers(study: ArmDesign, results: Results) -> list[Block]:
    """One sentence per question, and the table of differences."""
    table = comparisons(study, results)
    cells = []
    sentences = []
    test = study.tests[0]
    for question, first, second in study.questions:
        row = {"question": question, "arm": first, "minus": second}
        for name in study.tests:
            compared = table[name, first, second]
            row |= {name: _interval(compared), f"{name}, seeds alone": _interval(compared, alone=True)}
            row[f"{name}, p"] = "-" if compared is None else _p(compared.p)
        row[VALIDATION] = _interval(compare(study, results, VALIDATION, first, second))
        firsts = scores(study, results, first, test)
        seconds = scores(study, results, second, test)
        pairs = [f"{100 * (firsts[seed] - seconds[seed]):+.1f}" for seed in sorted(firsts.keys() & seconds.keys())]
        cells.append(row | {f"by seed, {test}": ", ".join(pairs) or "-"})
        sentences.append(_sentence(first, second, {name: table[name, first, second] for name in study.tests}))
    return [
        heading("Results"),
        *map(Text, sentences),
        heading("Differences"),
        Table(cells, text=list(cells[0])),
        *paragraphs(_about_differences(study, results, table)),
    ]


def _about_differences(study: ArmDesign, results: Results, table: Comparisons) -> str:
    pooled = []
    for name in study.tests:
        between = arms_stats.residual({arm: scores(study, results, arm, name) for arm in study.arms})
        if between:
            pooled.append(f"{name} {between.deviation:.2f} points, {between.freedom} degrees of freedom")
    known = [each for each in table.values() if each is not None]
    works = [work for work in results.calibration["work"].values() if "quartiles" in work]
    errors = [100 * scaling_stats.relative_error(work) for work in works]
    return DIFFERENCES.format(
        pooled="; ".join(pooled) or "unknown",
        pictures=" ".join((PAIRED if known and all(each.paired for each in known) else UNPAIRED).split()),
        count=len(known),
        calibration=f"at most {max(errors):.1f} %" if errors else "unknown",
    )


def _p(p: float) -> str:
    if p < 0.001:
        return "< 0.001"
    return f"{p:.2g}"


def _sentence(first: str, second: str, compared: Mapping[str, Compared | None]) -> str:
    parts = []
    for name, each in compared.items():
        if each is None:
            return f"{first} against {second}: no answer, fewer than {arms_stats.LEAST} pairs are complete."
        parts.append(f"on {name} {VERDICTS[each.verdict]}, {_interval(each)} points")
    return f"{first} against {second}: {'; '.join(parts)}."


def _interval(compared: Compared | None, alone: bool = False) -> str:
    if compared is None:
        return "-"
    shown = compared.seeds if alone else compared.both
    return interval(shown.value, shown.low, shown.high)


def _test_facts(study: ArmDesign, results: Results, field: str) -> Any:
    """A field of the scores on the first test set; None if no record has it."""
    for each in results.records.values():
        for item in each["evaluations"]:
            if item["name"] == study.tests[0] and item.get(field):
                return item[field]
    return None


def arms(study: ArmDesign, results: Results) -> list[Block]:
    """Table of arms: design, cost, and the score of each seed."""
    cells = []
    for arm in study.arms.values():
        row = length(study, arm, results)
        peak = results.peaks.get(arm.name)
        row["peak lr"] = "-" if peak is None else f"{peak:g}"
        for name in (*study.tests, VALIDATION):
            values = list(scores(study, results, arm.name, name).values())
            row[name] = "-"
            if values:
                row[name] = f"{percent(sum(values) / len(values))} ({', '.join(map(percent, values))})"
        cells.append(row)
    for method, name in BASELINES.items():
        cells += _baseline_row(study, results, cells[0], method, name)
    chance = _test_facts(study, results, "chance")
    note = SCORES.format(chance=f"Chance is {percent(chance, 2)}. " if chance else "", baseline=_near(study, results))
    return [heading("Arms"), Table(cells, text=["arm", *study.tests, VALIDATION]), *paragraphs(note)]


def _baseline_row(
    study: ArmDesign, results: Results, like: Mapping[str, str], method: str, name: str
) -> list[dict[str, str]]:
    """The row of a baseline; none if it was not computed."""
    values = {test: results.pixels(test, method=method) for test in (*study.tests, VALIDATION)}
    shown = {test: percent(value) for test, value in values.items() if value is not None}
    if not shown:
        return []
    return [dict.fromkeys(like, "-") | {"arm": name, "cost": "0"} | shown]


def _near(study: ArmDesign, results: Results) -> str:
    rows = {row["set"]: row for row in (results.baseline or {}).get("sets", ())}
    if not rows:
        return ""
    tests = [name for name in study.tests if name in rows]
    near = ", ".join(f"{100 * rows[name]['near']:.1f} %" for name in tests)
    probe = ""
    if any("method" in row for row in rows.values()):
        probe = PROBE_NOTE
    return " ".join(PIXELS.format(probe=probe, near=near, test=" and ".join(tests)).split())


def length(study: ArmDesign, arm: Arm, results: Results) -> dict[str, str]:
    """The design of an arm and its cost, with that of the run from which it starts."""
    times = results.times
    run = study.run(arm, study.seeds[0])
    seconds = study.cost(run, times)
    samples = study.samples(run, times)
    if arm.after:
        seconds += study.cost(study.run(study.arms[arm.after], study.seeds[0]), times)
    return {
        "arm": arm.name,
        "mask": arm.mask,
        "batch": str(arm.batch),
        "ms/sample": ", ".join(f"{1000 * times[work]:.3g}" for work in arm.works),
        "steps": f"{samples // arm.batch:,}",
        "samples": f"{samples:,}",
        "cost": f"{seconds:.0f}",
    }


# -- figures -----------------------------------------------------------------------------------------------------------


def steps(study: ArmDesign, results: Results) -> Iterator[dict[str, Any]]:
    """Validation accuracy (a share) by calibrated cost during training, of arms from scratch."""
    for arm in study.rounds[0].arms:
        for seed, each in records(study, results, arm).items():
            run = study.run(arm, seed)
            for point in each["curve"]:
                cost = study.cost(run, results.times, point["samples"])
                yield {"arm": arm.name, "seed": seed, "samples": point["samples"], "cost": cost, "top1": point["top1"]}


def course(study: ArmDesign, results: Results) -> Figure:
    """Validation accuracy against calibrated cost during training, for arms from scratch, one line per seed."""
    drawn = list(steps(study, results))
    series = []
    for style, arm in enumerate(study.rounds[0].arms):
        own = [step for step in drawn if step["arm"] == arm.name]
        lines = [[(p["cost"], 100 * p["top1"]) for p in own if p["seed"] == seed] for seed in study.seeds]
        series.append(Series(arm.name, [line for line in lines if line], (), style))
    validation = study.validation["manifest"].rpartition("/")[2]
    levels = []
    pixels = results.pixels(VALIDATION)
    if pixels is not None:
        levels = [Level(100 * pixels, f"{BASELINE}, {percent(pixels)}", must_show=True)]
    plot = Plot(
        "core-seconds of training, calibrated", f"{validation} (validation), top-1, %", series, levels, legend=True
    )
    caption = f"Accuracy on {validation} during training, one line per seed ({study.name}/course.csv)."
    return Figure("course", [plot], caption)


def figure_of_differences(study: ArmDesign, results: Results) -> Figure:
    """The differences as a forest plot, one series per test vendor."""
    table = comparisons(study, results)
    names = [f"{first} - {second}" for _, first, second in study.questions]
    series = []
    for style, test in enumerate(study.tests):
        marks = []
        for number, (_, first, second) in enumerate(study.questions, 1):
            compared = table[test, first, second]
            if compared is not None:
                d = compared.both
                place = number + 0.24 * (style - (len(study.tests) - 1) / 2)
                marks.append(Mark(place, d.value, d.low, d.high, f"{test}: {names[number - 1]}: {_interval(compared)}"))
        series.append(Series(test, (), marks, style))
    plot = Plot("difference, points", "", series, rows=names, legend=True)
    return Figure("differences", [plot], "Differences with 95 % intervals over seeds and test pictures.")


# -- method ------------------------------------------------------------------------------------------------------------


def method(study: ArmDesign, results: Results) -> list[Block]:
    """How the study was done, its trials, and where all scores are."""
    every = list(results.records.values())
    views = {each["preprocess"] for each in every} or {"crop_resize"}
    validation = study.validation["manifest"].rpartition("/")[2]
    rates = UNTRIED.format(peak=study.rates[0])
    if len(study.rates) > 1:
        rates = _trials(study, results, validation)
    planned = study.core_seconds(run for run in results.runs if results.asked(run) is not False)
    tuning = ""
    if any(arm.after for arm in study.arms.values()):
        tuning = TUNING.format(share=100 * study.tuning)
    text = METHOD.format(
        **results.calibration["machine"], time=results.calibration["time"], seconds=study.seconds, rates=rates,
        tuning=tuning, seeds=", ".join(map(str, study.seeds)),
        tests=" and ".join(test for test in study.tests if test not in study.added_sets),
        views=f"evaluate.preprocess: {', '.join(sorted(views))}",
        spent=sum(each["seconds"] for each in every), runs=counted(len(every), "complete run"), name=study.name,
        planned=planned, minutes=counted(planned / 120, "minute"),
    )  # fmt: skip
    blocks = [heading("Method"), *paragraphs(text)]
    cells = rates_table(results, ("arm",), [((arm,), arm) for arm in study.arms if results.trials[arm]])
    if cells:
        blocks += [heading("Trials"), Table(cells, text=list(cells[0])[1:])]
    complete = f"All runs with their scores: {study.name}/results.csv. {study.about}"
    return [*blocks, *paragraphs(complete)]


def _trials(study: ArmDesign, results: Results, validation: str) -> str:
    """How learning rates were chosen."""
    best = BY_ACCURACY
    if any(results.losses.values()):
        best = BY_LOSS
    further = ""
    if study.further:
        further = FURTHER.format(further=", ".join(f"{peak:g}" for peak in sorted(study.further)))
    return TRIALS.format(
        count=len(study.rates), seed=TRIAL_SEED, trial=study.trial, name=study.name, further=further,
        best=best.format(validation=validation),
    )  # fmt: skip


def rows(study: ArmDesign, results: Results) -> Iterator[dict[str, Any]]:
    """One row per complete run; scores are shares, ``cost`` calibrated core-seconds of its own training."""
    for arm in study.arms.values():
        trials = [study.trial_of(arm, peak) for peak in study.tried(arm)]
        runs: list[StudyRun] = [*trials, *(study.run(arm, seed) for seed in study.seeds)]
        for run in runs:
            if run.name in results.records:
                yield _row(study, results, run, results.records[run.name])


def _row(study: ArmDesign, results: Results, run: StudyRun, record: Record) -> dict[str, Any]:
    scores: Mapping[str, float] = {item["name"]: item["top1"] for item in record["evaluations"]}
    return {
        "arm": run.rates,
        "run": run.name,
        "kind": run.kind,
        "seed": run.seed,
        "peak_lr": run.peak or results.peaks.get(run.rates),
        "samples": record["samples"],
        "cost": round(study.cost(run, results.times, record["samples"]), 1),
        "seconds": record["seconds"],
        **{name: scores.get(name) for name in (VALIDATION, *study.tests)},
    }
