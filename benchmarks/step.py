"""A training step compared with open_clip with patch dropout, and masked steps compared with unmasked ones.

Both use the same model (open_clip's towers as in our exports), batch, precision and threads: forward, backward and
optimiser on a batch in memory as each loader delivers it (uint8 patches, or float images). open_clip's loop is that of
its trainer: its CLIP and ClipLoss, torch's AdamW with its arguments, autocast. Each form runs in its own process, so
that peaks of memory are separate (interpreter and libraries included). On a CPU all take steps in turn, so that other
load affects all alike; a GPU has memory for one at a time. One copy of the large model serves all masks: three of L/16
with optimiser states would need 21 GB.

Examples:
  python benchmarks/step.py --out benchmarks/results/step.json
  python benchmarks/step.py --device cuda --batch 256 --large-batch 64 --compile
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from benchmarks.lib import results, training_steps
from benchmarks.lib.profiles import REST
from benchmarks.lib.results import rounded
from benchmarks.lib.training_steps import PEER
from flip import model_costs
from flip.config.schema import MODEL_PRESETS
from jobs.measuring.functions import training_step
from jobs.measuring.functions.peak_memory import peak_bytes
from jobs.measuring.functions.training_step import LEFT_OUT, OURS, Case

WARM = {"cpu": 2, "cuda": 4}
"""Warm-up steps: optimiser states, caches, compilation."""
GPU = "not measured; make bench-gpu"


class Steps(NamedTuple):
    """Of one mask ratio: seconds of each step, peak bytes, share of each operation in a step."""

    times: list[float]
    peak: int
    profile: dict[str, float]

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=MODEL_PRESETS, default="B/16", help="beside the peer (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step (default: %(default)s)")
    parser.add_argument(
        "--large", choices=MODEL_PRESETS, default="L/16", help="masked beside unmasked (default: %(default)s)"
    )
    parser.add_argument("--large-batch", type=int, default=0, help="pairs of its step (default: half of --batch)")
    parser.add_argument("--beside", nargs="*", default=["0.5", "0.75"], help="masks beside the peer (%(default)s)")
    parser.add_argument("--forms", nargs="+", choices=(OURS, LEFT_OUT, PEER), default=(OURS, LEFT_OUT, PEER))
    parser.add_argument("--masks", nargs="*", default=["0", "0.5", "0.75"], help="of the large one (%(default)s)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of each (default: all cores)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="both by torch.compile")
    parser.add_argument("--repeats", type=int, default=5, help="medians are over these steps (default: %(default)s)")
    results.options(parser, "step")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.size = chosen.large = "tiny"
        chosen.batch = 4
        chosen.repeats = 2
        chosen.threads = 1
    machine = results.machine() | results.versions(["torch", "timm", "open_clip_torch"])
    chosen.threads = chosen.threads or machine["cores"]
    rows = [row for mask in chosen.beside for row in _beside(mask, chosen)]
    masked = _masked(chosen)
    report: dict[str, Any] = {"benchmark": "step", "machine": machine, "device": chosen.device}
    report |= {"precision": chosen.precision, "threads": chosen.threads, "compiled": chosen.compile}
    report |= {
        "size": chosen.size,
        "b": chosen.batch,
        "tokens_of_a_caption": rounded(training_step.lengths(chosen.batch, 0).mean()),
    }
    report |= {"beside_the_peer": rows, "masked": {"size": chosen.large, "cases": masked}}
    results.publish(report | ({"gpu": GPU} if chosen.device == "cpu" else {}), chosen)
    return 0


def _beside(mask: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """All forms at one mask ratio: milliseconds of a step, pairs per second, peak memory, and ratios to the peer."""
    names = [form for form in chosen.forms if form != PEER or importlib.util.find_spec("open_clip")]
    cases = [Case(form, chosen.size, chosen.batch, (mask,)) for form in names]
    if chosen.device == "cuda":
        groups = [[case] for case in cases]
    else:
        groups = [cases]
    measured = [form_steps for group in groups for form_steps in _in_turn(group, chosen)]
    peer = dict(zip(names, measured, strict=True)).get(PEER)
    rows = []
    for form, form_steps in zip(names, measured, strict=True):
        row = {"mask": mask, "form": form, "milliseconds": rounded(1000 * form_steps.median)}
        row |= {"pairs_per_second": rounded(chosen.batch / form_steps.median), "peak_MB": round(form_steps.peak / 1e6)}
        row |= {"speed_to_open_clip": "", "least": "", "most": "", "memory_to_open_clip": ""}
        if peer and form != PEER:
            row |= results.ratio(peer.times, form_steps.times, "speed_to_open_clip")
            row |= {"memory_to_open_clip": rounded(form_steps.peak / peer.peak)}
        rows.append(row | {"profile": form_steps.profile})
    return rows


def _masked(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Our steps at all mask ratios, in turn, relative to the smallest mask, with the ratio of FLOPs."""
    if not chosen.masks:
        return []
    batch = chosen.large_batch or max(1, chosen.batch // 2)
    measured = _in_turn([Case(OURS, chosen.large, batch, tuple(chosen.masks))], chosen)
    work = [model_costs.training_flops(training_step.model(chosen.large), mask)["total"] for mask in chosen.masks]
    rows = []
    for mask, form_steps, count in zip(chosen.masks, measured, work, strict=True):
        row = {
            "b": batch,
            "mask": mask,
            "milliseconds": rounded(1000 * form_steps.median),
            "peak_MB": round(form_steps.peak / 1e6),
        }
        row |= {"GFLOPS": rounded(count * batch / form_steps.median / 1e9)}
        row |= results.ratio(form_steps.times, measured[0].times, "time_ratio") | {
            "FLOPs_ratio": rounded(count / work[0])
        }
        row["time_to_FLOPs"] = rounded(row["time_ratio"] / row["FLOPs_ratio"])
        rows.append(row | {"profile": form_steps.profile})
    return rows


def _in_turn(cases: list[Case], chosen: argparse.Namespace) -> list[Steps]:
    """The steps of each case at each of its masks, in that order; each case has a process, all step in turn."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    processes = []
    try:
        for case in cases:
            parent_pipe, child_pipe = context.Pipe()
            processes.append(context.Process(target=_work, args=(child_pipe, case, chosen), daemon=True))
            processes[-1].start()
            child_pipe.close()
            pipes.append(parent_pipe)
            parent_pipe.recv()  # built and warm, one after the other
        turns = [(pipe, i) for case, pipe in zip(cases, pipes, strict=True) for i in range(len(case.masks))]
        seconds: list[list[float]] = [[] for _ in turns]
        for _ in range(chosen.repeats):
            for (pipe, i), times in zip(turns, seconds, strict=True):
                pipe.send(i)
                times.append(pipe.recv())
        measured = []
        for pipe in pipes:
            pipe.send(None)
            measured += pipe.recv()
        return [Steps(times, *rest) for times, rest in zip(seconds, measured, strict=True)]
    except (EOFError, BrokenPipeError, ConnectionResetError) as e:
        for process in processes:
            process.join(1)  # one that died has its exit code then; the others wait for orders that do not come
        codes = {case.form: process.exitcode for case, process in zip(cases, processes, strict=False)}
        for process in processes:
            process.kill()
        raise SystemExit(f"a process that steps has ended (exit codes {codes}; -9: out of memory?)") from e
    finally:
        for process in processes:
            process.join(60)
            process.kill()


def _work(pipe: Connection, case: Case, chosen: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(chosen.threads)
    torch.manual_seed(chosen.seed)
    cuda = chosen.device == "cuda"
    steps = (training_steps.peer if case.form == PEER else training_step.flip_steps)(torch, case, chosen)

    def timed(i: int) -> float:
        start_time = time.perf_counter()
        steps[i]()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start_time

    peaks = {}
    for i in sorted(range(len(steps)), key=lambda i: -float(case.masks[i])):  # from the smallest, as peaks only rise
        for _ in range(WARM[chosen.device]):
            timed(i)
        peaks[i] = peak_bytes(chosen.device)
    pipe.send("ready")
    while (i := pipe.recv()) is not None:
        pipe.send(timed(i))
    pipe.send([(peaks[i], _profile(lambda i=i: timed(i), cuda)) for i in range(len(steps))])


def _profile(timed: Callable[[], float], cuda: bool) -> dict[str, float]:
    """Share of each of torch's operations in one more step: the longest ones, and all others."""
    from jobs.measuring.functions import trace

    with trace.profiler(cuda) as profile:
        timed()
    rows = trace.times(profile, cuda)
    total = sum(seconds for seconds, _, _ in rows) or 1.0
    shares = {name.removeprefix("aten::"): rounded(seconds / total) for seconds, name, _ in rows[: trace.LONGEST]}
    return shares | {REST: rounded(max(0.0, 1 - sum(shares.values())))}


if __name__ == "__main__":
    sys.exit(main())
