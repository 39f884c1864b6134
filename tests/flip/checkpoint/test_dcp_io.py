"""Which rank writes what of a checkpoint."""

from types import SimpleNamespace

import pytest
import torch

from flip.checkpoint.dcp_io import own_part
from flip.distributed.parallel import copies, copy_number


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
    assert (copies(sharded(rank, 1)), copy_number(sharded(rank, 1))) == (2, number)
    assert copies(torch.zeros(2)) == 1
