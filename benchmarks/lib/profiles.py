"""Where the time goes, of benchmarks whose scripts tell it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.lib.table_rows import number

REST = "all else"
"""What a profile does not name."""


def profiles(found: Mapping[str, Any]) -> Iterator[str]:
    """Parts of the page, in Markdown."""
    if "stream" in found:
        yield from _stream(found["stream"])
    for name in ("step", "step_gpu"):
        if name in found:
            yield from _step(found[name], name)
    if "report" in found and "cpu_seconds" in found["report"]["report"]:
        one = found["report"]["report"]
        yield f"report: {number(one['cpu_seconds'])} s of computing in {number(one['seconds'])} s.\n"


def _stream(found: Mapping[str, Any]) -> Iterator[str]:
    """Stages of ours, and what the bare decoding beside it takes."""
    sets = found["sets"]
    yield "stream, ours: microseconds of computing of a sample, each stage alone in warm caches.\n"
    stages = [row["stage"] for row in next(iter(sets.values()))["costs"]]
    lines = [["stage", *sets], ["---"] * (1 + len(sets))]
    costs = {kind: {row["stage"]: row["us"] for row in one["costs"]} for kind, one in sets.items()}
    lines += [[stage, *(number(costs[kind][stage]) for kind in sets)] for stage in stages]
    for name in [row["pipeline"] for row in next(iter(sets.values()))["pipelines"]][1:]:
        whole = {kind: {row["pipeline"]: row["cpu_us"] for row in one["pipelines"]} for kind, one in sets.items()}
        if all(isinstance(each[name], float) for each in whole.values()):
            lines.append([f"beside it, the whole of: {name}", *(number(whole[kind][name]) for kind in sets)])
    yield "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _step(found: Mapping[str, Any], name: str) -> Iterator[str]:
    """Operations of ours and of the peer."""
    rows = [(f"{found['size']}, mask {row['mask']}, {row['form']}", row) for row in found["beside_the_peer"]]
    rows += [(f"{found['masked']['size']}, mask {row['mask']}, ours", row) for row in found["masked"]["cases"]]
    told = [(what, row) for what, row in rows if row.get("profile")]
    if not told:
        return
    yield f"{name}: share of a step that torch's operations take by themselves, the longest ones.\n"
    lines = [["step", "ms", "operations"], ["---"] * 3]
    for what, row in told:
        ordered = sorted(row["profile"].items(), key=lambda one: (one[0] == REST, -one[1]))
        shares = ", ".join(f"{op.split(': ')[-1]} {100 * share:.0f} %" for op, share in ordered)
        lines.append([what, number(row["milliseconds"]), shares])
    yield "".join(f"| {' | '.join(line)} |\n" for line in lines)
