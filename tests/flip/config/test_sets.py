"""Tests how several data sets share the lanes of a run."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flip.common.host import Host
from flip.config.derived import allocate_lanes, dataset_lanes, weight_error
from flip.config.identity import diff_identity, identity
from flip.config.merge import merge
from flip.config.resolve import dataset_facts, resolve_auto
from flip.config.validate import plan_numbers, validate
from flip.runs.errors import ConfigError

HOST = Host(cores=2, memory=10**10)


@given(st.integers(1, 4096), st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_allocate_lanes_is_within_1_lane_of_exact_share(lanes, weights):
    allocation = allocate_lanes(lanes, weights)
    assert sum(allocation) == lanes
    shares = [lanes * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    assert all(abs(count - share) < 1 + 1e-6 for count, share in zip(allocation, shares, strict=True))


def test_weight_error_is_largest_relative_deviation_of_lanes():
    assert allocate_lanes(10, [1, 1, 1, 1]) == [3, 3, 2, 2], "of equal remainders the earlier sets get the lanes"
    assert allocate_lanes(8, [3, 1]) == [6, 2] and weight_error([6, 2], [3, 1]) == 0
    assert allocate_lanes(10, [1, 1, 1]) == [4, 3, 3] and weight_error([4, 3, 3], [1, 1, 1]) == pytest.approx(0.2)


def manifest(folder, samples, chunk=1, mean=1000.0):
    folder.mkdir()
    record = {"samples": samples, "chunk": chunk, "mean_bytes": mean, "digest": f"d{samples}", "version": 2}
    (folder / "manifest.json").write_text(json.dumps(record))
    return str(folder)


@pytest.fixture
def settings(tmp_path):
    return {
        "model.size": "tiny",
        "data.tokenizer": "cache:none",
        "data.sets": [
            {"name": "big", "manifest": manifest(tmp_path / "big", 20_000, 4), "weight": 3},
            {"name": "small", "manifest": manifest(tmp_path / "small", 5_000), "weight": 1},
        ],
        "stages": [{"name": "pretrain", "samples": 100_000, "batch": 96}],
    }


def run(settings, *overrides):
    config = merge([("test", settings)], overrides)
    return resolve_auto(config, HOST, dataset_facts(config))


def test_resolve_assigns_lanes_to_data_sets_by_weight(settings):
    done = run(settings)
    assert done.data.lanes == 96 and done.data.samples == 25_000 and done.data.chunk == 0
    assert [(dataset.lanes, dataset.samples, dataset.chunk) for dataset in done.data.sets] == [
        (72, 20_000, 4),
        (24, 5_000, 1),
    ]
    assert [dataset.lanes for dataset in dataset_lanes(done.data)] == [range(72), range(72, 96)]
    validate(done)
    assert resolve_auto(done, HOST, dataset_facts(done)) == done
    sets = plan_numbers(done)["data"]["sets"]
    assert [(dataset["name"], dataset["lanes"], dataset["passes"]) for dataset in sets] == [
        ("big", 72, pytest.approx(100_032 * 0.75 / 20_000)),
        ("small", 24, pytest.approx(100_032 * 0.25 / 5_000)),
    ]


def test_resolve_chooses_lanes_that_match_weights(settings):
    done = run(settings, "data.sets.big.weight=2", "stages.pretrain.batch=96")
    assert [dataset.lanes for dataset in done.data.sets] == [64, 32]
    small = run(settings, "data.sets.small.samples=0", "data.block=40")
    assert [dataset.lanes for dataset in small.data.sets] == [36, 12]  # 2 * 72 lanes * 40 chunks exceed the 5000 of big


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["data.lanes=6"], ["6 lanes", "big 0.8333", "1% off", "weights"]),
        (["data.lanes=96", "data.sets.big.lanes=70", "data.sets.small.lanes=20"], ["70 + 20 lanes", "has 96"]),
        (["data.lanes=1"], ["1 + 0 lanes"]),
        (["data.lanes=96", "data.block=40"], ["data.sets.big.lanes", "72 lanes", "has 5000"]),
        (["data.sets.big.name=small"], ["two have the same name"]),
        (["data.sets.big.weight=0"], ["data.sets.big.weight", "above 0"]),
        (["data.sets.big.chunk=2"], ["data.sets.big.chunk", "hold 4"]),
        (["data.manifest=/somewhere"], ["data.sets", "/somewhere", "data.manifest to ''"]),
    ],
)
def test_validate_rejects_invalid_data_sets(settings, overrides, words):
    with pytest.raises(ConfigError) as caught:
        validate(run(settings, *overrides))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_identity_of_data_sets_depends_on_lanes_and_order_not_location(settings, tmp_path):
    before = identity(run(settings), "")
    assert [dataset["manifest"] for dataset in before["config"]["data"]["sets"]] == ["digest:d20000", "digest:d5000"]
    (tmp_path / "big").rename(tmp_path / "moved")
    settings["data.sets"][0]["manifest"] = str(tmp_path / "moved")
    same = run(settings, "data.sets.big.weight=6", "data.sets.small.weight=2")
    assert diff_identity(before, same) == [] and identity(same, "")["hash"] == before["hash"]
    other = run(settings, "data.sets.big.weight=2")
    assert {change.key for change in diff_identity(before, other)} == {"data.sets.big.lanes", "data.sets.small.lanes"}
    settings["data.sets"].reverse()
    assert "data.sets" in {change.key for change in diff_identity(before, run(settings))}
