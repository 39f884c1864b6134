"""Writes docs/records.md from the rows, the trials, and the committed results of the studies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flip.runs.rundir import read_json, sorted_glob, write_text
from jobs.pages.document import Block, Table, Text, heading
from jobs.pages.markdown import markdown
from lab.records import rows as records
from lab.records.rows import GOAL, REFERENCE_SECONDS, SET, RecordRow
from lab.records.rule import MARGIN, SEEDS, false_rate, half_width
from lab.studies.arms import BASELINE
from lab.studies.cheapest import STUDY
from lab.studies.engine.study import read

STUDIES = ("study", "cheapest")
"""Folders of docs whose runs have three seeds each."""
HEAD = f"""\
# Records: the cheapest road to {100 * GOAL:.1f} %

`python -m lab.records` writes this page from the files in docs/records. It lists recipes for the emoji of `flip
demo_data` by the core-seconds of training with which they reach {100 * GOAL:.1f} % zero-shot accuracy on {SET}, whose
drawings training never sees. That is the accuracy of the arm clipa of [cheapest.md](cheapest.md), which takes
{REFERENCE_SECONDS:.0f} core-seconds. The recipes are the runs of `sweeps/records.yaml`. A recipe may set every field of
a configuration, the model included. Only the training set and the evaluation are fixed. The last row is a baseline
without a model, the nearest training picture at 16 x 16 pixels: {{}}

- **Accuracy.** A row is {SEEDS} runs with new seeds, from 100 on. A recipe has reached the goal if the 95 % interval of
  the mean lies above it (Student's t). The interval covers seeds, not images.
- **Cost.** Processor seconds per sample, the median over intervals between metric lines, times samples. Probes of
  the reference run at the same time on the same cores, and their cost defines the unit. So another processor, or
  other load, gives about the same number. The load is that of the last minute, and about 2 without other work.
- **Record.** A recipe that has reached the goal at least {100 * MARGIN:.0f} % cheaper than every row before it.
- **Choices** use the validation set alone (`noto-v1`), with other seeds. The test set is scored once, at the end of
  the runs of a row.

`make records ROW=NAME` measures a row again and writes its file and this page. It needs two idle cores."""


def write(docs: Path) -> Path:
    """Write the page and return its path. Raises ConfigError, OSError."""
    folder = docs / "records"
    rows = records.read(folder)
    pixels = read(STUDY, docs).pixels(SET)
    blocks = [*_table(rows, pixels), *_rule(docs, rows), *_tried(folder)]
    page = docs / "records.md"
    write_text(page, f"{HEAD.format(_compared(rows, pixels))}\n\n{markdown(blocks, 'records')}")
    return page


def _compared(rows: Sequence[RecordRow], pixels: float | None) -> str:
    """The end of the sentence about the baseline."""
    if pixels is None:
        return "not computed."
    above = [row.run for row in rows if np.mean(row.values) > pixels]
    if above:
        return f"{', '.join(above)} exceed its {100 * pixels:.1f} %."
    return f"no recipe reaches its {100 * pixels:.1f} %, so that all are early training."


def _table(rows: Sequence[RecordRow], pixels: float | None) -> list[Block]:
    if not rows:
        return [heading("Rows", 2), Text("No recipe has been measured with five seeds yet.")]
    names = records.records(rows)
    cells = []
    for row in rows:
        mean = 100 * float(np.mean(row.values))
        width = 100 * half_width(row.values)
        verdict = "reached"
        if row.run in names:
            verdict = "record"
        elif not row.has_reached:
            verdict = "not reached"
        cells.append({
            "recipe": row.run, "core-seconds": f"{row.seconds:.0f}",
            f"{SET}, %": f"{mean:.1f} ({mean - width:.1f} to {mean + width:.1f})", "verdict": verdict,
            "samples": f"{row.samples:,}", "commit": row.commit, "date": row.date,
            "processor": row.machine["processor"], "load": f"{row.machine['load']:.1f}",
        })  # fmt: skip
    if pixels is not None:
        baseline = {"recipe": BASELINE, "core-seconds": "0", f"{SET}, %": f"{100 * pixels:.1f}"}
        cells.append(dict.fromkeys(cells[0], "-") | baseline)
    return [heading("Rows", 2), Table(cells, text=("recipe", "verdict", "commit", "date", "processor"))]


def _rule(docs: Path, rows: Sequence[RecordRow]) -> list[Block]:
    """How often the rule accepts a recipe that is exactly at the goal."""
    groups = seed_groups(docs)
    lines = [{
        "seeds of": f"{len(groups)} arms of study.md and cheapest.md, {sum(map(len, groups))} runs",
        "false, %": f"{100 * false_rate(groups):.1f}",
    }]  # fmt: skip
    lines += [{"seeds of": row.run, "false, %": f"{100 * false_rate([row.values]):.1f}"} for row in rows]
    note = (
        "Seeds are drawn with replacement from the deviations of equal runs, moved so that their mean is the goal. A"
        " row of such a recipe would be false. With normal scores the share is 2.5 %. At most 5 % are accepted."
    )
    return [heading("How often the rule is wrong", 2), Text(note), Table(lines, text=("seeds of",))]


def _tried(folder: Path) -> list[Block]:
    cells = [{"date": each.date, "what": each.what, "validation": each.result} for each in records.trials(folder)]
    if not cells:
        return []
    note = "One seed each, chosen by nothing but the validation set (890 images, chance 0.1 %)."
    return [heading("Tried", 2), Text(note), Table(cells, text=("date", "what", "validation"))]


def seed_groups(docs: Path) -> list[list[float]]:
    """Scores on SET of the compared runs of STUDIES, a group for each arm."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for study in STUDIES:
        for path in sorted_glob(docs / study / "results", "*.json"):
            record = read_json(path) or {}
            if record.get("kind") == "run":
                (item,) = [each for each in record["evaluations"] if each["name"] == SET]
                groups[study, path.stem.partition("-s")[0]].append(float(item["top1"]))
    return [scores for scores in groups.values() if len(scores) > 1]
