"""Measures our training on one GPU: steps, memory, loss, saves and attention, a process and a file of results per row.

Rows that have a file are skipped, so an interrupted run continues where it was. Running out of memory, or of the time
of a row, is a result. Rows for which no time is left stay "not run". Nothing is downloaded; a peer that is not
installed is left out. `make bench-gpu` runs this and writes benchmarks/RESULTS.md.

`flip doctor --measure` asks another question: how fast a site is, for its plans. Limits, steps, products of matrices
and traces are the same code (``jobs.measuring.limited``, ``jobs.measuring.functions``); rows beside other projects are
here.

Examples:
  python benchmarks/gpu.py                                        # all rows, 25 minutes at most
  python benchmarks/gpu.py --only step_b16 step_h14 --again       # measure two rows again
  python benchmarks/gpu.py --device cpu --quick --folder /tmp/x   # every row at a small size; the figures mean nothing
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.lib import results
from benchmarks.lib.gpu_rows import ROWS, GpuRow
from flip.runs.rundir import write_json
from jobs.measuring.limited import MEMORY_ERRORS, run_limited
from jobs.planning.measurement import MEASURED, TIME_LIMIT

FOLDER = Path(__file__).resolve().parent
SHAPES = (256, 16, 129, 80), (256, 16, 128, 80), (256, 16, 129, 64)
"""Pairs, heads, tokens and head size of H/14 at mask 0.5, which has 128 visible patches and the class token; the same
without the class token, and with the head size of B and L: kernels may be slow at odd sizes."""
QUICK_LIMIT = 1200
"""Seconds of a row with ``--quick``, on a machine that may be busy."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--folder", type=Path, default=FOLDER / "results" / "gpu", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=25.0, help="of all rows together (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], metavar="ROW", help="these rows alone")
    parser.add_argument("--again", action="store_true", help="measure rows that have a file, too")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    results.options(parser, "gpu/ROW")
    chosen = parser.parse_args(arguments)
    if chosen.case:
        results.publish({"benchmark": "gpu", **CASES[chosen.case](chosen)}, chosen)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the row's processes too
    chosen.folder.mkdir(parents=True, exist_ok=True)
    facts = _facts(chosen.device)
    end = time.monotonic() + 60 * chosen.minutes
    rows = [row for row in ROWS if not chosen.only or row.name in chosen.only]
    for row in rows:
        file = chosen.folder / f"{row.name}.json"
        if file.exists() and not chosen.again:
            continue
        left = end - time.monotonic()
        if left <= 0:
            print(f"no time is left for {row.name}; the next call continues there", file=sys.stderr)
            break
        limit = QUICK_LIMIT if chosen.quick else row.limit
        entry = facts | measure(row, chosen.device, chosen.quick, min(limit, left), chosen.folder)
        if entry["status"] == TIME_LIMIT and left < limit:
            break  # it had less than its own limit
        write_json(file, entry)
        print(f"{row.name:24} {entry['status']}, {entry['seconds']:.0f} s {entry['detail']}", flush=True)
    return 0


def measure(row: GpuRow, device: str, quick: bool, limit: float, folder: Path) -> dict[str, Any]:
    """Run a row in processes of its own: its status, seconds, results of the script, and the last line of an error."""
    script, *options = row.words
    argv = [script, *options, "--device", device, *(row.quick if quick else ()), "--json"]
    command = [sys.executable, str(FOLDER / script), *argv[1:]]
    if script == "gpu.py":
        command += ["--folder", str(folder)]
    environment = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # as a run has it (jobs/host/rank_entry.py)
    environment |= os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = run_limited(command, limit, environment)
    result = {}
    if ended.status == MEASURED:
        result = json.loads(ended.output)
    return {
        "row": row.name, "what": row.what, "command": f"python benchmarks/{' '.join(argv)}",
        "status": ended.status, "seconds": ended.seconds, "detail": ended.detail, "quick": quick,
        "result": result,
    }  # fmt: skip


def _facts(device: str) -> dict[str, Any]:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here. To try the rows without one: --device cpu --quick --folder FOLDER")
    if device == "cuda":
        card = torch.cuda.get_device_name()
    else:
        card = "CPU"
    return {"card": card, "cuda": torch.version.cuda or "", "machine": results.machine()} | {
        "versions": results.versions(["torch", "timm", "open_clip_torch"])
    }


def _tests(chosen: argparse.Namespace) -> dict[str, Any]:
    """The tests marked ``gpu``, or without a GPU none."""
    files = [path for path in (FOLDER.parent / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *map(str, sorted(files))]
    if chosen.device == "cpu":
        command += ["--collect-only"]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-3000:]}\n{done.stderr[-1000:]}")
    return {"summary": done.stdout.strip().splitlines()[-1].strip("= ")}


def _attention(chosen: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each kernel of scaled_dot_product_attention at each shape, forward and backward, in bf16, and the
    kernel that a run with ``compute.attention: sdpa`` uses there."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from flip.models import attention

    cuda = chosen.device == "cuda"
    generator = torch.Generator().manual_seed(chosen.seed)

    def milliseconds(backend: str, shape: Sequence[int]) -> Any:
        query, key, value = (
            torch.randn(*shape, generator=generator).to(chosen.device, torch.bfloat16).requires_grad_()
            for _ in range(3)
        )

        def passes() -> None:
            torch.nn.functional.scaled_dot_product_attention(query, key, value).sum().backward()
            if cuda:
                torch.cuda.synchronize()

        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                passes()
                return results.rounded(1000 * statistics.median(results.seconds(passes) for _ in range(10)))
        except RuntimeError as error:  # no kernel for this device or shape
            if MEMORY_ERRORS.search(type(error).__name__):
                raise
            return "no kernel"

    def used(pairs: int, heads: int, tokens: int, width: int) -> str:
        shape = attention.Shape("image", heads, tokens, tokens, width)
        device = torch.device(chosen.device)
        return attention.choose_kernels(attention.AUTOMATIC, [shape], pairs, torch.bfloat16, device).get(shape, "")

    backends = ("MATH", "EFFICIENT_ATTENTION", "FLASH_ATTENTION", "CUDNN_ATTENTION")
    return {
        "cases": [
            {"tokens": shape[2], "head": shape[3]}
            | {each.removesuffix("_ATTENTION").lower(): milliseconds(each, shape) for each in backends}
            | {"used": used(*shape)}
            for shape in ([(2, 2, 9, 16)] if chosen.quick else SHAPES)
        ]
    }


def _trace(chosen: argparse.Namespace) -> dict[str, Any]:
    """Steps of B/16 under torch's profiler, written to trace.json.gz."""
    from jobs.measuring.functions.trace import trace

    size, batch = ("tiny", 4) if chosen.quick else ("B/16", 256)
    file = str(chosen.folder / "trace.json.gz")
    return trace(chosen.device, size, "0.5", batch, "bf16", chosen.device == "cuda", file=file)


def _matmul(chosen: argparse.Namespace) -> dict[str, Any]:
    """The rate that ``matmul_utilisation`` of a run is a share of."""
    from jobs.measuring.functions.arithmetic import matmul

    return {"TFLOPS": matmul(chosen.device, 0.05 if chosen.quick else 1.0)["devices"][0]["bf16"]}


CASES = {"tests": _tests, "matmul": _matmul, "attention": _attention, "trace": _trace}

if __name__ == "__main__":
    sys.exit(main())
