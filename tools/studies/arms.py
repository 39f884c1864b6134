"""Studies of arms that train at equal measured cost with paired seeds: `ArmStudy` needs a description only.

This file is the page of such a study: answers, differences of equal seeds, scores, figures, method, the runs as CSV.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.common.text import percent
from jobs.reporting import charts, paired
from jobs.reporting.charts import Level, Mark, Plot, Series
from jobs.reporting.document import Block, Figure, Table, Text, heading
from jobs.reporting.outcomes import csv_text
from jobs.reporting.paired import Difference
from tools.studies import results as study_results
from tools.studies.arms_design import Arm, ArmDesign, Round, SmallImages
from tools.studies.page import interval, paragraphs, rates_table
from tools.studies.results import Record, Results
from tools.studies.study import TRIAL_SEED, VALIDATION, StudyRun

__all__ = ["Arm", "ArmStudy", "Round", "SmallImages"]

DIFFERENCES = """\
Points of zero-shot top-1: first arm minus second, paired by seed (same seed: same order, crops and initial weights). In
brackets: the 95 % interval of the mean by Student's t over seeds. The verdict is for {test}: more or less if the
interval excludes 0, else undecided. The interval covers the variation of training, not the choice of {classes}test
pictures, and it is not widened for multiple comparisons."""

SCORES = """\
Zero-shot top-1 in per cent: the mean, in brackets each seed. {chance}Cost: core-seconds of training by the
calibration."""

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

Spent: {spent:,.0f} s of training in {count} complete runs, as measured while they ran, on a machine that may have been
shared. By the calibration, the complete plan takes {planned:,.0f} core-seconds, which is {minutes:.0f} minutes on two
idle cores, plus some minutes for start-up and evaluation."""

TRIALS = """\
{count} per arm, the same in all arms, one trial each with seed {seed}, which no compared run has; trials have
{trial:g} of the length. The best on the validation vendor ({validation}) is used. Nothing else was tuned in any arm.
{name}/choices.json records the choice, so that another machine trains the same arms."""

UNTRIED = "The peak is {peak:g} in all arms. It was not tuned, so that an arm may lack its best one."

TUNING = """\
Tuning runs. Each starts from the last weights of the run with the same seed, with fresh optimizer moments, and gets
{share:g} % of its cost, which the table adds to that of the run; its samples are its own. For comparison, the run also
continues for the same time with its mask, because more training alone may help. Learning rates are chosen the same way,
by trials of the full length.

"""


class ArmStudy(ArmDesign):
    """A study of arms, with its page; ``ArmDesign`` describes the fields."""

    def sections(self, results: Results) -> list[Block]:
        blocks = [*answers(self, results), *arms(self, results)]
        drawn = [course(self, results), figure_of_differences(self, results)]
        blocks += [figure for figure in drawn if not figure.plots[0].empty]
        return blocks + method(self, results)

    def files(self, results: Results) -> dict[str, str]:
        """results.csv: one row per complete run."""
        if not results.records:
            return {}
        return {"results.csv": csv_text(list(rows(self, results)))}


def records(study: ArmDesign, results: Results, arm: Arm) -> dict[int, Record]:
    """Seed -> record of the complete runs of an arm."""
    runs = (study.run(arm, seed) for seed in study.seeds)
    return {run.seed: results.records[run.name] for run in runs if run.name in results.records}


def scores(study: ArmDesign, results: Results, arm: str, name: str) -> dict[int, float]:
    """Seed -> score of an arm on a set."""
    return study_results.scores(records(study, results, study.arms[arm]), name)


# -- results -----------------------------------------------------------------------------------------------------------


def differences(study: ArmDesign, results: Results, name: str) -> dict[tuple[str, str], Difference | None]:
    """(arm, compared with) -> paired difference on the set; None if too few pairs are complete."""
    return {
        (first, second): paired.difference(scores(study, results, first, name), scores(study, results, second, name))
        for _, first, second in study.questions
    }


def answers(study: ArmDesign, results: Results) -> list[Block]:
    """One sentence per question, and the table of differences."""
    test = study.tests[0]
    columns = {name: differences(study, results, name) for name in (*study.tests, VALIDATION)}
    cells = []
    sentences = []
    by_seed = f"by seed, {test}"
    for number, (question, first, second) in enumerate(study.questions, 1):
        main = columns[test][first, second]
        row = {"no.": str(number), "question": question, "arm": first, "minus": second}
        row |= {name: _interval(column[first, second]) for name, column in columns.items()}
        firsts = scores(study, results, first, test)
        seconds = scores(study, results, second, test)
        pairs = [f"{100 * (firsts[seed] - seconds[seed]):+.1f}" for seed in sorted(firsts.keys() & seconds.keys())]
        row[by_seed] = ", ".join(pairs) or "-"
        cells.append(row | {"verdict": "-" if main is None else main.verdict})
        sentences.append(_sentence(first, second, main, test))
    left = ["no.", "question", "arm", "minus", by_seed, "verdict"]
    note = DIFFERENCES.format(test=test, classes=_classes(study, results))
    return [
        heading("Results"),
        *map(Text, sentences),
        heading("Paired differences"),
        Table(cells, text=left),
        *paragraphs(note),
    ]


def _sentence(first: str, second: str, difference: Difference | None, test: str) -> str:
    if difference is None:
        return f"{first} against {second}: no answer, fewer than {paired.LEAST} pairs are complete."
    verdicts = {
        "more": "is more accurate than",
        "less": "is less accurate than",
        "undecided": "does not differ significantly from",
    }
    return f"{first} {verdicts[difference.verdict]} {second}: {_interval(difference)} points on {test}."


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return interval(difference.mean, difference.low, difference.high)


def _test_facts(study: ArmDesign, results: Results, field: str) -> Any:
    """A field of the scores on the first test set; None if no record has it."""
    for each in results.records.values():
        for item in each["evaluations"]:
            if item["name"] == study.tests[0] and item.get(field):
                return item[field]
    return None


def _classes(study: ArmDesign, results: Results) -> str:
    pictures = _test_facts(study, results, "n")
    if pictures:
        return f"{pictures:,} "
    return ""


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
    chance = _test_facts(study, results, "chance")
    note = SCORES.format(chance=f"Chance is {percent(chance, 2)}. " if chance else "")
    return [heading("Arms"), Table(cells, text=["arm", *study.tests, VALIDATION]), *paragraphs(note)]


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


def course(study: ArmDesign, results: Results) -> Figure:
    """Validation accuracy against calibrated cost during training, for arms from scratch, one line per seed."""
    series = []
    for style, arm in enumerate(study.rounds[0].arms):
        lines = []
        for seed, each in records(study, results, arm).items():
            run = study.run(arm, seed)
            line = [(study.cost(run, results.times, p["samples"]), 100 * p["top1"]) for p in each["curve"]]
            if line:
                lines += [line]
        series.append(Series(arm.name, lines, (), style))
    validation = study.validation["manifest"].rpartition("/")[2]
    label = f"{validation} (validation), top-1, %"
    plot = Plot("core-seconds of training, calibrated", label, series)
    return _figure("course", plot, series, f"Accuracy on {validation} during training, one line per seed.")


def figure_of_differences(study: ArmDesign, results: Results) -> Figure:
    """The differences as marks, one series per test vendor."""
    series = []
    for style, name in enumerate(study.tests):
        marks = [
            Mark(number + 0.2 * style, d.mean, d.low, d.high, f"{first} minus {second}: {_interval(d)}")
            for number, ((first, second), d) in enumerate(differences(study, results, name).items(), 1)
            if d is not None
        ]
        series.append(Series(name, (), marks, style))
    plot = Plot("number of the comparison in the table", "difference, points", series, levels=[Level(0, "")])
    return _figure("differences", plot, series, "Paired differences with 95 % intervals.")


def _figure(name: str, plot: Plot, series: Sequence[Series], caption: str) -> Figure:
    words = {"circle": "circles", "square": "squares", "triangle": "triangles", "diamond": "diamonds"}
    shapes = ", ".join(f"{s.name} {words[charts.look(s.style)[2]]}" for s in series).capitalize()
    return Figure(name, [plot], f"{caption} {shapes}.")


# -- method ------------------------------------------------------------------------------------------------------------


def method(study: ArmDesign, results: Results) -> list[Block]:
    """How the study was done, its trials, and where all scores are."""
    every = list(results.records.values())
    views = {each["preprocess"] for each in every} or {"crop_resize"}
    validation = study.validation["manifest"].rpartition("/")[2]
    rates = UNTRIED.format(peak=study.rates[0])
    if len(study.rates) > 1:
        rates = TRIALS.format(
            count=len(study.rates), seed=TRIAL_SEED, trial=study.trial, validation=validation, name=study.name
        )
    tuning = ""
    if any(arm.after for arm in study.arms.values()):
        tuning = TUNING.format(share=100 * study.tuning)
    text = METHOD.format(
        **results.calibration["machine"], time=results.calibration["time"], seconds=study.seconds, rates=rates,
        tuning=tuning, seeds=", ".join(map(str, study.seeds)), tests=" and ".join(study.tests),
        views=f"evaluate.preprocess: {', '.join(sorted(views))}",
        spent=sum(each["seconds"] for each in every), count=len(every), name=study.name,
        planned=study.core_seconds(), minutes=study.core_seconds() / 120,
    )  # fmt: skip
    blocks = [heading("Method"), *paragraphs(text)]
    cells = rates_table(results, ("arm",), [((arm,), arm) for arm in study.arms if results.trials[arm]])
    if cells:
        blocks += [heading("Trials"), Table(cells, text=list(cells[0])[1:])]
    complete = f"All runs with their scores: {study.name}/results.csv. {study.about}"
    return [*blocks, *paragraphs(complete)]


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
