"""Tests which ranks send to each other when links are measured."""

import pytest

from flip.distributed import link_speed


@pytest.mark.parametrize(
    ("ranks", "local", "pairs"),
    [
        (2, 2, [(0, 1)]),
        (2, 1, [(0, 1)]),
        (3, 3, [(0, 1), (1, 2), (2, 0)]),
        (4, 2, [(1, 2), (3, 0)]),
        (6, 2, [(1, 2), (3, 4), (5, 0)]),
    ],
)
def test_neighbours_form_a_ring_of_ranks_or_of_nodes(ranks, local, pairs):
    assert link_speed.neighbours(ranks, local) == pairs


@pytest.mark.parametrize(("ranks", "local", "groups"), [(2, 1, 1), (3, 1, 3), (8, 1, 2), (9, 1, 3), (64, 8, 2)])
def test_links_are_measured_in_few_groups_without_a_common_node(ranks, local, groups):
    pairs = link_speed.neighbours(ranks, local)
    parts = link_speed.disjoint(pairs, local)
    assert len(parts) == groups and sorted(sum(parts, [])) == sorted(pairs)
    for part in parts:
        nodes = [rank // local for pair in part for rank in pair]
        assert len(nodes) == len(set(nodes))
