"""Tests of the sequence of steps that finishes a configuration."""

from dataclasses import replace

import pytest

from flip.common.host import Host
from flip.config.finish import finish
from flip.config.merge import merge
from flip.runs.errors import ConfigError

BASE = {
    "data": {"samples": 10_000, "sample_bytes": 1000},
    "stages": [{"name": "pretrain", "samples": 1000, "batch": 64}],
    "evaluate": {"sets": [{"name": "val", "manifest": "m", "classes": "c.json"}]},
}
NODE = Host(cores=4, memory=10**10)


def requested(*overrides):
    return merge([("test", BASE)], overrides)


def test_finish_resolves_then_adjusts_then_validates():
    config = requested()
    before = repr(config)
    seen = []

    def adjust(resolved):
        seen.append((resolved.data.lanes, resolved.compute.precision))
        return replace(resolved, seed=7)

    finished, notes = finish(config, NODE, adjust=adjust)
    assert seen == [(64, "fp32")] and finished.seed == 7 and finished.data.lanes == 64
    assert notes == ["stage pretrain takes 24 samples more, to complete its last batch"]
    assert repr(config) == before, "the configuration that was given is not changed"


def test_finish_validates_what_adjust_returns():
    def adjust(resolved):
        resolved.data.workers = 65
        return resolved

    with pytest.raises(ConfigError, match=r"data\.workers: more than the 64 lanes of a rank"):
        finish(requested(), NODE, adjust=adjust)


def test_finished_configuration_stays_as_it_is():
    finished = finish(requested(), NODE).config
    assert finish(finished, Host(cores=64, memory=10**12, bf16=True, cuda=True)).config == finished


def test_finish_refuses_missing_data_set():
    with pytest.raises(ConfigError, match=r"data\.manifest: no data set is given"):
        finish(requested("data.samples=0"), NODE)
