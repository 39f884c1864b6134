"""Writes docs/study.md (question, method, results), its figures, and the runs as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flip.runs.rundir import write_text
from jobs.common.text import percent, table
from jobs.reporting import charts
from jobs.reporting.charts import Mark, Plot, Series
from jobs.reporting.document import Block, Figure, Table, Text, heading
from jobs.reporting.figures import files
from jobs.reporting.markdown import markdown
from jobs.reporting.outcomes import csv_text
from tools.masking_study import design, paired_stats
from tools.masking_study.design import COMPARED, ROUNDS, SEEDS, Arm, Round, Times
from tools.masking_study.paired_stats import Difference
from tools.masking_study.runner import Found

TESTS = ("twemoji", "openmoji")
"""The test vendors; the verdicts are about the first."""

HEAD = """\
# A small study: what does masking buy at equal cost?

`make study` makes this page (`tools/study.py` writes it from the runs; nothing here is typed in). It asks the paper's
questions at a size that two CPU cores train in less than 100 minutes (slower ones, or shared ones, take longer to the
same end), on the real pictures and captions of `tools/demo_data.py`: 1,172 classes of emoji, six sets of drawings to
train on. It is no replication of the paper: its model, data and lengths are smaller by factors of a hundred to a
hundred thousand.

    python tools/demo_data.py
    make study                          # ordinary runs, resumable: the same command goes on

Another machine trains the same step counts at the same learning rates (study/choices.json, whatever its trials say: it
runs them last, and `python tools/study.py --page` writes the page of what is complete), and its means should lie within
the intervals below, made wider by the square root of two: they are another draw of as many seeds. On the same kind of
processor with the same packages runs end with the same bits. `python tools/study.py --calibrate` measures step times
anew, which makes it another study."""


def plan(times: Times) -> str:
    """The arms as a text table."""
    rows = [_length(one, times) for each in ROUNDS for one in each.arms]
    hours = design.core_seconds() / 3600
    return (
        f"{table(rows)}\n{hours:.2f} core-hours of training for {len(SEEDS)} seeds, start-up and evaluation not counted"
    )


def write(docs: Path, calibration: Mapping[str, Any], found: Found) -> list[Path]:
    """Write study.md, and figures and results.csv in study/; returns the paths. Raises OSError."""
    from tools.masking_study.calibration import times

    folder = docs / "study"
    folder.mkdir(parents=True, exist_ok=True)
    each_second = times(calibration)
    drawn: list[Block] = [course(found, each_second), differences_drawn(found)] if found.runs else []
    written = []
    for block in drawn:
        for name, plot in files(block):
            write_text(folder / f"{name}.svg", charts.svg(plot))
            written.append(folder / f"{name}.svg")
    if found.runs or found.trials:
        write_text(folder / "results.csv", csv_text(rows(found, each_second)))
        written.append(folder / "results.csv")
    body = markdown([*answers(found), *results(found, each_second), *drawn, *method(calibration, found)], "study")
    write_text(docs / "study.md", f"{HEAD}\n\n{body}")
    return [docs / "study.md", *written]


# -- what came out -----------------------------------------------------------------------------------------------------


def differences(found: Found, name: str) -> dict[tuple[str, str], Difference | None]:
    """(arm, compared with) -> paired difference on the set; None if too few pairs are complete."""
    made = {}
    for _, ours, theirs in COMPARED:
        both = [paired_stats.scores(design.arm(arm), SEEDS, found.runs, name) for arm in (ours, theirs)]
        made[ours, theirs] = paired_stats.difference(*both)
    return made


def answers(found: Found) -> list[Block]:
    """One sentence per comparison, and the table of differences."""
    first = differences(found, TESTS[0])
    columns = {name: differences(found, name) for name in (*TESTS, "validation")}
    cells, said = [], []
    for number, (question, ours, theirs) in enumerate(COMPARED, 1):
        main = first[ours, theirs]
        row = {"no.": str(number), "question": question, "arm": ours, "less": theirs}
        row |= {name: _interval(column[ours, theirs]) for name, column in columns.items()}
        row |= {"by seed, twemoji": _by_seed(main), "verdict": "-" if main is None else main.verdict}
        cells.append(row)
        said.append(_sentence(ours, theirs, main))
    words = (
        "Points of zero-shot top-1, first arm less second, paired by seed (same seed: same order, crops and first"
        " weights); in brackets the 95 % interval of the mean by Student's t over seeds. The verdict is twemoji's:"
        " more or less where the interval leaves out 0, else undecided. The interval is of the luck of training, not of"
        " the choice of 1,172 test pictures, and it is not widened for there being several comparisons."
    )
    left = ["no.", "question", "arm", "less", "by seed, twemoji", "verdict"]
    return [
        heading("What came out"),
        *(Text(f"{sentence}") for sentence in said),
        heading("Paired differences"),
        Table(cells, text=left),
        Text(words),
    ]


def _sentence(ours: str, theirs: str, found: Difference | None) -> str:
    if found is None:
        return f"{ours} against {theirs}: no answer, fewer than {paired_stats.LEAST} pairs are complete."
    told = {"more": "is more accurate than", "less": "is less accurate than", "undecided": "is not told apart from"}
    return f"{ours} {told[found.verdict]} {theirs}: {_interval(found)} points on {TESTS[0]}."


def _interval(found: Difference | None) -> str:
    return "-" if found is None else f"{found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def _by_seed(found: Difference | None) -> str:
    return "-" if found is None else ", ".join(f"{value:+.1f}" for value in found.each.values())


def results(found: Found, times: Times) -> list[Block]:
    """Table of arms: design, cost, and the score of each seed."""
    made = []
    for each in ROUNDS:
        for one in each.arms:
            row = _length(one, times)
            peak = found.chosen.get(one.name)
            row["peak lr"] = "-" if peak is None else f"{peak:g}"
            for name in (*TESTS, "validation"):
                values = list(paired_stats.scores(one, SEEDS, found.runs, name).values())
                mean = f"{percent(sum(values) / len(values))} ({', '.join(map(percent, values))})" if values else "-"
                row[name] = mean
            made.append(row)
    words = (
        "Zero-shot top-1, per cent: the mean, in brackets each seed. Chance is 0.09. Cost: core-seconds of training by"
        " the calibration, with those of the run that a tuning begins with. Samples of a tuning are its own."
    )
    return [heading("Arms"), Table(made, text=["arm", *TESTS, "validation"]), Text(words)]


def _length(one: Arm, times: Times) -> dict[str, str]:
    part = design.stage(one, one.peaks[0], times)
    spent = part["samples"] * times[one.work]
    if one.after:
        before = design.arm(one.after)
        spent += design.stage(before, before.peaks[0], times)["samples"] * times[before.work]
    return {
        "arm": one.name,
        "mask": one.mask,
        "batch": str(one.batch),
        "ms/sample": f"{1000 * times[one.work]:.3g}",
        "steps": f"{part['samples'] // one.batch:,}",
        "samples": f"{part['samples']:,}",
        "cost": f"{spent:.0f}",
    }


# -- figures -----------------------------------------------------------------------------------------------------------


def course(found: Found, times: Times) -> Figure:
    """Validation accuracy against calibrated cost during training, for arms from scratch, one line per seed."""
    series = []
    for style, one in enumerate(ROUNDS[0].arms):
        lines = []
        for outcome in _complete(one, found):
            points = [(point["samples"] * times[one.work], point["evaluations"]) for point in outcome.curve()]
            line = [(x, 100 * item["top1"]) for x, items in points for item in items if item["name"] == "validation"]
            lines += [line] if line else []
        series.append(Series(one.name, lines, (), style))
    names = [(s.name, s.style) for s in series]
    plot = Plot("core-seconds of training, calibrated", "validation vendor, top-1, %", series)
    return Figure("course", [plot], f"The way there, a line per seed. {_shapes(names)}", names)


def differences_drawn(found: Found) -> Figure:
    """The differences as marks, one series per test vendor."""
    series = []
    for style, name in enumerate(TESTS):
        marks = []
        for number, ((ours, theirs), one) in enumerate(differences(found, name).items(), 1):
            if one is not None:
                at = number + 0.2 * style
                marks.append(Mark(at, one.mean, one.low, one.high, f"{ours} less {theirs}: {_interval(one)}"))
        series.append(Series(name, (), marks, style))
    names = [(s.name, s.style) for s in series]
    plot = Plot("number of the comparison in the table", "difference, points", series, zero=False, level=(0, ""))
    return Figure("differences", [plot], f"Paired differences with 95 % intervals. {_shapes(names)}", names)


def _shapes(names: Iterable[tuple[str, int | None]]) -> str:
    from jobs.reporting.charts import look

    words = {"circle": "circles", "square": "squares", "triangle": "triangles", "diamond": "diamonds"}
    told = [f"{name} {words[look(style)[2]]}" for name, style in names]
    return f"{', '.join(told).capitalize()}."


def _complete(one: Arm, found: Found) -> list[Any]:
    return [found.runs[one.run(seed)] for seed in SEEDS if one.run(seed) in found.runs]


# -- how ---------------------------------------------------------------------------------------------------------------


def method(calibration: Mapping[str, Any], found: Found) -> list[Block]:
    machine = calibration["machine"]
    spent = sum(outcome.result["seconds"] for outcome in [*found.runs.values(), *found.trials.values()])
    count = len(found.runs) + len(found.trials)
    rules = [
        "Cost. One process of one core is the whole run (data.workers 0), so its processor time, which other load does"
        " not move much, is all that it costs: reading, decoding and cropping included. Seconds per sample were"
        f" measured once, before any run, two runs side by side, on {machine['cores']} cores of"
        f" {machine['processor']} (load"
        f" {machine['load']} before it, {calibration['time']} UTC; study/calibration.json). Every arm gets"
        f" {design.SECONDS:g} core-seconds, a tuning {100 * design.TUNING:g} % more; step counts follow from that by"
        " arithmetic and were fixed before training. From then on time decides nothing: runs may share the machine.",
        f"Learning rates. {len(design.PEAKS)} per arm, the same ones, one trial each of seed {design.TRIAL_SEED}, which"
        f" no compared run has, {design.TRIAL:g} of the length for arms from scratch, the full length for tunings."
        " The best on the validation vendor (noto-v1) is taken. Nothing else was tuned, for no arm. What was chosen"
        " stays in study/choices.json: another machine trains the same arms.",
        f"Runs. Seeds {', '.join(map(str, SEEDS))} in every arm. A tuning begins with the last weights of the run of"
        " the same seed, with fresh moments. Beside it the run goes on for as long with its mask, at a learning rate"
        " chosen alike, as more training alone may help.",
        "Tests. twemoji and openmoji are vendors that training and selection never see; trials do not load them, a"
        " compared run scores them once, when it is complete. There was one pass of the study.",
        f"Evaluation view. {_views(found)} (docs/recipe.md): scores of an export in open_clip, which resizes before it"
        " crops, can differ for pictures that are not square.",
        f"Spent: {spent:,.0f} s of training in {count} complete runs, as measured while they ran, on a machine that may"
        f" have been shared; by the calibration the whole plan is {design.core_seconds():,.0f} core-seconds, that is"
        f" {design.core_seconds() / 120:.0f} minutes on two idle cores, and start-up and evaluation some minutes more.",
    ]
    told = (
        "All runs with their scores: study/results.csv. A masked step gains less here than in the paper: decoding, the"
        " text tower and the optimiser cost the same with and without a mask."
    )
    return [heading("How it was done"), *map(Text, rules), *_trials(found), Text(told)]


def _views(found: Found) -> str:
    """The field for the order of resize and crop, with its value in the runs."""
    outcomes = [*found.runs.values(), *found.trials.values()]
    # Runs from before the field have the order that is its default.
    values = {outcome.settings.get("evaluate.preprocess", "crop_resize") for outcome in outcomes}
    values = values or {"crop_resize"}  # recipe emoji
    return f"evaluate.preprocess: {', '.join(sorted(values))}"


def _trials(found: Found) -> list[Block]:
    """Validation scores of all trials; a choice at the edge of the tried range is marked."""
    cells = []
    column = "validation top-1, %, by peak lr"
    for one in (one for each in ROUNDS for one in each.arms if one.name in found.scores):
        told = ", ".join(f"{peak:g}: {percent(value)}" for peak, value in found.scores[one.name].items())
        chosen = found.chosen[one.name]
        edge = " (edge of the tried)" if chosen in (one.peaks[0], one.peaks[-1]) else ""
        best, _ = paired_stats.choose(one, found.trials)
        other = f" (these trials: {best:g})" if best != chosen else ""
        cells.append({"arm": one.name, column: told, "chosen": f"{chosen:g}{edge}{other}"})
    return [heading("Trials"), Table(cells, text=[column, "chosen"])] if cells else []


def rows(found: Found, times: Times) -> list[dict[str, Any]]:
    """One row per complete run; scores are shares, ``cost`` calibrated core-seconds of its own training."""
    return [row for each in ROUNDS for row in _rows(each, found, times)]


def _rows(each: Round, found: Found, times: Times) -> Iterable[dict[str, Any]]:
    for one in each.arms:
        of_trials = [(one.trial(peak), peak, design.TRIAL_SEED, found.trials) for peak in one.peaks]
        of_runs = [(one.run(seed), found.chosen.get(one.name), seed, found.runs) for seed in SEEDS]
        for name, peak, seed, known in (*of_trials, *of_runs):
            if (outcome := known.get(name)) is None:
                continue
            samples = outcome.result["samples"]
            row: dict[str, Any] = {
                "arm": one.name,
                "run": name,
                "kind": "trial" if known is found.trials else "run",
                "seed": seed,
            }
            row |= {"peak_lr": peak, "samples": samples, "cost": round(samples * times[one.work], 1)}
            row["seconds"] = round(outcome.result["seconds"], 1)
            yield row | {s: paired_stats.score(outcome, s) for s in ("validation", *TESTS)}
