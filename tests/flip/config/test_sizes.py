"""Tests the label of a model: the name of its size, and the fields that differ from that size."""

import pytest

from flip.common.plain_data import flatten
from flip.config.derived import model_label
from flip.config.merge import merge, to_dict
from flip.config.schema import MODEL_PRESETS


def settings(*overrides):
    return flatten(to_dict(merge([], overrides)))


@pytest.mark.parametrize("size", MODEL_PRESETS)
def test_model_label_is_size_name_if_preset_is_unchanged(size):
    assert model_label(settings(f"model.size={size}", "model.text.length=16", "model.image.pool=all")) == size


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["model.size=L/14", "model.image.size=336"], "L/14 with image.size 336"),
        (["model.image.width=384", "model.image.heads=6"], "B/16 with image.width 384, image.heads 6"),
        (["model.size=tiny", "model.text.vocabulary=2000"], "tiny with text.vocabulary 2000"),
        ([f"model.{key}=4" for key in ("embed", "image.width", "image.heads", "text.width")], "custom size"),
    ],
)
def test_model_label_lists_overridden_fields_or_says_custom_size(overrides, expected):
    assert model_label(settings(*overrides)) == expected


def test_model_label_is_none_without_size_and_repeats_unknown_size():
    assert model_label({}) is None and model_label({"model.size": "of a later version"}) == "of a later version"
