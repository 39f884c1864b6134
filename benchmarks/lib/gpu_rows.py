"""Rows of `make bench-gpu`: what is measured on one GPU, by which script, and its row of RESULTS.md.

The order is that of value: what a run needs to start comes first. A script's options for ``--quick`` make the same row
on any machine in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.lib.table_rows import number
from benchmarks.lib.training_steps import PEER
from flip import model_costs
from jobs.measuring.functions.training_step import LEFT_OUT, OURS, model
from jobs.planning.measurement import MEASURED

NOT_RUN = "not run"
Figure = Callable[[Mapping[str, Any], str], str]
"""(results of the script, name of the card) -> the result in words."""


class GpuRow(NamedTuple):
    name: str
    """Of its file of results, without ``.json``."""
    what: str
    words: tuple[str, ...]
    """Script in ``benchmarks/`` and its options; the driver adds ``--device`` and ``--out``."""
    figure: Figure
    limit: int = 90
    """Seconds."""
    quick: tuple[str, ...] = ("--quick",)


def _tests(result: Mapping[str, Any], card: str) -> str:
    return str(result["summary"])


def _matmul(result: Mapping[str, Any], card: str) -> str:
    peak = model_costs.peak_flops(card, "bf16")
    share = ""
    if peak is not None:
        share = f": {100e12 * result['TFLOPS'] / peak:.0f} % of the datasheet peak"
    return f"{number(result['TFLOPS'])} TFLOP/s{share}"


def _step(result: Mapping[str, Any], card: str) -> str:
    """Pairs per second, memory, and model FLOPs as a share of the datasheet peak."""
    if not result["beside_the_peer"]:
        return "the peer is not installed"
    (row,) = result["beside_the_peer"]
    speed = row["pairs_per_second"]
    words = f"{number(speed)} pairs/s, {row['peak_MB']:,} MB"
    peak = model_costs.peak_flops(card, result["precision"])
    if peak is None:
        return words
    tokens = None
    if row["form"] == LEFT_OUT:
        tokens = result["tokens_of_a_caption"]
    flops = speed * model_costs.training_flops(model(result["size"]), row["mask"], tokens)["total"]
    return f"{words}, {number(flops / 1e12)} TFLOP/s: {100 * flops / peak:.1f} % of the datasheet peak"


def _memory(result: Mapping[str, Any], card: str) -> str:
    (row,) = result["cases"][:1]
    return f"{row['measured_MB']:,} MB, {row['predicted_MB']:,} MB predicted ({number(row['measured_to_predicted'])})"


def _loss(result: Mapping[str, Any], card: str) -> str:
    row = next(row for row in result["cases"] if row["form"].startswith("tiles"))
    return f"{number(row['milliseconds'])} ms, {row['extra_MB']:,} MB"


def _save(result: Mapping[str, Any], card: str) -> str:
    row = next(row for row in result["cases"] if row["way"] == "background")
    return f"stalls for {number(row['stall_s'])} s, written after {number(row['written_s'])} s"


def _attention(result: Mapping[str, Any], card: str) -> str:
    return "; ".join(map(_attention_case, result["cases"]))


def _attention_case(row: Mapping[str, Any]) -> str:
    words = [f"{backend} {value}" for backend, value in row.items() if backend not in ("tokens", "head", "used")]
    if row.get("used"):
        words.append(f"runs use {row['used']}")
    return f"{row['tokens']} tokens, head size {row['head']}: {', '.join(words)}"


def _trace(result: Mapping[str, Any], card: str) -> str:
    first = sorted(result["longest"].items(), key=lambda item: -item[1])[:3]
    longest = ", ".join(f"{name[:30]} {100 * share:.0f} %" for name, share in first)
    ms = number(result["milliseconds"])
    return f"{ms} ms a step, kernels {100 * result['busy']:.0f} %, {result['kernels']:,} of them: {longest}"


def _step_row(name: str, size: str, batch: int, mask: str, form: str, compiled: bool, limit: int = 150) -> GpuRow:
    how = "compiled" if compiled else "eager"
    words = ("step.py", "--size", size, "--batch", str(batch), "--beside", mask, "--masks", "--forms", form)
    what = f"step of {size}, b = {batch}, mask {mask}, {form}, {how}"
    return GpuRow(name, what, (*words, *(["--compile"] if compiled else [])), _step, limit)


def _memory_row(batch: int, mask: str) -> GpuRow:
    words = ("memory.py", "--batch", str(batch), "--mask", mask, "--recompute", "no")
    return GpuRow(f"memory_{batch}_{mask}", f"memory of B/16, b = {batch}, mask {mask}", words, _memory, 60)


def _loss_row(b: int, tile: int, tf32: bool = False) -> GpuRow:
    words = ("loss.py", "--local", str(b), "--batch", "65536", "--tiles", str(tile), *(["--tf32"] if tf32 else []))
    name = f"loss_{b}_{tile}"
    what = f"loss, b = {b:,}, B = 65,536, tile {tile:,}"
    if tf32:
        name += "_tf32"
        what += ", TF32"
    return GpuRow(name, what, words, _loss, 60, ("--quick", "--tiles", "256"))


ROWS = (
    GpuRow("tests", "pytest -m gpu", ("gpu.py", "--case", "tests"), _tests, 240),
    GpuRow("matmul", "products of random matrices in bf16", ("gpu.py", "--case", "matmul"), _matmul),
    GpuRow("save", "save of 2 GB in the background", ("checkpoint.py", "--ranks", "1", "--bytes", "2000000000",
           "--rounds", "3", "--planning", "0"), _save, 150, ("--quick",)),
    _step_row("step_b16_eager", "B/16", 256, "0.5", OURS, compiled=False),
    _step_row("step_b16", "B/16", 256, "0.5", OURS, compiled=True),
    _step_row("step_b16_packed", "B/16", 256, "0.5", LEFT_OUT, compiled=True),
    _step_row("step_b16_open_clip", "B/16", 256, "0.5", PEER, compiled=True),
    _step_row("step_h14", "H/14", 192, "0.5", OURS, compiled=True, limit=200),
    *(_step_row(f"step_l16_{mask}", "L/16", 64, mask, OURS, compiled=True) for mask in ("0", "0.5", "0.75")),
    *(_memory_row(batch, mask) for batch in (128, 256, 512) for mask in ("0.75", "0.5", "0")),
    *(_loss_row(b, tile) for b in (128, 8192) for tile in (1024, 8192, 65_536)),
    *(_loss_row(b, tile, tf32=True) for b, tile in ((128, 65_536), (8192, 8192))),
    GpuRow("attention", "attention of 256 pairs, 16 heads, forward and backward, ms",
           ("gpu.py", "--case", "attention"), _attention),
    GpuRow("trace", "three steps of B/16, b = 256, mask 0.5, compiled, profiled", ("gpu.py", "--case", "trace"), _trace,
           150),
)  # fmt: skip


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a row -> its file, for the rows that were run."""
    files = {row.name: folder / f"{row.name}.json" for row in ROWS}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}


def cells(found: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Cells of the table: what, result or reason, card, seconds."""
    lines = []
    for row in ROWS:
        entry = found.get(row.name)
        if entry is None:
            lines.append([row.what, NOT_RUN, "", ""])
            continue
        if entry["status"] == MEASURED:
            words = row.figure(entry["result"], entry["card"])
        else:
            words = entry["status"]
        lines.append([row.what, words, entry["card"], number(entry["seconds"])])
    return lines
