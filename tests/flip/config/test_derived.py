"""Tests of ranges of nodes: which world sizes can be used, and what changes on fewer nodes."""

import pytest

from flip.common.host import Host
from flip.config.derived import at_world, usable_nodes, world_size, world_sizes
from flip.config.identity import diff_identity, identity
from flip.config.merge import assignment, merge, to_dict
from flip.config.resolve import dataset_facts, resolve_auto
from flip.config.validate import validate
from flip.runs.errors import ConfigError
from tests.flip.config.test_validate import BASE


def run(*overrides, gpus=0):
    words = [f"resources.gpus={gpus}", f"resources.processes={gpus or 1}"]
    config = merge([("test", BASE)], [*words, "data.lanes=64", *overrides])
    return resolve_auto(config, Host(cores=2, memory=16 * 10**9), dataset_facts(config))


def test_range_is_read_as_most_and_least_number_of_nodes():
    resources = run("resources.nodes=[2, 8]").resources
    assert (resources.least_nodes, resources.nodes) == (2, 8)
    stored = merge([("config.yaml", to_dict(run("resources.nodes=[2, 8]")))])
    assert stored.resources == resources
    layers = [("test", BASE), assignment("resources.nodes=[2, 8]")]
    assert merge(layers, ["resources.nodes=4"]).resources.least_nodes == 0, "a single number replaces a range"
    assert merge(layers, ["resources.nodes=[4, 16]"]).resources.least_nodes == 4


@pytest.mark.parametrize("value", ["[8]", "[8, 8]", "[8, 4]", "[0, 4]", "[2, 4, 8]", "[2, many]"])
def test_wrong_range_is_refused_with_its_place(value):
    with pytest.raises(ConfigError, match="command line: resources.nodes"):
        run(f"resources.nodes={value}")


def test_usable_nodes_are_those_whose_ranks_divide_the_lanes():
    assert usable_nodes(run("resources.nodes=4")) == [4]
    assert usable_nodes(run("resources.nodes=[2, 16]")) == [2, 4, 8, 16]
    config = run("resources.nodes=[2, 8]", gpus=4)
    assert usable_nodes(config) == [2, 4, 8] and world_sizes(config) == [8, 16, 32]
    assert world_size(config) == 32


def test_explicit_copies_of_the_weights_must_divide_the_ranks():
    assert usable_nodes(run("resources.nodes=[2, 8]", "compute.replicate=4", gpus=1)) == [4, 8]


def test_fewer_nodes_keep_batches_and_length_of_micro_batches():
    config = run("resources.nodes=[2, 8]", "compute.accumulate=2", "compute.replicate=0", gpus=2)
    validate(config)
    for ranks, accumulate in ((16, 2), (8, 4), (4, 8)):
        other = at_world(config, ranks)
        validate(other)
        assert (world_size(other), other.compute.accumulate) == (ranks, accumulate)
        assert other.compute.replicate == other.resources.nodes, "each node has one copy, as on all nodes"
        assert other.stages == config.stages and other.data == config.data


def test_micro_batches_divide_a_rank_batch_that_is_no_multiple():
    sizes = ["stages.pretrain.batch=96", "stages.unmasked.batch=96", "data.lanes=48", "resources.nodes=[8, 12]"]
    assert at_world(run(*sizes), 8).compute.accumulate == 2  # 12 samples a rank in place of 8
    assert at_world(run(*sizes, "compute.accumulate=4"), 8).compute.accumulate == 6  # at most 2 samples at once


def test_other_world_sizes_are_refused_and_a_fixed_number_is_untouched():
    with pytest.raises(ConfigError, match=r"3 ranks were started.*2, 4, 8"):
        at_world(run("resources.nodes=[2, 8]"), 3)
    config = run("resources.nodes=4")
    assert at_world(config, 2) is config


def test_identity_lists_world_sizes_of_range():
    fixed = run("resources.nodes=8")
    ranged = run("resources.nodes=[3, 8]")
    assert identity(fixed, "code")["config"]["world"] == 8
    assert identity(ranged, "code")["config"]["world"] == [4, 8]
    same = run("resources.nodes=[4, 8]", "resources.spares=2")
    assert identity(same, "code") == identity(ranged, "code"), "the world sizes count, not how they are written"
    (change,) = diff_identity(identity(fixed, "code"), ranged)
    assert str(change) == "world: 8 -> [4, 8]"


def test_default_buffer_fits_the_fewest_nodes():
    assert run("resources.nodes=[2, 8]").data.buffer == 2 * 4 * 10**9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resources.nodes=[5, 8]"], r"only 8 nodes of a rank each divide 64 lanes.*\[5, 8\].*one of 1, 2, 4"),
        (["resources.nodes=[3, 6]"], "batch: 128 does not divide by 6 ranks"),
        (["resources.least_nodes=4"], r"a range needs a least number below the most.*\[4, 1\]"),
        (["resources.spares=1"], "spares: a run on one node ends with its node"),
    ],
)
def test_validate_refuses_ranges_and_spares_without_use(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(run(*overrides))


def test_validate_accepts_spares_of_several_nodes():
    validate(run("resources.nodes=[2, 4]", "resources.spares=1"))
