"""Section "Where the time goes" of RESULTS.md, from benchmarks with profiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks.lib.table_rows import number

SPEEDS_HEAD = """\
stream: samples/s of each pipeline, and microseconds of processor time of a sample.
"""
EMPTY_CELLS = """\
A cell is empty where a pipeline was not measured: Grain reads local files only, and of webdataset only the fastest form
is measured on two cores. From S3 pipelines take turns, a batch each; from files each makes its passes alone.
"""
STAGES_HEAD = """\
stream, ours: microseconds of computing of a sample, each stage alone in warm caches. "all else" is the whole less the
sum of the stages; where it is below 0, the stages take longer alone than within the whole.
"""
REST = "all else"
"""All operations that a profile does not name."""


def profiles(results: Mapping[str, Any]) -> Iterator[str]:
    """Paragraphs of the page, in Markdown."""
    if "stream" in results:
        yield from _stream(results["stream"])
    if "step" in results:
        yield from _step(results["step"])
    if "report" in results and "cpu_seconds" in results["report"]["report"]:
        entry = results["report"]["report"]
        yield f"report: {number(entry['cpu_seconds'])} s of computing in {number(entry['seconds'])} s.\n"


def _stream(results: Mapping[str, Any]) -> Iterator[str]:
    """Samples/s and processor time of all pipelines, and the stages of ours."""
    sets = results["sets"]
    places = list(next(iter(sets.values()))["measured"])
    yield SPEEDS_HEAD
    if len(places) > 1:
        yield EMPTY_CELLS
    columns = [(place, kind) for place in places for kind in sets]
    lines = [["pipeline", *(f"{place}, {kind}" for place, kind in columns)], ["---"] * (1 + len(columns))]
    rows = {(place, kind, row["pipeline"]): row for place, kind in columns for row in sets[kind]["measured"][place]}
    for name in dict.fromkeys(pipeline for *_, pipeline in rows):
        lines.append([name, *(_speed(rows.get((place, kind, name))) for place, kind in columns)])
    yield _markdown(lines)
    yield STAGES_HEAD
    stages = [row["stage"] for row in next(iter(sets.values()))["costs"]]
    lines = [["stage", *sets], ["---"] * (1 + len(sets))]
    costs = {kind: {row["stage"]: row["us"] for row in entry["costs"]} for kind, entry in sets.items()}
    lines += [[stage, *(number(costs[kind][stage]) for kind in sets)] for stage in stages]
    yield _markdown(lines)


def _speed(row: Mapping[str, Any] | None) -> str:
    """The cell of a pipeline; empty where it is not measured."""
    if row is None:
        return ""
    if row["samples_per_s"] is None:
        return str(row["note"])
    return f"{number(row['samples_per_s'])} ({number(row['cpu_us'])} us)"


def _markdown(lines: Iterable[Iterable[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _step(results: Mapping[str, Any]) -> Iterator[str]:
    """Operations of ours and of the peer."""
    rows = [(f"{results['size']}, mask {row['mask']}, {row['form']}", row) for row in results["beside_the_peer"]]
    rows += [(f"{results['masked']['size']}, mask {row['mask']}, ours", row) for row in results["masked"]["cases"]]
    profiled = [(what, row) for what, row in rows if row.get("profile")]
    if not profiled:
        return
    yield "step: share of a step that torch's operations take by themselves, the longest ones.\n"
    lines = [["step", "ms", "operations"], ["---"] * 3]
    for what, row in profiled:
        ordered = sorted(row["profile"].items(), key=lambda entry: (entry[0] == REST, -entry[1]))
        shares = ", ".join(f"{op.split(': ')[-1]} {100 * share:.0f} %" for op, share in ordered)
        lines.append([what, number(row["milliseconds"]), shares])
    yield _markdown(lines)
