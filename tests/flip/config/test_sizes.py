"""The label of a model: a size's name stands for all of its fields."""

import pytest

from flip.config.derived import model_label
from flip.config.identity import flatten
from flip.config.merge import merge, to_dict
from flip.config.schema import MODEL_PRESETS


def settings(*overrides):
    return flatten(to_dict(merge([], overrides)))


@pytest.mark.parametrize("size", MODEL_PRESETS)
def test_a_size_as_it_is_has_its_name(size):
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
def test_a_size_that_is_overridden_is_not_called_by_its_name_alone(overrides, expected):
    assert model_label(settings(*overrides)) == expected


def test_a_run_without_a_readable_configuration_has_no_label():
    assert model_label({}) is None and model_label({"model.size": "of a later version"}) == "of a later version"
