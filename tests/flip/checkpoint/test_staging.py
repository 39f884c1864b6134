"""Tests the copy of a checkpoint in host memory: which rank writes which tensors, and the reuse of its buffer."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from flip.checkpoint.safetensors_io import CheckpointFiles, read_tensors, write_shard
from flip.checkpoint.staging import StagedShard, own_part
from flip.distributed.parallel import replica_of


class Mesh:
    """A mesh of two replicas of three ranks, as with ``compute.replicate: 2``: rank 0 is (0, 0), rank 5 is (1, 2)."""

    def __init__(self, rank, sizes=(2, 3)):
        self.sizes = sizes
        self.coordinates = divmod(rank, 3)

    def size(self, dimension):
        return self.sizes[dimension]

    def get_local_rank(self, dimension):
        return self.coordinates[dimension]


def sharded(rank, numbers):
    places = [SimpleNamespace(is_replicate=lambda: True), SimpleNamespace(is_replicate=lambda: False)]
    return SimpleNamespace(placements=places, device_mesh=Mesh(rank), numel=lambda: numbers)


SIZES = {"a": 100, "b": 10, "c": 100, "d": 10, "e": 60}


def state(rank):
    return {**{name: sharded(rank, size) for name, size in SIZES.items()}, "step": torch.zeros(())}


def test_own_part_splits_shards_across_replicas_and_gives_scalars_to_rank_0():
    parts = [own_part(state(rank), rank) for rank in range(6)]
    for shard in range(3):
        first = parts[shard].keys() - {"step"}
        second = parts[3 + shard].keys() - {"step"}
        assert first | second == SIZES.keys() and not first & second
        assert abs(sum(SIZES[name] for name in first) - sum(SIZES[name] for name in second)) <= 60
    assert ["step" in part for part in parts] == [True] + [False] * 5


@pytest.mark.parametrize(("rank", "number"), [(0, 0), (2, 0), (3, 1), (5, 1)])
def test_replica_of_returns_replica_index_and_count(rank, number):
    assert replica_of(sharded(rank, 1)) == (number, 2) and replica_of(torch.zeros(2)) == (0, 1)


def tensors(start=0.0):
    """Tensors of all item sizes, an empty shard and a scalar, in another order than in the file."""
    return {
        "model.b": torch.arange(5, dtype=torch.bfloat16) + start,
        "model.a": (torch.arange(6.0) + start).view(2, 3),
        "optim.step": torch.tensor(7.0 + start),
        "model.empty": torch.zeros(0, 4),
        "count": torch.arange(3, dtype=torch.int64) + int(start),
        "flags": torch.ones(3, dtype=torch.uint8),
    }


def test_staged_shard_reuses_buffer_and_keeps_every_bit(tmp_path):
    staged = StagedShard(tensors(), 0)
    for start in (0.0, 1.5, -3.0):
        state = tensors(start)
        assert staged.fits(state)
        staged.fill(state)
        folder = tmp_path / str(start)
        folder.mkdir()
        files = write_shard(folder, staged.data, 0)
        restored = {name: torch.full_like(tensor, 9) for name, tensor in state.items()}
        read_tensors(CheckpointFiles(folder, files), restored)
        read_by_safetensors = load(bytes(staged.data))
        assert read_by_safetensors.keys() == restored.keys() == staged.tensors.keys()
        for name, tensor in state.items():
            assert torch.equal(restored[name], tensor) and torch.equal(read_by_safetensors[name], tensor)


def test_staged_shard_is_independent_of_later_tensor_changes():
    state = tensors()
    staged = StagedShard(state, 0)
    staged.fill(state)
    before = bytes(staged.data)
    for tensor in state.values():
        tensor += 1
    assert bytes(staged.data) == before


MESH = Mesh(0)


def layouts(mesh=MESH, placements=("shard",)):
    """Stand-ins for tensors of which only the layout is read."""
    fields = {"dtype": torch.float32, "shape": (4, 3), "placements": placements, "device_mesh": mesh}
    return {name: SimpleNamespace(**fields) for name in ("a", "b")}


@pytest.mark.parametrize(
    "other",
    [
        {"a": layouts()["a"]},
        {**layouts(), "c": layouts()["a"]},
        dict(reversed(layouts().items())),
        layouts(mesh=Mesh(0, (1, 6))),
        layouts(placements=("replicate",)),
        {**layouts(), "b": SimpleNamespace(**vars(layouts()["b"]) | {"dtype": torch.bfloat16})},
        {**layouts(), "b": SimpleNamespace(**vars(layouts()["b"]) | {"shape": (4, 2)})},
    ],
    ids=["one less", "one more", "another order", "another mesh", "other placements", "another type", "another shape"],
)
def test_staged_shard_does_not_fit_other_layout(other, monkeypatch):
    monkeypatch.setattr("flip.checkpoint.staging.own_part", lambda state, rank: {})
    staged = StagedShard(layouts(), 0)
    assert staged.fits(layouts()) and not staged.fits(other)


def test_write_shard_writes_no_file_for_rank_without_tensors(tmp_path):
    state = {"step": torch.zeros(())}
    staged = StagedShard(state, 1)
    staged.fill(state)
    assert write_shard(tmp_path, staged.data, 1) == {} and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can lock pages")
def test_staged_shard_falls_back_to_pageable_memory(caplog):
    state = tensors()
    staged = StagedShard(state, 0, pinned=True)
    staged.fill(state)
    assert "not page-locked" in caplog.text and torch.equal(staged.tensors["model.a"], state["model.a"])
