"""Tests of the ways of masking patches: exact, a function of seed, epoch and id, the same for loader and evaluation."""

import hashlib
import pickle
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import flip
from flip.common import user_classes
from flip.common.user_classes import UserClass
from flip.config.identity import identity
from flip.config.merge import merge
from flip.config.validate import warnings
from flip.data import masking
from flip.data.patch_masking import MASK, PATCH_MASKINGS, PatchMasking, patch_masking
from flip.evaluation.encoding.encoders import masks
from flip.rng import key
from flip.runs.errors import ConfigError
from tests.flip.data.loading import BATCH, loader
from tests.flip.evaluation.conftest import built, encoder_of
from tests.synthetic import make_dataset, make_tokenizer

PAGE = Path(__file__).resolve().parents[3] / "docs/variants.md"
WAYS = list(PATCH_MASKINGS)
IDS = np.array([0, 1, 2**48 + 5, 41, 10**9])
GOLDEN = {
    "uniform": [
        [1, 3, 10, 13, 16, 23, 25, 29, 34],
        [2, 3, 4, 7, 8, 11, 16, 27, 33],
        [0, 2, 6, 9, 12, 13, 16, 25, 27],
        [5, 6, 11, 12, 14, 17, 19, 20, 29],
        [5, 8, 11, 19, 20, 29, 30, 33, 35],
    ],
    "block": [
        [2, 3, 4, 5, 16, 17, 24, 28, 29],
        [6, 12, 18, 24, 25, 26, 30, 31, 32],
        [0, 5, 6, 16, 17, 28, 29, 34, 35],
        [0, 6, 12, 18, 24, 25, 26, 29, 35],
        [0, 1, 6, 7, 12, 18, 19, 30, 31],
    ],
    "grid": [
        [0, 2, 4, 12, 14, 16, 24, 26, 28],
        [0, 2, 4, 12, 14, 16, 24, 26, 28],
        [6, 8, 10, 18, 20, 22, 30, 32, 34],
        [7, 9, 11, 19, 21, 23, 31, 33, 35],
        [6, 8, 10, 18, 20, 22, 30, 32, 34],
    ],
}
"""Visible patches of the samples IDS in epochs 0, 1, 2, 0, 5, with seed 11."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("patches", [1, 4, 9, 36, 196])
def test_number_of_visible_patches_is_exact(way, patches):
    ids = np.arange(40)
    for count in {1, max(1, patches // 10), max(1, patches // 4), max(1, patches // 2), patches - 1, patches} - {0}:
        keep = masking.visible_patches(9, ids % 3, ids, patches, count, PATCH_MASKINGS[way])
        assert keep.dtype == np.int16 and keep.shape == (40, count) and (np.diff(keep, axis=1) > 0).all()
        assert keep.min() >= 0 and keep.max() < patches


@pytest.mark.parametrize("way", WAYS)
def test_mask_is_a_function_of_seed_epoch_and_id_alone(way):
    ids = np.arange(300)
    epochs = ids % 3
    keep = masking.visible_patches(9, epochs, ids, 196, 60, PATCH_MASKINGS[way])
    for row in (0, 77, 299):
        alone = masking.visible_patches(9, epochs[[row]], ids[[row]], 196, 60, PATCH_MASKINGS[way])
        assert np.array_equal(alone[0], keep[row])
    for seed, epoch in ((10, epochs), (9, epochs + 1)):
        other = masking.visible_patches(seed, epoch, ids, 196, 60, PATCH_MASKINGS[way])
        assert (other != keep).any(axis=1).mean() > 0.9


@pytest.mark.parametrize("way", WAYS)
def test_masks_are_the_recorded_ones(way):
    keep = masking.visible_patches(11, [0, 1, 2, 0, 5], IDS, 36, 9, PATCH_MASKINGS[way])
    assert keep.tolist() == GOLDEN[way]


def test_uniform_masks_are_the_patches_of_smallest_key():
    keys = key(11, 0, IDS[:, None], MASK, np.arange(196))
    expected = np.sort(np.argsort(keys, axis=1, kind="stable")[:, :98], axis=1)
    assert np.array_equal(masking.visible_patches(11, 0, IDS, 196, 98), expected)


def hidden(way, count, n=200):
    keep = masking.visible_patches(3, 0, np.arange(n), 196, count, PATCH_MASKINGS[way])
    grid = np.ones((n, 196), bool)
    np.put_along_axis(grid, keep.astype(int), False, axis=1)
    return grid.reshape(n, 14, 14)


def like_neighbour(grid):
    """Share of neighbouring patches of which both are hidden, or both visible."""
    return ((grid[:, 1:] == grid[:, :-1]).mean() + (grid[:, :, 1:] == grid[:, :, :-1]).mean()) / 2


def test_blocks_are_rectangles_and_grids_regular():
    assert like_neighbour(hidden("uniform", 98)) == pytest.approx(0.5, abs=0.02)
    assert like_neighbour(hidden("block", 98)) > 0.85
    assert like_neighbour(hidden("grid", 98)) == 0
    quarter = hidden("grid", 49)
    assert (~quarter).reshape(200, 7, 2, 7, 2).sum(axis=(2, 4)).min() == 1
    starts = (~quarter[:, :2, :2]).reshape(200, 4).sum(axis=0)
    assert starts.min() > 25, "each of the four patches is the visible one of some samples"


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_draws_masks_by_the_same_function(way):
    views = masks(IDS, 64, 25, every=True, way=PATCH_MASKINGS[way])
    assert np.array_equal(views[0], masking.visible_patches(0, 0, IDS, 64, 25, PATCH_MASKINGS[way]))
    for row in range(len(IDS)):
        assert set(np.concatenate([view[row] for view in views]).tolist()) == set(range(64))


def test_view_ids_differ_and_a_user_s_class_is_not_executed(tmp_path):
    model = built()
    data = tmp_path
    make_tokenizer(data / "tokenizer.json", vocabulary=1000)
    ids = {encoder_of(model, data, mask="0.5", patch_masking=way).view_id for way in WAYS}
    assert len(ids) == 3 and encoder_of(model, data, mask="0.5").view_id in ids
    assert encoder_of(model, data, patch_masking="block").view_id == encoder_of(model, data).view_id
    entry = f"mine.py:Mine@sha256:{'0' * 64}"
    assert encoder_of(model, data, patch_masking=entry).visible_patch_count == 64, "no mask, no file"
    with pytest.raises(ConfigError, match=r"executes no class of a user.*Score without a mask"):
        encoder_of(model, data, mask="0.5", patch_masking=entry)


# -- in the loader -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    make_tokenizer(root / "tokenizer.json")
    return make_dataset(root / "shards", 203, 3, size=48, chunk=2, fmt="jpg")


def taken(folder, way, count=3, **fields):
    source = loader(folder, **fields)
    try:
        stream = source.batches(0, BATCH, "0.5", patch_masking=way)
        return [[x.clone() for x in next(stream)[:4]] for _ in range(count)]
    finally:
        source.close()


@pytest.mark.parametrize("way", ["block", "grid"])
def test_batches_have_these_masks_on_any_ranks_and_workers_with_and_without_kernel(photos, way):
    kernel = {"decoder": "simplejpeg", "resize": "torchvision"}
    whole = taken(photos, way, **kernel)
    plain = taken(photos, way)
    ranks = [taken(photos, way, rank=rank, world=2, workers=2, **kernel) for rank in (0, 1)]
    for n, (patches, keep, tokens, ids) in enumerate(whole):
        expected = masking.visible_patches(11, [0] * BATCH, ids.numpy(), 9, 4, PATCH_MASKINGS[way])
        assert np.array_equal(keep, expected)
        parts = [torch.cat(both) for both in zip(*(rank[n] for rank in ranks), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(parts, (patches, keep, tokens, ids), strict=True))
        assert torch.equal(keep, plain[n][1]) and torch.equal(ids, plain[n][3])


def test_loop_of_ones_own_has_them(photos):
    with flip.batches(photos, batch=24, size=48, patch=8, mask="0.75", patch_masking="block") as stream:
        batch = next(stream)
    expected = masking.visible_patches(0, batch.epochs, batch.ids, 36, 9, PATCH_MASKINGS["block"])
    assert np.array_equal(batch.keep_indices, expected)
    with pytest.raises(ConfigError, match=r"no such choice.*block, grid"):
        flip.batches(photos, batch=24, patch_masking="blocks")
    with pytest.raises(ConfigError, match="takes no FILE.py:Class"):
        flip.batches(photos, batch=24, patch_masking="mine.py:Mine")


# -- a class of a user -------------------------------------------------------------------------------------------------


@pytest.fixture
def window(tmp_path, monkeypatch):
    """The entry of the example of docs/variants.md, whose file is in the snapshot of a run."""
    (text,) = re.findall(r"\n\n(    import numpy.*?)\n\nA purpose", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return copied(tmp_path, monkeypatch, textwrap.dedent(text), "Window")


def copied(folder, monkeypatch, text, cls):
    monkeypatch.setenv("FLIP_SNAPSHOT", str(folder))
    name = UserClass("masks.py", cls, hashlib.sha256(text.encode()).hexdigest())
    path = folder / user_classes.FOLDER / name.copy
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return str(name)


def test_class_of_a_user_masks_batches_and_can_be_sent_to_workers(window, photos):
    own = taken(photos, window)
    sent = pickle.loads(pickle.dumps(patch_masking(window)))  # as to a loader process
    ids = own[0][3].numpy()
    assert np.array_equal(own[0][1], masking.visible_patches(11, 0, ids, 9, 4, sent))
    keep = torch.cat([batch[1] for batch in own]).numpy()
    assert keep.shape == (3 * BATCH, 4)
    assert {(0, 1, 3, 4)} <= {tuple(each) for each in keep.tolist()}


@pytest.mark.parametrize(
    "ranks, found",
    [
        ("np.zeros((1, samples.patches))", r"float64 \(1, 9\)"),
        ("np.zeros((len(samples.ids), 5))", r"float64 \(\d+, 5\)"),
        ("None", "NoneType"),
        ("np.full((len(samples.ids), samples.patches), 'a')", r"<U1"),
    ],
)
def test_wrong_ranks_name_the_class(tmp_path, monkeypatch, photos, ranks, found):
    text = f"""
import numpy as np
from flip.data.patch_masking import PatchMasking

class Wrong(PatchMasking):
    def ranks(self, samples):
        return {ranks}
"""
    entry = copied(tmp_path, monkeypatch, text, "Wrong")
    with pytest.raises(ConfigError, match=rf"class Wrong: ranks\(\) needs an array.*{found}"):
        taken(photos, entry)


def test_ranks_that_are_equal_or_no_number_leave_k_patches():
    class Equal(PatchMasking):
        def ranks(self, samples):
            return np.full((len(samples.ids), samples.patches), np.nan)

    assert masking.visible_patches(0, 0, IDS, 9, 4, Equal()).tolist() == [[0, 1, 2, 3]] * 5


# -- configuration -----------------------------------------------------------------------------------------------------


def configured(**settings):
    return merge([("test", {"stages": [{"name": "a", "mask": "0.5", "base_lr": 1e-3, **settings}]})])


def test_hash_and_warnings():
    before = identity(configured(), "")["hash"]
    assert identity(configured(patch_masking="uniform"), "")["hash"] == before
    assert identity(configured(patch_masking="block"), "")["hash"] != before
    assert not [text for text in warnings(configured(patch_masking="block")) if "patch_masking" in text]
    texts = warnings(configured(patch_masking="block", mask="0"))
    assert "stage a: patch_masking block has no effect, as mask is 0" in texts
