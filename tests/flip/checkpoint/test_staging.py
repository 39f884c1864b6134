"""The copy of a checkpoint in host memory: which rank writes what, and the layout that saves share."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load

from flip.checkpoint.safetensors_io import CheckpointFiles, read_tensors, write_shard
from flip.checkpoint.staging import StagedShard, own_part
from flip.distributed.parallel import replica_of


class Mesh:
    """Two copies over three ranks each, as ``compute.replicate: 2`` makes it; rank 0 is (0, 0), rank 5 (1, 2)."""

    def __init__(self, rank, sizes=(2, 3)):
        self.sizes, self.at = sizes, divmod(rank, 3)

    def size(self, dimension):
        return self.sizes[dimension]

    def get_local_rank(self, dimension):
        return self.at[dimension]


def sharded(rank, numbers):
    places = [SimpleNamespace(is_replicate=lambda: True), SimpleNamespace(is_replicate=lambda: False)]
    return SimpleNamespace(placements=places, device_mesh=Mesh(rank), numel=lambda: numbers)


SIZES = {"a": 100, "b": 10, "c": 100, "d": 10, "e": 60}


def state(rank):
    return {**{name: sharded(rank, size) for name, size in SIZES.items()}, "step": torch.zeros(())}


def test_each_part_is_written_by_one_copy_and_what_is_whole_by_rank_0():
    parts = [own_part(state(rank), rank) for rank in range(6)]
    for shard in range(3):
        first, second = parts[shard].keys() - {"step"}, parts[3 + shard].keys() - {"step"}
        assert first | second == SIZES.keys() and not first & second
        assert abs(sum(SIZES[name] for name in first) - sum(SIZES[name] for name in second)) <= 60
    assert ["step" in part for part in parts] == [True] + [False] * 5


@pytest.mark.parametrize(("rank", "number"), [(0, 0), (2, 0), (3, 1), (5, 1)])
def test_ranks_of_a_copy(rank, number):
    assert replica_of(sharded(rank, 1)) == (number, 2) and replica_of(torch.zeros(2)) == (0, 1)


def tensors(start=0.0):
    """All sizes of values, an empty shard and a value without dimensions, in an order that is not that of the file."""
    return {
        "model.b": torch.arange(5, dtype=torch.bfloat16) + start,
        "model.a": (torch.arange(6.0) + start).view(2, 3),
        "optim.step": torch.tensor(7.0 + start),
        "model.empty": torch.zeros(0, 4),
        "count": torch.arange(3, dtype=torch.int64) + int(start),
        "flags": torch.ones(3, dtype=torch.uint8),
    }


def test_saves_of_one_layout_share_a_buffer_and_keep_every_bit(tmp_path):
    staged = StagedShard(tensors(), 0)
    for start in (0.0, 1.5, -3.0):
        state = tensors(start)
        assert staged.fits(state)
        staged.fill(state)
        folder = tmp_path / str(start)
        folder.mkdir()
        files = write_shard(folder, staged.data, 0)
        found = {name: torch.full_like(tensor, 9) for name, tensor in state.items()}
        read_tensors(CheckpointFiles(folder, files), found)
        read_by_safetensors = load(bytes(staged.data))
        assert read_by_safetensors.keys() == found.keys() == staged.tensors.keys()
        for name, tensor in state.items():
            assert torch.equal(found[name], tensor) and torch.equal(read_by_safetensors[name], tensor)


def test_a_copy_holds_the_values_of_its_time():
    state = tensors()
    staged = StagedShard(state, 0)
    staged.fill(state)
    before = bytes(staged.data)
    for tensor in state.values():
        tensor += 1
    assert bytes(staged.data) == before


MESH = Mesh(0)


def layouts(mesh=MESH, placements=("shard",)):
    """Tensors of which only the layout is read."""
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
def test_another_layout_does_not_fit(other, monkeypatch):
    monkeypatch.setattr("flip.checkpoint.staging.own_part", lambda state, rank: {})
    staged = StagedShard(layouts(), 0)
    assert staged.fits(layouts()) and not staged.fits(other)


def test_a_rank_without_tensors_writes_no_file(tmp_path):
    state = {"step": torch.zeros(())}
    staged = StagedShard(state, 1)
    staged.fill(state)
    assert write_shard(tmp_path, staged.data, 1) == {} and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine can lock pages")
def test_pageable_memory_replaces_memory_that_cannot_be_locked(caplog):
    state = tensors()
    staged = StagedShard(state, 0, pinned=True)
    staged.fill(state)
    assert "not page-locked" in caplog.text and torch.equal(staged.tensors["model.a"], state["model.a"])
