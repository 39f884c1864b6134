"""What rank 0 computes for a save of many ranks, without the ranks: planning, and the bytes that ranks exchange for it.

A process group without peers (torch's ``fake`` backend) shards a model as that many ranks do; rank 0 holds its real
shard. Seconds are processor time, so that disks and other load count little. DCP's plans of the other ranks are real
too: they are computed with the coordinates of each rank. Then they are pickled and unpickled, as DCP exchanges them.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.lib.results import rounded

DCP = "DCP's planner"
CACHED = "DCP's planner, plans cached"
OURS = "ours"
SAVES = 3


def rows(size: str, ranks: int, folder: str) -> list[dict[str, Any]]:
    """A row for each way: seconds and bytes of the first save and of a later one, and our save without waits."""
    import torch
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        world, state = _state(size, ranks)
        facts = {"size": size, "ranks": ranks, "items": len(state)}
        ways = [(OURS, _ours(world, state, Path(folder))), *_dcp(state, ranks).items()]
        return [facts | {"way": way} | found for way, found in ways]
    finally:
        distributed.destroy_process_group()


def _state(size: str, ranks: int) -> tuple[Any, dict[str, Any]]:
    """The world of rank 0, and its shards of a model and of both moments."""
    import torch

    from flip.checkpoint import saver
    from flip.config import merge
    from flip.distributed import parallel
    from flip.models import clip
    from flip.training import parameter_groups

    config = merge.merge([("benchmark", {"model": {"size": size}, "compute": {"device": "cpu", "precision": "bf16"}})])
    world = parallel.World(0, ranks, torch.device("cpu"), None, None)
    with torch.device("meta"):
        model = clip.CLIPModel(config.model, config.augment, "sdpa")
    parallel.apply_parallelism(model, world, config.compute)
    for parameter in model.parameters():
        parallel.local(parameter).detach().zero_()
    state = saver.model_state(model)
    return world, state | saver.optimizer_state(model, parameter_groups.build(model.named_parameters(), config.optim))


def _spent(call: Callable[[], Any]) -> tuple[float, Any]:
    start_time = time.process_time()
    result = call()
    return time.process_time() - start_time, result


def _ours(world: Any, state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Saves by ``Checkpointer``, whose collectives return what all ranks would send."""
    from flip.checkpoint import saver
    from flip.checkpoint.staging import StagedShard
    from flip.distributed import collectives
    from flip.runs.rundir import RunDir

    exchanged = 0

    def all_gather_json(value: Any, group: Any) -> list[Any]:
        nonlocal exchanged
        values = [value] * world.size
        if isinstance(value, dict):  # files, whose names have the number of the rank
            ((name, record),) = value.items()
            values = [{name.replace("00001", f"{rank + 1:05d}", 1): record} for rank in range(world.size)]
        sent = [collectives._encoded(each) for each in values]
        exchanged += sum(map(len, sent))
        return list(map(collectives._decoded, sent))

    run = RunDir(folder / "sweep" / "run")
    run.attempt(1).mkdir(parents=True)
    checkpointer = saver.Checkpointer(run, 1, world, keep=1)
    saves = []
    sizes = []
    planning, staged = _spent(lambda: StagedShard(state, 0))
    later, fits = _spent(lambda: staged.fits(state))
    assert fits
    with (
        mock.patch.object(saver, "all_gather_json", all_gather_json),
        mock.patch.object(collectives, "all_gather_json", all_gather_json),
    ):
        for samples in range(1, SAVES + 1):
            exchanged = 0
            saves.append(_spent(lambda samples=samples: checkpointer.save(state, "pretrain", samples))[0])
            sizes.append(exchanged)
    return _row(planning, later, sizes[0], sizes[-1]) | {
        "save_first_s": rounded(saves[0]),
        "save_s": rounded(saves[-1]),
    }


def _dcp(state: dict[str, Any], ranks: int) -> dict[str, dict[str, Any]]:
    """DCP's plans of all ranks, merged by its rank 0: in each save, or with its cache of plans in the first alone."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.planner import SavePlan
    from torch.distributed.device_mesh import DeviceMesh

    def local_plan(planner: Any, rank: int) -> Any:
        with mock.patch.object(DeviceMesh, "_sym_get_coordinate", lambda mesh, dimension: rank):
            planner.set_up_planner(state, is_coordinator=rank == 0)
            return planner.create_local_plan()

    planner = DefaultSavePlanner(enable_plan_caching=True)

    def plan(others: list[bytes]) -> int:
        """As DCP's save: a local plan, those of the others, the global plan, and each rank's part of it."""
        own = local_plan(planner, 0)
        merged, _ = planner.create_global_plan([own, *map(pickle.loads, others)])
        planner.finish_plan(merged[0])
        return sum(map(len, others)) + sum(len(pickle.dumps(part)) for part in merged[1:])

    others = [pickle.dumps(local_plan(DefaultSavePlanner(), rank)) for rank in range(1, ranks)]
    first, size = _spent(lambda: plan(others))
    later, small = _spent(lambda: plan([pickle.dumps(SavePlan([], usable=False))] * (ranks - 1)))
    no_save = {"save_first_s": "", "save_s": ""}
    return {DCP: _row(first, first, size, size) | no_save, CACHED: _row(first, later, size, small) | no_save}


def _row(first: float, later: float, bytes_first: int, bytes_later: int) -> dict[str, Any]:
    return {
        "planning_first_s": rounded(first), "planning_s": rounded(later),
        "exchanged_first_MB": rounded(bytes_first / 1e6), "exchanged_MB": rounded(bytes_later / 1e6),
    }  # fmt: skip
