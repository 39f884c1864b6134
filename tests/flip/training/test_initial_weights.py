"""Models that begin with another's weights: of a run or an export, of another image size or patch."""

import numpy as np
import pytest
import torch

from flip.export import exporter
from flip.models import clip
from flip.runs.errors import ConfigError, DataError
from flip.training.initial_weights import begin_from, resampled
from flip.training.warm_start import agree
from tests.flip.export.test_exporter import configured, loaded_of
from tests.synthetic import make_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(exported folder, its tokenizer, the model)."""
    root = tmp_path_factory.mktemp("source")
    tokenizer = make_tokenizer(root / "tokenizer.json")
    loaded = loaded_of(configured("portable", tokenizer), root)
    loaded.pair.logit_scale.data.fill_(3.0)
    exporter.export(loaded, root / "made")
    return root / "made", tokenizer, loaded


def fresh(tokenizer, *settings, recipe="portable"):
    config = configured(recipe, tokenizer, "tiny", *settings)
    pair = clip.build(config.model, config.augment, "sdpa")
    clip.initialise(pair, 9)
    return pair, config


@torch.no_grad()
def test_a_higher_resolution_takes_all_weights_and_computes_its_positions(source):
    folder, tokenizer, loaded = source
    pair, config = fresh(tokenizer, "model.image.size=96")
    record = begin_from(pair, config, folder)
    assert all(torch.equal(value, loaded.pair.state_dict()[name]) for name, value in pair.state_dict().items())
    assert torch.equal(pair.image.positions, clip.sincos(12, 64))
    assert record["differs"] == {"model.image.size": [64, 96]}
    assert (record["stage"], record["samples"], record["manifest"]) == ("pretrain", 640, "d1ge57")
    # A picture of 12 x 12 patches of which the 8 x 8 at the top left are visible is the smaller model's picture.
    patches = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 64, 192), dtype=np.uint8))
    keep = (torch.arange(8)[:, None] * 12 + torch.arange(8)).reshape(1, 64)
    assert torch.allclose(pair.encode_image(patches, keep), loaded.pair.encode_image(patches), atol=1e-6)


@torch.no_grad()
def test_patch_weights_of_a_larger_patch_see_the_enlarged_patch_as_the_smaller_saw_it():
    generator = torch.Generator().manual_seed(0)
    weight, patch = torch.randn(5, 192, generator=generator), torch.randn(7, 3, 8, 8, generator=generator)
    enlarged = torch.nn.functional.interpolate(patch, (16, 16), mode="bicubic", antialias=True)
    rows = [one.permute(0, 2, 3, 1).flatten(1) for one in (patch, enlarged)]  # by row, column, channel
    assert torch.allclose(rows[1] @ resampled(weight, 16).T, rows[0] @ weight.T, atol=1e-3)
    assert torch.equal(resampled(weight, 8), weight)


@torch.no_grad()
@pytest.mark.parametrize("size, patch, grid", [(56, 7, 8), (64, 16, 4)])  # 8 -> 7 is what 16 -> 14 is
def test_another_patch_changes_the_patch_weights_alone(source, size, patch, grid):
    folder, tokenizer, loaded = source
    pair, config = fresh(tokenizer, f"model.image.size={size}", f"model.image.patch={patch}")
    begin_from(pair, config, folder)
    ours, theirs = pair.state_dict(), loaded.pair.state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == ["image.patch.weight"]
    assert torch.equal(pair.image.positions, clip.sincos(grid, 64))
    # An even picture has no detail that a resize could touch: the patch embedding of both is the same.
    even = torch.ones(3).repeat(patch**2) @ ours["image.patch.weight"].T
    assert torch.allclose(even, torch.ones(192) @ theirs["image.patch.weight"].T, atol=1e-4)


def test_what_fits_but_is_another_function_is_told(source):
    folder, tokenizer, _ = source
    pair, config = fresh(tokenizer, recipe="paper")
    differs = begin_from(pair, config, folder)["differs"]
    keys = {"model.image.pool", "model.text.prepend_cls", "model.text.repair"}
    assert differs.keys() == keys and differs["model.image.pool"] == ["patches", "all"]


def test_what_does_not_fit_is_refused(source, tmp_path):
    folder, tokenizer, loaded = source
    for setting, key in (("model.image.heads=4", "model.image.heads"), ("model.embed=32", "model.embed")):
        pair, config = fresh(tokenizer, setting)
        with pytest.raises(ConfigError, match=key):
            begin_from(pair, config, folder)
        with pytest.raises(ConfigError, match=f"cannot begin from there.*{key}|{key}.*cannot begin from there"):
            agree(config, loaded.config, "there")
    other = make_tokenizer(tmp_path / "other.json", ["quite other words"])
    pair, config = fresh(other)
    with pytest.raises(ConfigError, match="is not the tokenizer of"):
        begin_from(pair, config, folder)
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    with pytest.raises((ConfigError, DataError)):
        begin_from(pair, config, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())


@torch.no_grad()
def test_a_bias_that_only_one_of_them_has_is_its_own(source, tmp_path):
    folder, tokenizer, loaded = source
    pair, config = fresh(tokenizer, recipe="siglip")
    assert begin_from(pair, config, folder)["differs"].keys() == {"model.objective", "model.max_logit_scale"}
    assert float(pair.logit_bias) == -10.0 and torch.equal(pair.text.positions, loaded.pair.text.positions)
    exporter.export(loaded_of(configured("siglip", tokenizer), tmp_path), tmp_path / "made")
    other, config = fresh(tokenizer)
    begin_from(other, config, tmp_path / "made")
    assert other.logit_bias is None
