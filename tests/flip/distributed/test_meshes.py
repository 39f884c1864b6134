"""Tests of the meshes of ranks that share weights, and of the process groups in which they exchange gradients."""

import dataclasses

import pytest
import torch
from torch import distributed, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from flip.distributed import parallel
from tests.harness.sharded_models import compute, launch


@pytest.mark.parametrize(
    "split, expected",
    [
        (lambda split_ranks, timeout, backend: (backend, split_ranks), "cuda:nccl"),
        (lambda split_ranks, timeout: None, "enumerated"),  # before torch 2.13
    ],
)
def test_mesh_splits_nccl_alone_if_torch_can(monkeypatch, split, expected):
    monkeypatch.setattr(distributed, "split_group", split)
    monkeypatch.setattr(
        distributed, "new_subgroups_by_enumeration", lambda ranks, timeout: (("enumerated", ranks), None)
    )
    monkeypatch.setattr(parallel.DeviceMesh, "from_group", lambda groups, *_, **__: groups)
    monkeypatch.setattr(parallel, "check_group", lambda *_: None)
    groups = parallel._mesh(parallel.World(0, 4, torch.device("cuda"), None, None), 2)
    assert groups == [(expected, [[0, 2], [1, 3]]), (expected, [[0, 1], [2, 3]])]


@pytest.mark.parametrize("device, expected", [("cpu", []), ("cuda", [True])])
def test_separate_reductions_sets_own_group_on_cuda_only(device, expected):
    calls = []
    world = parallel.World(0, 2, torch.device(device), None, None)
    model = nn.Linear(1, 1)
    parallel.separate_reductions(model, world)  # no effect: the model is not sharded, or torch is older
    model.set_separate_reduce_scatter_group = lambda: calls.append(True)
    parallel.separate_reductions(model, world)
    assert calls == expected and callable(FSDPModule.set_separate_reduce_scatter_group)


def reduction_groups(_, world):
    """Number of process groups after each of three models, which sum gradients in a group of their own."""
    counts = []
    like = None
    for _ in range(3):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.scale = nn.Parameter(torch.ones(1))
        if like:
            mesh = like[0].weight.device_mesh
        else:
            mesh = init_device_mesh("cpu", (world.size,))
        for unit in (*model, model):
            fully_shard(unit, mesh=mesh)
        parallel.separate_reductions(model, dataclasses.replace(world, device=torch.device("cuda")), like)
        counts.append(len(distributed_c10d._world.pg_names))
        like = model
    return counts


@pytest.mark.skipif(not hasattr(FSDPModule, "set_separate_reduce_scatter_group"), reason="needs torch 2.13")
def test_model_of_next_stage_uses_the_process_groups_of_the_last(monkeypatch):
    monkeypatch.setattr(parallel, "check_group", lambda *_: None)  # there is no GPU
    (counts,) = launch(1, [compute()], reduction_groups)
    assert len(set(counts)) == 1
