"""Further tables of the scaling study: all measures, learning rates, repeated runs, data and machine time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from flip.runs.rundir import read_json
from jobs.common.text import percent
from jobs.pages.document import Block, Table, heading
from lab.studies import scaling_design
from lab.studies.arms import BASELINES, PROBE_NOTE
from lab.studies.engine.design import VALIDATION
from lab.studies.engine.page import rates_table, section
from lab.studies.engine.results import is_zero_shot_test, score
from lab.studies.scaling_design import ScalingResults

PIXELS = BASELINES["nearest"]
DIGESTS = (
    "A set with several digests differs in the captions of at most 24 of 307,000 pictures. Before version 2 of the data"
    " they depended on the order of Python's sets, which differs between processes."
)


def sections(study: ScalingResults) -> list[Block]:
    """All tables of this module, in the order of the page."""
    blocks = [*measures(study), *learning_rates(study), *repeats(study)]
    return [*blocks, *data_sets(study), *leakage(study), *machine_time(study)]


def measures(study: ScalingResults) -> list[Block]:
    """Every score of every point: the mean over its seeds; the nearest training picture; chance."""
    points = {p: list(study.points(p).values()) for p in scaling_design.points() if study.points(p)}
    items = []
    if points:
        items = next(iter(points.values()))[0]["evaluations"]
    names = [item["name"] for item in items]
    lines = [
        (str(point), str(len(runs)), *(percent(fmean(score(run, name) for run in runs)) for name in names))
        for point, runs in points.items()
    ]
    for method, baseline in BASELINES.items():
        for data in scaling_design.DATA:
            pixels = [study.pixels(name, data, method) for name in names]
            if lines and any(value is not None for value in pixels):
                cells = ["-" if value is None else percent(value) for value in pixels]
                lines.append((f"{baseline}, {data} of the data", "-", *cells))
    chance = ("chance", "-", *(percent(item["chance"], 2) if item.get("chance") else "-" for item in items))
    families = ", ".join(item["name"] for item in items if is_zero_shot_test(item))
    note = f"top-1 in per cent. Zero-shot on the test families ({families}) and on validation; retrieval in both"
    note += " directions (-text, -image); linear probe on frozen features (-probe)."
    means = {data: mean_of_pixels(study, data) for data in scaling_design.DATA}
    known = [f"{percent(value)} with {data} of the data" for data, value in means.items() if value is not None]
    if known:
        note += f" {PIXELS.capitalize()} at 16 x 16 pixels (python -m lab.study --baseline),"
        note += " mean over the test families:"
        note += f" {', '.join(known)}. By colour or by shape, whichever is better on validation."
    probed = {data for data in scaling_design.DATA if study.pixels(VALIDATION, data, "probe") is not None}
    if probed:
        note += f" {PROBE_NOTE.strip()}"
        left = [data for data in scaling_design.DATA if data not in probed]
        if left:
            note += f" It was not computed with {' and '.join(left)} of the data."
    return section("All measures", "|".join(["point", "seeds", *names]), [*lines, chance] if lines else [], note)


def learning_rates(study: ScalingResults) -> list[Block]:
    """Validation scores of the trials; a choice at the edge of the tried range is marked."""
    cells = rates_table(study, ("model", "mask"), [(arm, work) for work, arm in scaling_design.WORKS.items()])
    return [heading("Learning rates", 3), Table(cells, text=list(cells[0])[2:])]


def repeats(study: ScalingResults) -> list[Block]:
    """Runs that were trained again, beside the first ones."""
    lines = []
    for job in scaling_design.all_jobs():
        again = study.records.get(job.name)
        first = study.first(job)
        if job.kind == "repeat" and again and first:
            scores = [score(run, "validation") for run in (first, again)]
            twice = [f"{percent(top1)} ({run['time']})" for top1, run in zip(scores, (first, again), strict=True)]
            lines.append((job.name, *twice, f"{100 * (scores[1] - scores[0]):+.2f}"))
    note = "Validation top-1. Of 8M/8 the chosen trial was trained again, which takes a quarter of the time of a run of"
    note += " length 2. This was decided when 48 runs were complete."
    return section("Repeated runs", "run|first|again|difference", lines, note, "first|again")


def data_sets(study: ScalingResults) -> list[Block]:
    """The digests of the training sets, and how many runs used each."""
    jobs = (job for job in scaling_design.all_jobs() if job.name in study.records)
    used = Counter((job.group.data, study.records[job.name]["data"]) for job in jobs)
    lines = [(name, digest.removeprefix("digest:")[:12], str(runs)) for (name, digest), runs in sorted(used.items())]
    note = ""
    if len(lines) > len({name for name, _ in used}):
        note = DIGESTS
    return section("Training sets", "share of the data|digest|runs", lines, note, "digest")


def leakage(study: ScalingResults) -> list[Block]:
    """Shares of test pictures with a near-duplicate in training, from the report of the data."""
    facts: Mapping[str, Any] = (read_json(study.folder / "data.json") or {}).get("leakage", {})
    fields = ("near_before", "near_after", "near_before_2x", "near_after_2x")
    lines = [
        (family, f"{each['pictures']:,}", *(percent(each[field], 2) for field in fields))
        for family, each in facts.items()
    ]
    note = "Held-out pictures with a near-duplicate in training, per cent, before and after the check of the data;"
    columns = "family|pictures|before|after|before, twice|after, twice"
    note += " the last two columns at twice the limit of the check."
    near = []
    for family in study.tests:
        rows = [row for row in (study.baseline or {}).get("sets", ()) if row["set"] == family]
        shares = {row["train"]: percent(row["near_2x"]) for row in rows}
        if shares:
            near.append(f"{family} {', '.join(shares.values())}")
    if near:
        note += " Of the zero-shot pictures at twice the limit, with 1/64, 1/8 and all of the data:"
        note += f" {'; '.join(near)}."
    return section("Leakage", columns, lines, note)


def machine_time(study: ScalingResults) -> list[Block]:
    """Where the core-hours of all complete runs went (``flip status --goodput``)."""
    runs = list(study.records.values())
    if not runs:
        return []
    parts = {part: f"{sum(run['hours'][part] for run in runs):.2f}" for part in runs[0]["hours"]}
    machines = sorted({f"{run['machine']['cores']} cores of {run['machine']['processor']}" for run in runs})
    note = f"Reserved core-hours by use, on {'; '.join(machines)}; two runs that share a core count it twice."
    several = [f"{run['run']} ({run['threads']})" for run in runs if run["threads"] > 1]
    if several:
        note += f" Runs with several threads: {', '.join(several)}."
    note += " More attempts than runs: runs that were stopped or killed continued from their checkpoints."
    line = (str(len(runs)), str(sum(run["attempts"] for run in runs)), *parts.values())
    columns = "|".join(["runs", "attempts", *parts])
    return section("Time", columns, [line], note)


def mean_of_pixels(study: ScalingResults, data: str) -> float | None:
    """Top-1 of the nearest training picture, the mean over the test families; None if it was not computed."""
    each = [study.pixels(name, data) for name in study.tests]
    known = [value for value in each if value is not None]
    if len(known) < len(each):
        return None
    return fmean(known)
