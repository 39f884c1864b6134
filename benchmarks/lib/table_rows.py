"""Rows of RESULTS.md: which results of each benchmark, against which peer, with which goal.

A function per benchmark takes the results of its script. Ratios are ours to the peer's in the same round.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SIGNS = {">=": operator.ge, "<=": operator.le, "<": operator.lt, "=": operator.eq}
NOT_MEASURED = "not measured"
Found = Mapping[str, Any]
"""Results of a script."""
EXACT = 1e-12
HYDRA = "a Hydra multirun"


@dataclass(frozen=True)
class Row:
    """``ratio``: ours to the peer's; ``spread``: its least and most over rounds."""

    what: str
    own: str
    peer: str = ""
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    goal: str = ""
    reached: bool | None = None
    """None if there is no goal, or nothing was measured."""

    @property
    def figure(self) -> str:
        """The quoted figure: the ratio, or our value."""
        if self.ratio is None:
            return self.own
        return number(self.ratio) + (f" ({number(self.spread[0])} to {number(self.spread[1])})" if self.spread else "")


def number(value: float) -> str:
    """Three significant digits, or a whole number."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def spread(result: Mapping[str, Any], scale: float = 1.0) -> tuple[float, float] | None:
    """Least and most in a result; None if it has none."""
    if isinstance(result.get("least"), float | int):
        return result["least"] * scale, result["most"] * scale
    return None


def goal(value: float, sign: str, limit: float, unit: str = "") -> dict[str, Any]:
    """The fields of a row with a goal."""
    return {"goal": f"{sign} {limit:g}{unit}", "reached": bool(SIGNS[sign](value, limit))}


def limited(what: str, result: Mapping[str, Any], peer: str = "") -> Row:
    """Seconds with their ``limit``."""
    least, most = spread(result) or (result["seconds"], result["seconds"])
    own = f"{number(result['seconds'])} s ({number(least)} to {number(most)})"
    return Row(what, own, peer, **goal(result["seconds"], "<", result["limit"], " s"))


def step(result: Found) -> list[Row]:
    """Against open_clip, and masked against unmasked."""
    rows = []
    gpu = result["device"] == "cuda"
    cases = {(row["mask"], row["form"]): row for row in result["beside_the_peer"]}
    for (mask, form), row in cases.items():
        peer = cases.get((mask, "open_clip"))
        if form == "open_clip" or peer is None:
            continue
        speed = row["speed_to_open_clip"]
        name = f"{result['size']}, b = {result['b']}, mask {mask}" + form.removeprefix("ours")
        if gpu:
            least = 1.5
            name += " on a GPU"
        elif "padding" in form:
            least = 1.35
        else:
            least = 1.2
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
    return rows + [
        _masked(row, result["masked"]["size"], gpu) for row in result["masked"]["cases"] if row["mask"] != "0"
    ]


def _masked(row: Found, size: str, gpu: bool) -> Row:
    """Time relative to the unmasked step, over the ratio of FLOPs."""
    what = f"step of {size}, b = {row['b']}, mask {row['mask']}, to the unmasked one"
    if gpu:
        what += " on a GPU"
    ratio = row["time_to_FLOPs"]
    work = row["FLOPs_ratio"]
    times = f"{number(row['time_ratio'])} of the time"
    flops = f"{number(work)} of the FLOPs"
    return Row(what, times, flops, ratio, spread(row, 1 / work), **goal(ratio, "<=", 1.1))


def loss(result: Found) -> list[Row]:
    """Tiles against full logits, open_clip (if b = B) and arithmetic, and their exactness."""
    cases = {(row["b"], row["B"], row["form"]): row for row in result["cases"]}
    tile = next(form for form in ("tiles of 1024", "tiles of 256") if any(key[2] == form for key in cases))
    rows = []
    for (b, batch, form), row in cases.items():
        flip_row = cases.get((b, batch, tile))
        if form.startswith("tiles") or flip_row is None or not isinstance(row["milliseconds"], float):
            continue
        name = f"loss in {tile}, b = {b:,}, B = {batch:,}"
        peer = form.replace("whole", "whole logits")
        if form != "whole":
            name += f", beside {form}"
        rows.append(Row(
            f"{name}, time", f"{number(flip_row['milliseconds'])} ms", f"{peer} {number(row['milliseconds'])} ms",
            flip_row["milliseconds"] / row["milliseconds"], spread(flip_row) if form == "whole" else None,
        ))  # fmt: skip
        size = flip_row["extra_MB"] / max(1, row["extra_MB"])
        rows.append(Row(f"{name}, memory", f"{flip_row['extra_MB']:,} MB", f"{peer} {row['extra_MB']:,} MB", size))
    last = [row for row in result["cases"] if row["form"] == tile][-1]
    ratio = last["extra_MB"] / last["predicted_MB"]
    rows.append(Row(
        f"loss in {tile}, b = {last['b']:,}, B = {last['B']:,}, memory to that of its tiles and gradients",
        f"{last['extra_MB']:,} MB", f"{last['predicted_MB']:,} MB by arithmetic", ratio, **goal(ratio, "<=", 1.1),
    ))  # fmt: skip
    far = result["farthest_from_float64"]
    what = "loss in tiles, float64: farthest from the plain formula, gradients too"
    return [*rows, Row(what, number(far), **goal(far, "<=", EXACT))]


def stream(result: Found) -> list[Row]:
    """Against decoding alone, each peer, and one core."""
    rows = []
    for entry in result["sets"].values():
        for ratio in entry["ratios"]:
            asked = goal(ratio["ratio"], ">=", ratio["goal"]) if ratio["goal"] else {}
            speeds = number(ratio["ours"]), number(ratio["peer"])
            rows.append(Row(ratio["what"], *speeds, ratio["ratio"], spread(ratio), **asked))
    return rows


def resume(result: Found) -> list[Row]:
    """Dependence on S, and the time of peers."""
    seconds = [row["first_batch_seconds"] for row in result["ours"]]
    where = [f"{100 * row['passes']:g}" for row in result["ours"]]
    ratio = max(seconds) / min(seconds)
    rows = [Row(
        f"first batch after a resume at {', '.join(where)} % of a pass: slowest to quickest",
        f"{number(max(seconds))} s", f"{number(min(seconds))} s", ratio, **goal(ratio, "<=", 1.25),
    )]  # fmt: skip
    peer_seconds = result["webdataset"][-1]["computed_seconds"]
    what = f"first batch after a resume at {where[-1]} % of {result['data']['N']:.3g} samples"
    last = seconds[-1]
    rows.append(Row(
        f"{what}, beside webdataset reading up to there", f"{number(last)} s", f"{number(peer_seconds)} s (computed)",
        last / peer_seconds,
    ))  # fmt: skip
    peer_row = result["mosaicml_streaming"][-1]
    if "first_sample_seconds" in peer_row:
        peer_seconds = peer_row["first_sample_seconds"]
        peer = f"mosaicml-streaming of {peer_row['N']:.3g} samples"
        opened = last + result["ours"][-1]["load_seconds"]  # the peer's time includes opening its index
        rows.append(
            Row(f"{what}, opening included, beside {peer}", f"{number(opened)} s", f"{number(peer_seconds)} s",
                opened / peer_seconds)
        )  # fmt: skip
    return rows


def checkpoint(result: Found) -> list[Row]:
    """How long the loop is blocked."""
    rows = []
    cases = {(row["ranks"], row["way"]): row for row in result["cases"]}
    for ranks in sorted({ranks for ranks, _ in cases}):
        flip_row = cases[ranks, "background"]
        torchs = cases[ranks, "torch async_save"]
        what = f"save of {flip_row['megabytes']} MB, ranks: {ranks}; the loop stalls"
        seconds = f"{number(flip_row['stall_s'])} s"
        share = flip_row["share_of_blocking"]
        waited = f"{number(cases[ranks, 'blocking']['stall_s'])} s"
        rows.append(
            Row(f"{what}, beside a save waited for", seconds, waited, share, spread(flip_row), **goal(share, "<", 0.1))
        )
        to_peer = flip_row.get("stall_to_torch") or {"ratio": flip_row["stall_s"] / torchs["stall_s"]}
        peer = f"{number(torchs['stall_s'])} s"
        rows.append(Row(f"{what}, beside torch's async_save", seconds, peer, to_peer["ratio"], spread(to_peer)))
    return rows + (_planning(*result["planning"]) if "planning" in result else [])


def _planning(flip_row: Found, dcp: Found, cached: Found) -> list[Row]:
    """What rank 0 computes for a save of many simulated ranks after the first, and what the ranks exchange for it."""
    what = f"save of {flip_row['size']} on {flip_row['ranks']} simulated ranks"
    spent = flip_row["save_s"]
    rows = [Row(f"{what}: processor time of rank 0", f"{number(spent)} s", **goal(spent, "<", 2.0, " s"))]
    for name, row in (("DCP", dcp), ("DCP with cached plans", cached)):
        for field, unit, of in (("planning_s", "s", "planning on rank 0"), ("exchanged_MB", "MB", "exchanged for it")):
            values = f"{number(flip_row[field])} {unit}", f"{name} {number(row[field])} {unit}"
            rows.append(Row(f"{what}: {of}, beside {name}", *values, flip_row[field] / row[field]))
    return rows


def memory(result: Found) -> list[Row]:
    """Measured to predicted."""
    cases = result["cases"]
    ratios = [row["measured_to_predicted"] for row in cases]
    worst = max(cases, key=lambda row: row["measured_to_predicted"])
    where = f"{result['size']} on a {'GPU' if result['device'] == 'cuda' else 'CPU'}"
    what = f"memory of a step of {where}, {len(cases)} cases: the most above what is foretold"
    at = f"b = {worst['b']}, mask {worst['mask']}"
    sizes = f"{worst['measured_MB']:,} MB, {at}", f"{worst['predicted_MB']:,} MB foretold"
    return [Row(what, *sizes, max(ratios), (min(ratios), max(ratios)), **goal(max(ratios), "<=", 1.1))]


def launcher(result: Found) -> list[Row]:
    """Limits of commands; submission against submitit and Hydra."""
    slowest = max(result["help"], key=lambda row: row["seconds"])
    flip_row, *others = result["submit"]["ways"]
    runs = result["submit"]["runs"]
    shapes = result["submit"]["shapes"]
    squeue = result["status"]["squeue_calls"]
    sbatch = flip_row["sbatch_calls"]
    rows = [
        limited(f"plan of {result['plan']['runs']} runs", result["plan"]),
        limited(f"status of {result['status']['runs']} runs", result["status"]),
        Row("status: calls of squeue", str(squeue), **goal(squeue, "=", 1)),
        limited(f"--help, the slowest of {len(result['help'])} commands", slowest),
    ]
    for row in others:
        if row["way"] == HYDRA:  # it composes the configurations, which is a part of our plan, and starts a Python
            seconds = result["plan"]["seconds"] + flip_row["seconds"]
            times = f"{number(seconds)} s", f"{number(row['seconds'])} s"
            rows.append(Row(f"planning and submitting {runs} runs, beside {HYDRA}", *times, seconds / row["seconds"]))
        else:
            times = f"{number(flip_row['seconds'])} s", f"{number(row['seconds'])} s"
            rows.append(Row(f"submitting {runs} runs, beside {row['way']}", *times, row["ours_to_it"], spread(row)))
    calls = "; ".join(f"{row['way']} {row['sbatch_calls']}" for row in others)
    what = f"submitting {runs} runs of {shapes} shapes: calls of sbatch"
    return [*rows, Row(what, str(sbatch), calls, **goal(sbatch, "=", shapes))]


def order(result: Found) -> list[Row]:
    """The position in the stream, and the cost of order and mask."""
    first = [row for row in result["first_batch"] if row["passes"] == 0.5][-1]
    peer = result["peer"]
    after = result["afterwards"][-1]
    samples = f"{result['data']['N']:.3g} samples"
    seconds = first["milliseconds"] / 1000
    peer_value = peer["extrapolated_to_N_seconds"]
    permuted = f"NumPy's permutation {number(peer_value)} s (from {peer['ids']:,} ids)"
    what = f"ids of a batch in the middle of a pass of {samples}, W = {first['W']}"
    cost = after["with_mask_us"]
    return [
        Row(what, f"{seconds:.2g} s", permuted, seconds / peer_value, spread(first, 0.001 / peer_value)),
        Row(f"order and mask, W = {after['W']}, of a sample", f"{number(cost)} us", **goal(cost, "<=", 4, " us")),
    ]


def parquet(result: Found) -> list[Row]:
    """Parquet files read in place, beside tars of the same rows."""
    tars = result["tars_read_us"]
    rows = [row for case in result["cases"] for row in _parquet_case(case, tars)]
    peers = [row for row in result["peers"] if row["read_us"] is not None]
    if peers:
        fastest = min(peers, key=lambda row: row["read_us"])
        own = result["cases"][0]["read_us"]
        peer = f"{fastest['peer']} {number(fastest['read_us'])} us, in order"
        rows.append(Row("reading in random order, plain", f"{number(own)} us", peer, own / fastest["read_us"]))
    return rows


def _parquet_case(case: Mapping[str, Any], tars: float) -> list[Row]:
    name = case["writer"]
    most_read = 1.05
    most_memory = 80
    if name == "plain":
        most_read = 1.01
        most_memory = 5
    own = f"{number(case['read_us'])} us"
    cost = goal(case["to_tars"], "<=", 0.6)
    speed = case["indexed_per_core_second"]
    memory = case["memory_beyond_tars_MB"]
    rows = [
        Row(
            f"processor time of reading, {name}",
            own,
            f"{number(tars)} us (tars)",
            case["to_tars"],
            spread(case),
            **cost,
        ),
        Row(f"memory beyond that of tars, {name}", f"{number(memory)} MB", **goal(memory, "<=", most_memory, " MB")),
        Row(f"rows indexed per second of a core, {name}", number(speed), **goal(speed, ">=", 40_000)),
    ]
    if not name.startswith("zstd"):  # its pages are read as a whole
        read = case["read_per_used"]
        rows.append(Row(f"bytes read per byte used, {name}", f"{read:.3f}", **goal(read, "<=", most_read)))
    return rows


def prefetch(result: Found) -> list[Row]:
    """The loader's rule against waiting for each read, by simulation."""
    rows = []
    for first in (case for case in result["cases"] if case["hedge"] and case["lead"]):
        same = [
            case for case in result["cases"] if (case["step"], case["latency"]) == (first["step"], first["latency"])
        ]
        if first is not same[0] or first["latency"] == "constant":
            continue
        blocking = [case["stalled_share"] for case in same if case["reads"] == "blocking"]
        peer = ""
        if blocking:
            peer = f"each read waited for: {100 * blocking[-1]:.3g} %"
        case = f"{result['fleet']['ranks']} ranks, steps of {first['step']} s, latency {first['latency']}"
        rows.append(Row(f"simulated, {case}: stalled", f"{100 * first['stalled_share']:.3g} %", peer))
    return rows


def storage(result: Found) -> list[Row]:
    """Processor time of the clients, and the wait for late answers with second requests beside the wait without."""
    rows = []
    first, *others = result["processor"]
    for other in others:
        what = f"reading from S3, processor time, {other['client']}"
        values = f"{number(other['ms_per_MB'])} ms/MB", f"{first['client']} {number(first['ms_per_MB'])} ms/MB"
        rows.append(Row(what, *values, other["to_first"]["ratio"], spread(other["to_first"])))
    cases = {(case["client"], bool(case["hedge"])): case for case in result["late"]}
    share = f"{100 * result['settings']['tail_share']:g} %"
    for (client, is_hedged), case in cases.items():
        without = cases[client, False]
        if not is_hedged:
            continue
        what = f"reading through a proxy that delays {share} of answers, {client}, second requests"
        for name, key in (("longest read", "longest_s"), ("all reads", "all_s")):
            values = f"{number(case[key])} s", f"without {number(without[key])} s"
            rows.append(Row(f"{what}: {name}", *values, case[key] / without[key]))
        more = case["requests"] / without["requests"]
        values = f"{case['requests']:,}", f"without {without['requests']:,}"
        rows.append(Row(f"{what}: requests", *values, more))
    return rows


def evaluation(result: Found) -> list[Row]:
    """Speed, memory and equality."""
    rows = []
    for name, task in result["tasks"].items():
        flip_row, peer_value = task["forms"]
        counts = ", ".join(f"{task[key]:,} {key}" for key in ("images", "classes", "captions") if key in task)
        what = f"{name} of {counts}"
        far = task["farthest"]
        speeds = number(flip_row["samples_per_s"]), f"clip_benchmark {number(peer_value['samples_per_s'])}"
        rows.append(Row(f"{what}, images/s", *speeds, flip_row["times_as_fast"], spread(flip_row)))
        sizes = f"{flip_row['extra_MB']:,} MB", f"clip_benchmark {peer_value['extra_MB']:,} MB"
        rows.append(Row(f"{what}, memory", *sizes, flip_row["extra_MB"] / max(1, peer_value["extra_MB"])))
        same = f"{what}: farthest of {len(task['shares'])} scores from clip_benchmark's"
        rows.append(Row(same, number(far), **goal(far, "<=", 1e-6)))
    return rows


def report(result: Found) -> list[Row]:
    """Seconds and memory."""
    data = result["data"]
    flip_row = result["report"]
    plain = result["plain_json"]
    what = f"report of {data['runs']} runs of {data['lines_per_run']:,} lines"
    size = flip_row["peak_bytes"] / 1e6
    reading = f"json alone, reading them: {number(plain['seconds'])} s"
    peak = f"json alone {number(plain['peak_bytes'] / 1e6)} MB"
    return [
        limited(what, flip_row | {"limit": 10}, reading),
        Row(f"{what}, memory", f"{number(size)} MB", peak, **goal(size, "<", 500, " MB")),
    ]


def recovery(result: Found) -> list[Row]:
    """Seconds from a fault to the next step."""
    cases = {case["case"]: case for case in result["cases"] if "seconds" in case}
    requeue = cases.get("requeue")
    rows = []
    for name, (what, most) in RECOVERY.items():
        if name not in cases:
            continue
        seconds = cases[name]["seconds"]
        peer = ""
        ratio = None
        if requeue and name in ("agents", "spare"):
            peer = f"killed rank, requeue: {number(requeue['seconds'])} s"
            ratio = seconds / requeue["seconds"]
        limit = {}
        if name == "silent":
            peer = f"until Slurm drops it: {number(cases[name]['until_dropped'])} s"
            seconds = cases[name]["beside"]["median"]
        if most:
            limit = goal(seconds, "<=", most, " s")
        rows.append(Row(f"{what}, to the next step", f"{number(seconds)} s", peer, ratio, **limit))
    if requeue and "submitit" in cases:
        peer_seconds = cases["submitit"]["seconds"]
        what = "killed rank, requeue, to the next step; submitit after SIGUSR2"
        ratio = requeue["seconds"] / peer_seconds
        rows.append(Row(what, f"{number(requeue['seconds'])} s", f"{number(peer_seconds)} s", ratio))
    if "start" in cases:
        case = cases["start"]
        extra = case["extra"]["median"]
        what = "start of one rank to its first step: more seconds with node agents"
        peer = f"without: {number(case['without_agents'])} s"
        rows.append(Row(what, f"{number(extra)} s", peer, spread=spread(case["extra"]), **goal(extra, "<=", 0.5, " s")))
    return rows


RECOVERY = {
    "agents": ("killed rank, node agents", 5.0),
    "spare": ("lost node, its connections end at once, a spare node takes over", 15.0),
    "silent": ("lost node, silent, a spare node takes over: from the moment when Slurm drops it", 15.0),
    "requeue": ("killed rank, requeue", 0.0),
}
"""Case of the benchmark -> its name, and the most seconds that it should take (0: no goal)."""

ROWS: dict[str, Callable[[Found], list[Row]]] = {
    "step": step, "loss": loss, "stream": stream, "storage": storage, "resume": resume, "checkpoint": checkpoint,
    "memory": memory, "launcher": launcher, "order": order, "prefetch": prefetch, "evaluation": evaluation,
    "report": report, "recovery": recovery, "parquet": parquet,
}  # fmt: skip
"""Name of a file of results -> its rows."""
