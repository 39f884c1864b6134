"""Tests that batches depend on configuration, manifest and S only: not on ranks, workers, restarts or chance."""

import re
from functools import partial

import numpy as np
import pytest
import torch
import webdataset

from flip.config import schema
from flip.data import augment as augmenting
from flip.data import masking
from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest, write
from flip.data.order import SampleOrder
from flip.data.sample_members import captions_of, label_of
from flip.data.text_masking import TEXT_MASKINGS
from flip.data.view import EvaluationView
from flip.evaluation.datasets.image_sources import Shards, prepare
from flip.runs.errors import ConfigError, DataError
from flip.tokenizer import Tokenizer
from tests.flip.data.loading import AFFINE, BATCH, BLOCK, CHUNK, LANES, PLAIN, SAMPLES, loader
from tests.synthetic import caption, draw_image, encode


def take(source, start, count, batch=BATCH, mask="0.5"):
    batches = source.batches(start, batch, mask)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def joined(original, world, workers, start, count, **fields):
    """Global batches, concatenated from the loaders of all ranks."""
    parts = [take(loader(original, rank, world, workers, **fields), start, count) for rank in range(world)]
    names = ("patches", "keep_indices", "tokens", "ids")
    return [{n: torch.cat([getattr(part[t], n) for part in parts]) for n in names} for t in range(count)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x[n], y[n]) for x, y in zip(a, b, strict=True) for n in x)


@pytest.fixture(scope="module", params=[PLAIN, AFFINE], ids=["plain", "affine"])
def reference(original, request):
    return request.param, joined(original, 1, 0, 0, 8, augment=request.param)


def test_batch_matches_order_masks_and_images(original, reference):
    batch = reference[1][0]
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in batch.items()}
    assert shapes["patches"] == ((BATCH, 4, 192), torch.uint8) and shapes["keep_indices"] == ((BATCH, 4), torch.int16)
    assert shapes["tokens"] == ((BATCH, 8), torch.int32) and shapes["ids"] == ((BATCH,), torch.int64)
    ids, epochs = SampleOrder(11, SAMPLES, CHUNK, BLOCK, LANES).batch(0, BATCH)
    assert batch["ids"].tolist() == ids.tolist()
    assert batch["keep_indices"].tolist() == masking.visible_patches(11, epochs, ids, 9, 4).tolist()
    for row, (id, epoch) in enumerate(zip(ids.tolist(), epochs.tolist(), strict=True)):
        draws = augmenting.draw(reference[0], 11, np.array([epoch]), np.array([id]))
        pixels = augmenting.view(draw_image(id, 32), 24, reference[0], draws, 0)
        cells = pixels.reshape(3, 8, 3, 8, 3).swapaxes(1, 2).reshape(9, 192)
        assert np.array_equal(batch["patches"][row].numpy(), cells[batch["keep_indices"][row].numpy()]), id


@pytest.mark.parametrize("world, workers", [(1, 3), (2, 1), (2, 3), (4, 2), (LANES, 0)])
def test_batches_are_independent_of_ranks_and_workers(original, reference, world, workers):
    augment, expected = reference
    assert same(joined(original, world, workers, 0, 8, augment=augment), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_equal_after_resume_beyond_first_pass(original, reference, workers):
    augment, expected = reference
    assert same(joined(original, 1, workers, 5 * BATCH, 3, augment=augment), expected[5:])


def test_batches_use_pinned_memory_only_if_requested(original, monkeypatch):
    """All tensors that a step copies to the device are pinned: copies from other memory block the host."""
    pinned_fields = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda field: pinned_fields.append(field) or field)
    batch = next(loader(original, pinned=True).batches(0, BATCH, "0.5"))
    tensors = [field for field in batch if isinstance(field, torch.Tensor)]
    assert {id(tensor) for tensor in tensors} <= {id(field) for field in pinned_fields}
    pinned_fields.clear()
    next(loader(original).batches(0, BATCH, "0.5"))
    assert not pinned_fields


def test_larger_batch_continues_same_sample_stream(original, reference):
    larger = take(loader(original), 2 * BATCH, 1, batch=2 * BATCH)[0].ids.reshape(LANES, -1)
    before = [batch["ids"].reshape(LANES, -1) for batch in reference[1][2:4]]
    assert torch.equal(larger, torch.cat(before, dim=1))


def test_captions_of_a_sample_are_drawn_about_equally_often(original):
    batch = take(loader(original, lanes=1, block=1), 0, 1, batch=200, mask="0")[0]
    tokenizer = Tokenizer(str(original.parent / "tokenizer.json"), 8, True)
    picked = [
        [row.tolist() for row in tokenizer(caption(i).split("\n"))].index(t.tolist())
        for i, t in zip(batch.ids.tolist(), batch.tokens, strict=True)
    ]
    assert 0.35 < np.mean(picked) < 0.65


@pytest.mark.parametrize("kind", ["random", "prioritised"])
def test_text_masking_is_independent_of_ranks_and_workers(original, kind):
    """Every layout keeps the same positions of a caption: those that the counter hash selects."""
    unmasked = take(loader(original), 0, 2)
    short = [_shortened(original, kind, workers=workers) for workers in (0, 3)]
    halves = [_shortened(original, kind, rank=rank, world=2, workers=1) for rank in range(2)]
    for t, batch in enumerate(unmasked):
        shortened, other = (s[t] for s in short)
        parts = [half[t] for half in halves]
        assert batch.position_ids is None
        assert (shortened.tokens.shape, shortened.tokens.dtype) == (
            (BATCH, 4),
            torch.int32,
        )
        assert torch.equal(shortened.tokens, batch.tokens.gather(1, shortened.position_ids.long()))
        for name in ("position_ids", "tokens", "ids", "keep_indices"):
            assert torch.equal(getattr(shortened, name), getattr(other, name))
            assert torch.equal(getattr(shortened, name), torch.cat([getattr(part, name) for part in parts]))
        ids, epochs = SampleOrder(11, SAMPLES, CHUNK, BLOCK, LANES).batch(t * BATCH, BATCH)
        masks = masking.MaskSpec(4, 4, TEXT_MASKINGS[kind]())
        visible = masking.visible_tokens(11, epochs, ids, batch.tokens.numpy(), masks)
        assert shortened.position_ids.tolist() == visible.tolist()


def _shortened(original, kind, **fields):
    batches = loader(original, **fields).batches(0, BATCH, "0.5", "0.5", kind)
    try:
        return [next(batches) for _ in range(2)]
    finally:
        batches.close()


# -- bad data ---------------------------------------------------------------------------------------------------------


def spoil(folder, bad):
    """Replace the data set by one of 200 samples; the images of ``bad`` are broken. Returns the new manifest."""
    for path in folder.iterdir():
        path.unlink()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard}.tar"), mtime=0) as writer:
            for i in range(100 * shard, 100 * shard + 100):
                if i in bad:
                    data = b"\x89PNG broken"
                else:
                    data = encode(draw_image(i, 32))
                writer.write({"__key__": f"{i:04d}", "png": data, "txt": caption(i)})
    return index([str(path) for path in folder.glob("*.tar")], folder, chunk=CHUNK)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_sample_is_replaced_by_next_good_sample_of_block(original, folder, workers, caplog):
    bad = {3, 50, 51, 120}
    spoil(folder, bad)
    unmasked = take(loader(original, folder=folder, workers=workers, max_replaced=0.1), 0, 4, batch=48)
    order = SampleOrder(11, 200, CHUNK, BLOCK, LANES)
    replaced = 0
    for t, batch in enumerate(unmasked):
        expected = []
        epochs = []
        for lane in range(LANES):
            for position in range(4 * t, 4 * t + 4):
                k, n = divmod(position, order.block_samples)
                ids, visits = (field[0] for field in order.cached_block(range(lane, lane + 1), k))
                m = next(
                    m % order.block_samples
                    for m in range(n, n + order.block_samples)
                    if ids[m % order.block_samples] not in bad
                )
                expected.append(ids[m])
                epochs.append(visits[m])
                replaced += m != n
        assert batch.ids.tolist() == expected
        assert batch.keep_indices.tolist() == masking.visible_patches(11, epochs, expected, 9, 4).tolist()
    assert replaced == sum(batch.replaced for batch in unmasked) > 0
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == len(set(lines)) and any("0.tar, sample 3 replaced: " in line for line in lines)


def test_unexpected_error_names_shard_and_sample(original):
    """A wrong setting of the crop, which no check of a configuration would let pass, is an error of our own code."""
    wrong = schema.Augment(crop_aspect=[0.0, 0.0])
    with pytest.raises(ZeroDivisionError) as error:
        take(loader(original, augment=wrong), 0, 1)
    (note,) = error.value.__notes__
    assert re.fullmatch(r".*/\d+\.tar, sample \d+", note)
    with pytest.raises(RuntimeError, match=r"loader-\d ended: ZeroDivisionError: .*; .*/\d+\.tar, sample \d+"):
        take(loader(original, augment=wrong, workers=2), 0, 1)


def test_excepted_samples_are_replaced_like_undecodable_samples(original, folder):
    bad = {3, 50, 51, 120}
    manifest = spoil(folder, bad)
    unknown = take(loader(original, folder=folder, max_replaced=0.1), 0, 4, batch=48)
    spoil(folder, ())
    good = Manifest.load(folder)
    known = write(folder.parent / "excepted", good, good.checksums, dict.fromkeys(bad, "known"))
    assert known.digest != good.digest != manifest.digest
    excepted = take(loader(original, folder=known.folder, max_replaced=0.1), 0, 4, batch=48)
    for a, b in zip(unknown, excepted, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.patches, b.patches)
    assert sum(batch.replaced for batch in unknown) > 0 == sum(batch.replaced for batch in excepted)
    take(loader(original, folder=known.folder, max_replaced=0), 0, 4, batch=48)


def test_captions_are_split_at_line_feeds_only():
    text = "one\u2028two\x85three\x0bfour\r\n\n five \n".encode()
    assert captions_of({"txt": memoryview(text)}, ["txt"]) == ["one\u2028two\x85three\x0bfour", "five"]


def test_damaged_chunk_is_left_out_if_manifest_excepts_its_samples(original, folder):
    manifest = Manifest.load(folder)
    key, start, *_ = manifest.chunk_reads(7)[0]
    with open(key, "r+b") as file:
        file.seek(start)
        file.write(b"rot")
    with pytest.raises(DataError, match="CRC32"):
        take(loader(original, folder=folder), 0, 8)
    excepted = write(folder.parent / "left", manifest, manifest.checksums, dict.fromkeys(manifest.chunk_ids(7), "rot"))
    batches = take(loader(original, folder=excepted.folder, max_replaced=0.1), 0, 8)
    assert not {14, 15} & {id for batch in batches for id in batch.ids.tolist()}


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_raises_data_error_if_too_many_samples_are_bad(original, folder, workers):
    spoil(folder, range(0, 200, 5))
    with pytest.raises(DataError, match="max_replaced") as error:
        take(loader(original, folder=folder, workers=workers), 0, 4)
    assert error.value.code == 65 and error.value.remedy


def test_loader_raises_data_error_if_block_has_no_good_sample(original, folder):
    spoil(folder, range(200))
    with pytest.raises(DataError, match="none of the 6 samples of block 0"):
        take(loader(original, folder=folder), 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_shard_raises_data_error_in_main_process(original, folder, workers):
    (folder / "00002.tar").unlink()
    with pytest.raises(DataError, match=r"00002\.tar: the shard is missing.*Restore it"):
        take(loader(original, folder=folder, workers=workers), 0, 8)


def test_loader_rejects_incompatible_chunk_ranks_workers_and_start(original):
    with pytest.raises(ConfigError, match="chunks of 2"):
        loader(original, chunk=4)
    with pytest.raises(ConfigError, match="5 ranks"):
        loader(original, world=5)
    with pytest.raises(ConfigError, match="a rank has 3 lanes"):
        loader(original, world=4, workers=4)
    with pytest.raises(ConfigError, match="a multiple of the 12 lanes"):
        loader(original).batches(6, BATCH, "0.5")


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3])
def test_evaluation_reads_every_image_once_across_ranks(original, world):
    images = Shards(original)
    shares = [range(rank * images.count // world, (rank + 1) * images.count // world) for rank in range(world)]
    prepared = [image for share in shares for image in prepare(images, share, lambda pixels: pixels, label_of)]
    assert [id for id, *_ in prepared] == list(range(SAMPLES)) and images.count == SAMPLES
    assert [label for *_, label in prepared] == [id % 7 for id in range(SAMPLES)]
    assert np.array_equal(EvaluationView(32)(prepared[5][1]), draw_image(5, 32))
    with pytest.raises(DataError, match="no label 'nothing'"):
        prepare(images, range(1), lambda pixels: pixels, partial(label_of, member="nothing"))
