"""Writes the page of a study (question, method, results), its figures, and the runs as CSV."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flip.runs.files import output_folder
from flip.runs.rundir import write_text
from jobs.common.text import percent, table
from jobs.reporting import charts, paired
from jobs.reporting.charts import Level, Mark, Plot, Series
from jobs.reporting.document import Block, Figure, Table, Text, heading
from jobs.reporting.figures import files
from jobs.reporting.markdown import markdown
from jobs.reporting.outcomes import csv_text
from jobs.reporting.paired import Difference
from tools.studies import arm_scores, design
from tools.studies.design import SEEDS, Arm, StudyDesign, Times
from tools.studies.runner import Study, seconds_per_sample

TESTS = ("twemoji", "openmoji")
"""The test vendors; the verdicts are about the first."""

DIFFERENCES = """\
Points of zero-shot top-1: first arm minus second, paired by seed (same seed: same order, crops and initial weights). In
brackets: the 95 % interval of the mean by Student's t over seeds. The verdict is for twemoji: more or less if the
interval excludes 0, else undecided. The interval covers the variation of training, not the choice of 1,172 test
pictures, and it is not widened for multiple comparisons."""

SCORES = """\
Zero-shot top-1 in per cent: the mean, in brackets each seed. Chance is 0.09. Cost: core-seconds of training by the
calibration."""


def plan(plan_of: StudyDesign, times: Times) -> str:
    """The arms as a text table."""
    hours = plan_of.core_seconds() / 3600
    cost = f"{hours:.2f} core-hours of training for {len(SEEDS)} seeds, start-up and evaluation not counted"
    return f"{table([_length(plan_of, arm, times) for arm in plan_of.arms.values()])}\n{cost}"


def write(docs: Path, calibration: Mapping[str, Any], study: Study) -> list[Path]:
    """Write NAME.md, and figures and results.csv in NAME/; returns the paths. Raises OSError."""
    times = seconds_per_sample(calibration)
    name = study.design.name
    folder = docs / name
    output_folder(folder)
    figures = []
    if study.runs:
        figures = [course(study, times), figure_of_differences(study)]
    content = {f"{file}.svg": charts.svg(plot) for figure in figures for file, plot in files(figure)}
    if study.runs or study.trials:
        content["results.csv"] = csv_text(list(rows(study, times)))
    for file, text in content.items():
        write_text(folder / file, text)
    blocks = [*answers(study), *results(study, times), *figures, *method(calibration, study)]
    write_text(docs / f"{name}.md", f"{study.design.head}\n\n{markdown(blocks, name)}")
    return [docs / f"{name}.md", *(folder / file for file in content)]


# -- results -----------------------------------------------------------------------------------------------------------


def differences(study: Study, name: str) -> dict[tuple[str, str], Difference | None]:
    """(arm, compared with) -> paired difference on the set; None if too few pairs are complete."""
    return {
        (first, second): paired.difference(
            *(arm_scores.scores(study.design.arms[arm], study.runs, name) for arm in (first, second))
        )
        for _, first, second in study.design.compared
    }


def answers(study: Study) -> list[Block]:
    """One sentence per comparison, and the table of differences."""
    columns = {name: differences(study, name) for name in (*TESTS, "validation")}
    cells = []
    sentences = []
    for number, (question, *pair) in enumerate(study.design.compared, 1):
        first, second = pair
        main = columns[TESTS[0]][first, second]
        row = {"no.": str(number), "question": question, "arm": first, "minus": second}
        row |= {name: _interval(column[first, second]) for name, column in columns.items()}
        if main is None:
            row["by seed, twemoji"] = "-"
        else:
            row["by seed, twemoji"] = ", ".join(f"{value:+.1f}" for value in main.each.values())
        cells.append(row | {"verdict": "-" if main is None else main.verdict})
        sentences.append(_sentence(first, second, main))
    left = ["no.", "question", "arm", "minus", "by seed, twemoji", "verdict"]
    paired: list[Block] = [heading("Paired differences"), Table(cells, text=left), *paragraphs(DIFFERENCES)]
    return [heading("Results"), *map(Text, sentences), *paired]


def _sentence(first: str, second: str, difference: Difference | None) -> str:
    if difference is None:
        return f"{first} against {second}: no answer, fewer than {paired.LEAST} pairs are complete."
    verdicts = {
        "more": "is more accurate than",
        "less": "is less accurate than",
        "undecided": "does not differ significantly from",
    }
    return f"{first} {verdicts[difference.verdict]} {second}: {_interval(difference)} points on {TESTS[0]}."


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return f"{difference.mean:+.1f} ({difference.low:+.1f} to {difference.high:+.1f})"


def paragraphs(text: str) -> list[Block]:
    return [Text(" ".join(paragraph.split())) for paragraph in text.split("\n\n")]


def results(study: Study, times: Times) -> list[Block]:
    """Table of arms: design, cost, and the score of each seed."""
    cells = []
    for arm in study.design.arms.values():
        row = _length(study.design, arm, times)
        peak = study.chosen.get(arm.name)
        row["peak lr"] = "-" if peak is None else f"{peak:g}"
        for name in (*TESTS, "validation"):
            values = list(arm_scores.scores(arm, study.runs, name).values())
            if values:
                row[name] = f"{percent(sum(values) / len(values))} ({', '.join(map(percent, values))})"
            else:
                row[name] = "-"
        cells.append(row)
    return [heading("Arms"), Table(cells, text=["arm", *TESTS, "validation"]), *paragraphs(SCORES)]


def _length(plan_of: StudyDesign, arm: Arm, times: Times) -> dict[str, str]:
    lengths = design.stages(arm, arm.peaks[0], times)
    seconds = design.cost(arm, times, lengths)
    samples = sum(stage["samples"] for stage in lengths.values())
    if arm.after:
        source = plan_of.arms[arm.after]
        seconds += design.cost(source, times, design.stages(source, source.peaks[0], times))
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


def course(study: Study, times: Times) -> Figure:
    """Validation accuracy against calibrated cost during training, for arms from scratch, one line per seed."""
    series = []
    for style, arm in enumerate(study.design.rounds[0].arms):
        lines = []
        lengths = design.stages(arm, arm.peaks[0], times)
        for outcome in (study.runs[arm.run(seed)] for seed in SEEDS if arm.run(seed) in study.runs):
            points = [
                (design.cost(arm, times, lengths, point["samples"]), point["evaluations"]) for point in outcome.curve()
            ]
            line = [(x, 100 * item["top1"]) for x, items in points for item in items if item["name"] == "validation"]
            if line:
                lines += [line]
        series.append(Series(arm.name, lines, (), style))
    plot = Plot("core-seconds of training, calibrated", "noto-v1 (validation), top-1, %", series)
    return _figure("course", plot, series, "Accuracy on noto-v1 during training, one line per seed.")


def figure_of_differences(study: Study) -> Figure:
    """The differences as marks, one series per test vendor."""
    series = []
    for style, name in enumerate(TESTS):
        marks = [
            Mark(number + 0.2 * style, d.mean, d.low, d.high, f"{first} minus {second}: {_interval(d)}")
            for number, ((first, second), d) in enumerate(differences(study, name).items(), 1)
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


METHOD = """\
Cost. A run is one process on one core (data.workers 0), so its processor time, which other load hardly changes, is its
total cost, including reading, decoding and cropping. Seconds per sample were measured once, before all runs, with two
runs side by side, on {cores} cores of {processor} (load {load} before it, {time} UTC; {name}/calibration.json). Every
arm gets {seconds:g} core-seconds; the step counts follow from that and were fixed before training. Later measurements
do not change them, so runs may share the machine.

Learning rates. {peaks} per arm, the same in all arms, one trial each with seed {trial_seed}, which no compared run has;
trials have {trial:g} of the length. The best on the validation vendor (noto-v1) is used. Nothing else was tuned in any
arm. {name}/choices.json records the choice, so that another machine trains the same arms.

{tuning}Tests. Every arm has seeds {seeds}. twemoji and openmoji are vendors that training and selection never see.
Trials do not load them; a compared run scores them once, when it is complete. The study was run once.

Evaluation view. {views} (docs/recipe.md): scores of an export in open_clip, which resizes before it crops, can differ
for pictures that are not square.

Spent: {spent:,.0f} s of training in {count} complete runs, as measured while they ran, on a machine that may have been
shared. By the calibration, the complete plan takes {planned:,.0f} core-seconds, which is {minutes:.0f} minutes on two
idle cores, plus some minutes for start-up and evaluation."""

TUNING = """\
Tuning runs. Each starts from the last weights of the run with the same seed, with fresh optimizer moments, and gets
{share:g} % of its cost, which the table adds to that of the run; its samples are its own. For comparison, the run also
continues for the same time with its mask, because more training alone may help. Learning rates are chosen the same way,
by trials of the full length.

"""

COMPLETE_TABLE = """\
All runs with their scores: {name}/results.csv. A masked step gains less here than in the paper: decoding, the text
tower and the optimizer cost the same with and without a mask."""


def method(calibration: Mapping[str, Any], study: Study) -> list[Block]:
    outcomes = [*study.runs.values(), *study.trials.values()]
    # Runs from before this field have its default.
    views = {outcome.settings.get("evaluate.preprocess", "crop_resize") for outcome in outcomes} or {"crop_resize"}
    has_tunings = any(arm.after for arm in study.design.arms.values())
    text = METHOD.format(
        **calibration["machine"], time=calibration["time"], seconds=design.SECONDS,
        tuning=TUNING.format(share=100 * design.TUNING) if has_tunings else "",
        peaks=len(design.PEAKS), trial_seed=design.TRIAL_SEED, trial=design.TRIAL, seeds=", ".join(map(str, SEEDS)),
        views=f"evaluate.preprocess: {', '.join(sorted(views))}",
        spent=sum(outcome.result["seconds"] for outcome in outcomes), count=len(outcomes), name=study.design.name,
        planned=study.design.core_seconds(), minutes=study.design.core_seconds() / 120,
    )  # fmt: skip
    complete = paragraphs(COMPLETE_TABLE.format(name=study.design.name))
    return [heading("Method"), *paragraphs(text), *_trials(study), *complete]


def _trials(study: Study) -> list[Block]:
    """Validation scores of all trials; a choice at the edge of the tried range is marked."""
    cells = []
    column = "validation top-1, %, by peak lr"
    for arm in (arm for arm in study.design.arms.values() if arm.name in study.scores):
        scores = study.scores[arm.name]
        chosen = study.chosen[arm.name]
        edge = ""
        if chosen in (arm.peaks[0], arm.peaks[-1]):
            edge = " (at the edge of the range)"
        best, _ = arm_scores.choose(arm, study.trials)
        other = ""
        if best != chosen:
            other = f" (these trials: {best:g})"
        values = ", ".join(f"{peak:g}: {percent(value)}" for peak, value in scores.items())
        cells.append({"arm": arm.name, column: values, "chosen": f"{chosen:g}{edge}{other}"})
    if cells:
        return [heading("Trials"), Table(cells, text=[column, "chosen"])]
    return []


def rows(study: Study, times: Times) -> Iterator[dict[str, Any]]:
    """One row per complete run; scores are shares, ``cost`` calibrated core-seconds of its own training."""
    for arm in study.design.arms.values():
        full = design.stages(arm, arm.peaks[0], times)
        if arm.after:
            half = full
        else:
            half = design.stages(arm, arm.peaks[0], times, design.TRIAL)
        trials = [("trial", arm.trial(peak), peak, design.TRIAL_SEED, study.trials) for peak in arm.peaks]
        runs = [("run", arm.run(seed), study.chosen.get(arm.name), seed, study.runs) for seed in SEEDS]
        for kind, name, peak, seed, outcomes in (*trials, *runs):
            if name in outcomes:
                result = outcomes[name].result
                lengths = half if kind == "trial" else full
                yield {
                    "arm": arm.name,
                    "run": name,
                    "kind": kind,
                    "seed": seed,
                    "peak_lr": peak,
                    "samples": result["samples"],
                    "cost": round(design.cost(arm, times, lengths, result["samples"]), 1),
                    "seconds": round(result["seconds"], 1),
                    **{vendor: arm_scores.score(outcomes[name], vendor) for vendor in ("validation", *TESTS)},
                }
