"""What of each benchmark's results stands in the table, beside which peer, and what is to be reached.

A function per benchmark takes what its script wrote. Ratios are those of ours to the peer's in the same round.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SIGNS = {">=": operator.ge, "<=": operator.le, "<": operator.lt, "=": operator.eq}
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """``ratio``: of ours to the peer's, as they stand there; ``spread``: its least and most over rounds."""

    what: str
    ours: str
    peer: str = ""
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    goal: str = ""
    reached: bool | None = None
    """None where nothing is asked, or nothing was measured."""

    @property
    def figure(self) -> str:
        """What it comes to: the ratio, or what ours took."""
        if self.ratio is None:
            return self.ours
        return number(self.ratio) + (f" ({number(self.spread[0])} to {number(self.spread[1])})" if self.spread else "")


def number(value: float) -> str:
    """Three significant digits, or a whole number."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(found: Mapping[str, Any], scale: float = 1.0) -> tuple[float, float] | None:
    """Least and most of what a script wrote, None where it did not."""
    if isinstance(found.get("least"), float | int):
        return found["least"] * scale, found["most"] * scale
    return None


def goal(value: float, sign: str, limit: float, unit: str = "") -> dict[str, Any]:
    """The two fields of a row that is to reach something."""
    return {"goal": f"{sign} {limit:g}{unit}", "reached": bool(SIGNS[sign](value, limit))}


def limited(what: str, found: Mapping[str, Any], peer: str = "") -> Row:
    """Seconds beside their own ``limit``."""
    least, most = spread(found) or (found["seconds"], found["seconds"])
    ours = f"{number(found['seconds'])} s ({number(least)} to {number(most)})"
    return Row(what, ours, peer, **goal(found["seconds"], "<", found["limit"], " s"))


Found = Mapping[str, Any]
"""What a script wrote."""
PEAK = 989e12
"""FLOP/s of an H100 in bf16, by its maker."""
EXACT = 1e-12


def step(found: Found) -> list[Row]:
    """Beside open_clip, and masked beside unmasked."""
    rows, gpu = [], found["device"] == "cuda"
    cases = {(row["mask"], row["form"]): row for row in found["beside_the_peer"]}
    for (mask, form), row in cases.items():
        peer = cases.get((mask, "open_clip"))
        if form == "open_clip" or peer is None:
            continue
        speed, least = row["speed_to_open_clip"], 1.5 if gpu else 1.35 if "padding" in form else 1.2
        name = f"{found['size']}, b = {found['b']}, mask {mask}" + form.removeprefix("ours") + " on a GPU" * gpu
        rows.append(Row(
            f"step of {name}, pairs/s",
            number(row["pairs_per_second"]), f"open_clip {number(peer['pairs_per_second'])}",
            speed, spread(row), **({} if mask == "0" else goal(speed, ">=", least)),
        ))  # fmt: skip
        size = row["memory_to_open_clip"]
        rows.append(Row(
            f"step of {name}, memory", f"{number(row['peak_MB'])} MB", f"open_clip {number(peer['peak_MB'])} MB",
            size, **({} if mask == "0" else goal(size, "<", 1.0)),
        ))  # fmt: skip
    return rows + [_masked(row, found["masked"]["size"], gpu) for row in found["masked"]["cases"] if row["mask"] != "0"]


def _masked(row: Found, size: str, gpu: bool) -> Row:
    """Time against the unmasked step's, over the ratio of FLOPs."""
    what = f"step of {size}, b = {row['b']}, mask {row['mask']}, to the unmasked one" + " on a GPU" * gpu
    ratio, work = row["time_to_FLOPs"], row["FLOPs_ratio"]
    ours, own = f"{number(row['time_ratio'])} of the time", f"{number(work)} of the FLOPs"
    return Row(what, ours, own, ratio, spread(row, 1 / work), **goal(ratio, "<=", 1.1))


def step_gpu_h14(found: Found) -> list[Row]:
    """Share of a card's peak."""
    row = next(row for row in found["masked"]["cases"] if row["mask"] == "0.5")
    share = row["GFLOPS"] * 1e9 / PEAK
    what = f"step of {found['masked']['size']}, b = {row['b']}, mask 0.5 on a GPU: model FLOPs of the card's peak"
    return [Row(what, f"{number(row['GFLOPS'])} GFLOP/s", f"{PEAK / 1e9:,.0f}", share, **goal(share, ">=", 0.5))]


def loss(found: Found) -> list[Row]:
    """Tiles beside whole logits, beside open_clip's where b = B, beside arithmetic, and how exact they are."""
    cases = {(row["b"], row["B"], row["form"]): row for row in found["cases"]}
    tile = next(form for form in ("tiles of 1024", "tiles of 256") if any(key[2] == form for key in cases))
    rows = []
    for (b, batch, form), row in cases.items():
        ours = cases.get((b, batch, tile))
        if form.startswith("tiles") or ours is None or not isinstance(row["milliseconds"], float):
            continue
        name, peer = f"loss in {tile}, b = {b:,}, B = {batch:,}", form.replace("whole", "whole logits")
        rows.append(Row(
            f"{name}, time", f"{number(ours['milliseconds'])} ms", f"{peer} {number(row['milliseconds'])} ms",
            ours["milliseconds"] / row["milliseconds"], spread(ours) if form == "whole" else None,
        ))  # fmt: skip
        size = ours["extra_MB"] / max(1, row["extra_MB"])
        rows.append(Row(f"{name}, memory", f"{ours['extra_MB']:,} MB", f"{peer} {row['extra_MB']:,} MB", size))
    last = [row for row in found["cases"] if row["form"] == tile][-1]
    ratio = last["extra_MB"] / last["predicted_MB"]
    rows.append(Row(
        f"loss in {tile}, b = {last['b']:,}, B = {last['B']:,}, memory to that of b * tile and the features",
        f"{last['extra_MB']:,} MB", f"{last['predicted_MB']:,} MB by arithmetic", ratio, **goal(ratio, "<=", 1.1),
    ))  # fmt: skip
    far = found["farthest_from_float64"]
    what = "loss in tiles, float64: farthest from the plain formula, gradients too"
    return [*rows, Row(what, number(far), **goal(far, "<=", EXACT))]


def stream(found: Found) -> list[Row]:
    """Beside each pipeline."""
    rows = []
    for kind, one in found["sets"].items():
        ours, *others = one["pipelines"]
        for row in others:
            own = row["pipeline"].startswith("ours")
            what = f"S3 to batch on one core, {kind}, {'' if own else 'beside '}{row['pipeline']}, samples/s"
            if row["samples_per_s"] is None:
                rows.append(Row(what, number(ours["samples_per_s"]), row["note"]))
                continue
            asked = goal(row["ours_is"], ">=", row["goal"]) if row["goal"] else {}
            speeds = number(ours["samples_per_s"]), number(row["samples_per_s"])
            rows.append(Row(what, *speeds, row["ours_is"], spread(row), **asked))
    return rows


def resume(found: Found) -> list[Row]:
    """Whether it depends on S, and what others take."""
    ours = [row["first_batch_seconds"] for row in found["ours"]]
    where = [f"{100 * row['passes']:g}" for row in found["ours"]]
    ratio = max(ours) / min(ours)
    rows = [Row(
        f"first batch after a resume at {', '.join(where)} % of a pass: slowest to quickest",
        f"{number(max(ours))} s", f"{number(min(ours))} s", ratio, **goal(ratio, "<=", 1.25),
    )]  # fmt: skip
    theirs = found["webdataset"][-1]["computed_seconds"]
    what, last = f"first batch after a resume at {where[-1]} % of {found['data']['N']:.3g} samples", ours[-1]
    rows.append(Row(
        f"{what}, beside webdataset reading up to there", f"{number(last)} s", f"{number(theirs)} s (computed)",
        last / theirs,
    ))  # fmt: skip
    peer_row = found["mosaicml_streaming"][-1]
    if "first_sample_seconds" in peer_row:
        theirs = peer_row["first_sample_seconds"]
        peer = f"mosaicml-streaming of {peer_row['N']:.3g} samples"
        rows.append(Row(f"{what}, beside {peer}", f"{number(last)} s", f"{number(theirs)} s", last / theirs))
    return rows


def checkpoint(found: Found) -> list[Row]:
    """How long the loop stands still."""
    rows, cases = [], {(row["ranks"], row["way"]): row for row in found["cases"]}
    for ranks in sorted({ranks for ranks, _ in cases}):
        ours, torchs = cases[ranks, "background"], cases[ranks, "torch async_save"]
        what, seconds = (
            f"save of {ours['megabytes']} MB, ranks: {ranks}; the loop stalls",
            f"{number(ours['stall_s'])} s",
        )
        share, waited = ours["share_of_blocking"], f"{number(cases[ranks, 'blocking']['stall_s'])} s"
        rows.append(
            Row(f"{what}, beside a save waited for", seconds, waited, share, spread(ours), **goal(share, "<", 0.1))
        )
        beside = ours.get("stall_to_torch") or {"ratio": ours["stall_s"] / torchs["stall_s"]}
        peer = f"{number(torchs['stall_s'])} s"
        rows.append(Row(f"{what}, beside torch's async_save", seconds, peer, beside["ratio"], spread(beside)))
    return rows


def memory(found: Found) -> list[Row]:
    """Measured to foretold."""
    cases = found["cases"]
    ratios = [row["measured_to_predicted"] for row in cases]
    worst = max(cases, key=lambda row: row["measured_to_predicted"])
    where = f"{found['size']} on a {'GPU' if found['device'] == 'cuda' else 'CPU'}"
    what = f"memory of a step of {where}, {len(cases)} cases: the most above what is foretold"
    at = f"b = {worst['b']}, mask {worst['mask']}"
    sizes = f"{worst['measured_MB']:,} MB, {at}", f"{worst['predicted_MB']:,} MB foretold"
    return [Row(what, *sizes, max(ratios), (min(ratios), max(ratios)), **goal(max(ratios), "<=", 1.1))]


def launcher(found: Found) -> list[Row]:
    """Limits of commands; submitting beside submitit and Hydra."""
    slowest = max(found["help"], key=lambda row: row["seconds"])
    ours, *others = found["submit"]["ways"]
    runs, shapes = found["submit"]["runs"], found["submit"]["shapes"]
    squeue, sbatch = found["status"]["squeue_calls"], ours["sbatch_calls"]
    rows = [
        limited(f"plan of {found['plan']['runs']} runs", found["plan"]),
        limited(f"status of {found['status']['runs']} runs", found["status"]),
        Row("status: calls of squeue", str(squeue), **goal(squeue, "=", 1)),
        limited(f"--help, the slowest of {len(found['help'])} ({slowest['command']})", slowest),
    ]
    for row in others:
        times = f"{number(ours['seconds'])} s", f"{number(row['seconds'])} s"
        rows.append(Row(f"submitting {runs} runs, beside {row['way']}", *times, row["ours_to_it"], spread(row)))
    calls = "; ".join(f"{row['way']} {row['sbatch_calls']}" for row in others)
    what = f"submitting {runs} runs of {shapes} shapes: calls of sbatch"
    return [*rows, Row(what, str(sbatch), calls, **goal(sbatch, "=", shapes))]


def order(found: Found) -> list[Row]:
    """The place in the stream, and the cost of order and mask."""
    first = [row for row in found["first_batch"] if row["passes"] == 0.5][-1]
    peer, after, samples = found["peer"], found["afterwards"][-1], f"{found['data']['N']:.3g} samples"
    seconds, theirs = first["milliseconds"] / 1000, peer["extrapolated_to_N_seconds"]
    permuted = f"NumPy's permutation {number(theirs)} s (from {peer['ids']:,} ids)"
    what = f"ids of a batch in the middle of a pass of {samples}, W = {first['W']}"
    cost = after["with_mask_us"]
    return [
        Row(what, f"{seconds:.2g} s", permuted, seconds / theirs, spread(first, 0.001 / theirs)),
        Row(f"order and mask, W = {after['W']}, of a sample", f"{number(cost)} us", **goal(cost, "<=", 4, " us")),
    ]


def prefetch(found: Found) -> list[Row]:
    """The loader's rule beside waiting for each read, by simulation."""
    rows = []
    for first in (case for case in found["cases"] if case["hedge"] and case["lead"]):
        same = [case for case in found["cases"] if (case["step"], case["latency"]) == (first["step"], first["latency"])]
        if first is not same[0] or first["latency"] == "constant":
            continue
        blocking = [case["stalled_share"] for case in same if case["reads"] == "blocking"]
        peer = f"each read waited for: {100 * blocking[-1]:.3g} %" if blocking else ""
        case = f"{found['fleet']['ranks']} ranks, steps of {first['step']} s, latency {first['latency']}"
        rows.append(Row(f"simulated, {case}: stalled", f"{100 * first['stalled_share']:.3g} %", peer))
    return rows


def evaluation(found: Found) -> list[Row]:
    """Speed, memory and equality."""
    rows = []
    for name, task in found["tasks"].items():
        ours, theirs = task["forms"]
        counts = ", ".join(f"{task[key]:,} {key}" for key in ("images", "classes", "captions") if key in task)
        what, far = f"{name} of {counts}", task["farthest"]
        speeds = number(ours["samples_per_s"]), f"clip_benchmark {number(theirs['samples_per_s'])}"
        rows.append(Row(f"{what}, images/s", *speeds, ours["times_as_fast"], spread(ours)))
        sizes = f"{ours['extra_MB']:,} MB", f"clip_benchmark {theirs['extra_MB']:,} MB"
        rows.append(Row(f"{what}, memory", *sizes, ours["extra_MB"] / max(1, theirs["extra_MB"])))
        same = f"{what}: farthest of {len(task['shares'])} scores from clip_benchmark's"
        rows.append(Row(same, number(far), **goal(far, "<=", 1e-6)))
    return rows


def report(found: Found) -> list[Row]:
    """Seconds and memory."""
    data, ours, plain = found["data"], found["report"], found["plain_json"]
    what, size = f"report of {data['runs']} runs of {data['lines_per_run']:,} lines", ours["peak_bytes"] / 1e6
    reading = f"json alone, reading them: {number(plain['seconds'])} s"
    peak = f"json alone {number(plain['peak_bytes'] / 1e6)} MB"
    return [
        limited(what, ours | {"limit": 10}, reading),
        Row(f"{what}, memory", f"{number(size)} MB", peak, **goal(size, "<", 500, " MB")),
    ]


ROWS: dict[str, Callable[[Found], list[Row]]] = {
    "step": step, "loss": loss, "stream": stream, "resume": resume, "checkpoint": checkpoint, "memory": memory,
    "launcher": launcher, "order": order, "prefetch": prefetch, "evaluation": evaluation, "report": report,
    "step_gpu": step, "step_gpu_h14": step_gpu_h14, "memory_gpu": memory,
}  # fmt: skip
"""Name of a file of results -> what of it is told."""
