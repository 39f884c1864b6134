"""How long a save blocks training: in the background, in the foreground, and by torch's own asynchronous save.

Ranks on this machine hold a model's weights and both moments, sharded, and multiply matrices in place of training
steps. In every round each way saves once, in rotating order. Reported are medians over rounds: ``stall``, seconds for
which the call blocks the loop; ``written``, seconds until the checkpoint is complete; ``slowed``, the time of a matrix
product during the save relative to one without.

``planning``: what rank 0 computes, and what ranks exchange, before and during a save on 512 simulated ranks, by DCP's
planner and by ours (``benchmarks/lib/save_planning.py``).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks.lib import results, save_planning
from benchmarks.lib.results import rounded
from flip.config.schema import MODEL_PRESETS

WIDTH = 1024
BLOCKING = "blocking"
BACKGROUND = "background"
TORCH = "torch async_save"
WAYS = BLOCKING, BACKGROUND, TORCH


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=500_000_000, help="of all ranks (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: the temporary folder)")
    parser.add_argument("--threads", type=int, default=1, help="of a rank (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--planning", type=int, default=512, help="simulated ranks; 0: none (default: %(default)s)")
    parser.add_argument("--size", choices=MODEL_PRESETS, default="H/14", help="simulated (default: %(default)s)")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    results.options(parser, "checkpoint")
    chosen = parser.parse_args(arguments)
    if chosen.rank:
        return _rank(json.loads(chosen.rank))
    if chosen.quick:
        chosen.bytes = 40_000_000
        chosen.ranks = [2]
        chosen.rounds = 1
        chosen.planning = min(chosen.planning, 8)
        chosen.size = "tiny"
    rows = [row for size in chosen.ranks for row in _cases(size, chosen)]
    facts = results.machine() | results.versions(["torch"])
    report = {"benchmark": "checkpoint", "machine": facts, "threads": chosen.threads, "cases": rows}
    results.publish(report | ({"planning": _planning(chosen)} if chosen.planning else {}), chosen)
    return 0


def _planning(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    context = get_context("spawn")  # its process group has no peers
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder, ProcessPoolExecutor(1, context) as pool:
        return pool.submit(save_planning.rows, chosen.size, chosen.planning, folder).result()


def _cases(size: int, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per way, of so many ranks."""
    folder = Path(tempfile.mkdtemp(dir=chosen.folder))
    work = {"folder": str(folder)} | {name: getattr(chosen, name) for name in ("bytes", "rounds", "threads", "device")}
    port = _port()
    try:
        ranks = []
        for rank in range(size):
            place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, __file__, "--rank", json.dumps(work)],
                    env=os.environ | {name: str(value) for name, value in place.items()},
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        outputs = [rank.communicate()[0] for rank in ranks]
    finally:
        shutil.rmtree(folder)
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("a rank failed; its words are above")
    times = json.loads(outputs[0].strip().splitlines()[-1])
    rows = []
    for way in WAYS:
        stall, written, slowed = (statistics.median(times[way][key]) for key in ("stall", "written", "slowed"))
        rows.append({
            "ranks": size, "megabytes": round(times["bytes"] / 1e6), "way": way, "stall_s": rounded(stall),
            **results.ratio(times[way]["stall"], times[BLOCKING]["stall"], "share_of_blocking"),
            "stall_to_torch": results.ratio(times[way]["stall"], times[TORCH]["stall"]),
            "written_s": rounded(written), "slowed": rounded(slowed),
        })  # fmt: skip
    return rows


def _port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _state(work: dict[str, Any], world: Any) -> dict[str, Any]:
    """A training state of ``bytes``, sharded over the ranks."""
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    from flip.checkpoint import saver as checkpoint
    from flip.config import schema
    from flip.training import parameter_groups

    layers = max(1, work["bytes"] // (12 * WIDTH**2))
    pair = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    pair.to(world.device)
    if world.size > 1:
        for layer in pair:
            fully_shard(layer)
        fully_shard(pair)
    state = checkpoint.model_state(pair)
    return state | checkpoint.optimizer_state(pair, parameter_groups.build(pair.named_parameters(), schema.Optim()))


def _rank(work: dict[str, Any]) -> int:
    import torch
    from torch import distributed

    from flip.config import schema
    from flip.distributed import parallel

    world = parallel.start(schema.Compute(device=work["device"], threads=work["threads"], deterministic="no"))
    state = _state(work, world)
    left = torch.ones(256, 256, device=world.device)

    def product() -> float:
        start_time = time.perf_counter()
        left @ left @ left
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start_time

    ways = {BLOCKING: _ours(work, world, False), BACKGROUND: _ours(work, world, True), TORCH: _torch(work, world)}
    times: dict[str, Any] = {way: {"stall": [], "written": [], "slowed": []} for way in WAYS}
    for way in WAYS:  # the first of each makes buffers
        ways[way](state)()
    usual = statistics.median(product() for _ in range(500))
    for number in range(work["rounds"]):
        for way in WAYS[number % 3 :] + WAYS[: number % 3]:
            distributed.barrier()
            start_time = time.perf_counter()
            settle = ways[way](state)
            times[way]["stall"].append(time.perf_counter() - start_time)
            if way != BLOCKING:
                products = [product() for _ in range(200)]
            else:
                products = [usual]
            settle()
            times[way]["written"].append(time.perf_counter() - start_time)
            times[way]["slowed"].append(statistics.median(products) / usual)
    times["bytes"] = sum(parallel.local(tensor).nbytes for tensor in state.values()) * world.size
    if world.is_rank0:
        print(json.dumps(times), flush=True)
    parallel.stop()
    return 0


def _ours(work: dict[str, Any], world: Any, background: bool) -> Callable[[Any], Callable[[], None]]:
    from flip.checkpoint.saver import Checkpointer
    from flip.runs.rundir import RunDir

    run = RunDir(Path(work["folder"]) / "sweep" / f"run{background}")
    run.attempt(1).mkdir(parents=True, exist_ok=True)
    saver = Checkpointer(run, 1, world, keep=1, background=background)
    samples = 0

    def save(state: Any) -> Callable[[], None]:
        nonlocal samples
        samples += 1
        saver.save(state, "pretrain", samples)
        return saver.wait

    return save


def _torch(work: dict[str, Any], world: Any) -> Callable[[Any], Callable[[], None]]:
    """As in its documentation: a thread and its own stager. Writes ``.distcp``, without checksums."""
    from torch.distributed import checkpoint as dcp

    count = 0

    def save(state: Any) -> Callable[[], None]:
        nonlocal count
        count += 1
        path = Path(work["folder"]) / f"torch{count}"
        answer: Any = dcp.async_save(state, checkpoint_id=str(path), process_group=world.checkpoint_group)

        def settle() -> None:
            answer.result()
            if world.is_rank0:
                shutil.rmtree(path)

        return settle

    return save


if __name__ == "__main__":
    sys.exit(main())
