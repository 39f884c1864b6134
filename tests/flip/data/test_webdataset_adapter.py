"""Tests the adapter that feeds samples in training order to pipelines of webdataset."""

import gc
import itertools

import pytest
import webdataset
from torch.utils.data import DataLoader

import flip
from flip.data.manifest.manifest import Manifest, write
from flip.data.order import SampleOrder
from flip.data.webdataset_adapter import Samples
from flip.runs.errors import ConfigError, DataError
from tests.flip.data.loading import BATCH, BLOCK, CHUNK, LANES, SAMPLES
from tests.synthetic import caption, draw_image


def take(original, count, **fields):
    return list(
        itertools.islice(iter(Samples(original, batch=BATCH, lanes=LANES, seed=11, block=BLOCK, **fields)), count)
    )


def ids(samples):
    return [int(sample["__key__"]) for sample in samples]


@pytest.mark.parametrize("start", [0, 5 * BATCH])
def test_adapter_yields_samples_in_training_order(original, start):
    order = SampleOrder(11, SAMPLES, CHUNK, BLOCK, LANES)
    expected = [id for t in range(3) for id in order.batch(start + t * BATCH, BATCH)[0].tolist()]
    samples = take(original, 3 * BATCH, start=start)
    assert ids(samples) == expected
    assert all(sample["txt"].decode() == caption(id) for sample, id in zip(samples, expected, strict=True))
    assert {"__key__", "__url__", "png", "txt", "cls"} <= set(samples[0]) and samples[0]["__url__"].endswith(".tar")


def test_adapter_splits_batch_between_ranks(original):
    expected = ids(take(original, 2 * BATCH))
    parts = [ids(take(original, BATCH, rank=rank, world=2)) for rank in range(2)]
    half = BATCH // 2
    assert expected == parts[0][:half] + parts[1][:half] + parts[0][half:] + parts[1][half:]


def test_adapter_feeds_pipeline_stages_of_webdataset(original):
    pipeline = webdataset.DataPipeline(
        Samples(original, batch=BATCH, lanes=LANES, seed=11, block=BLOCK),
        webdataset.decode("rgb8"),
        webdataset.to_tuple("png", "cls", "__key__"),
        webdataset.batched(BATCH),
    )
    images, labels, keys = next(iter(pipeline))
    assert (images[3] == draw_image(int(keys[3]), 32)).all()
    assert list(labels) == [int(key) % 7 for key in keys]


def test_adapter_replaces_samples_excepted_by_manifest(original, tmp_path):
    manifest = Manifest.load(original)
    excepted = write(tmp_path / "left", manifest, manifest.checksums, dict.fromkeys(range(0, 40), "bad"))
    before = ids(take(original, 2 * BATCH))
    after = ids(take(excepted.folder, 2 * BATCH))
    changed = [a for a, b in zip(before, after, strict=True) if a != b]
    assert sorted(set(changed)) == sorted(id for id in set(before) if id < 40) != [] and min(after) >= 40


def test_adapter_stops_at_block_without_usable_sample(original, tmp_path):
    manifest = Manifest.load(original)
    excepted = write(tmp_path / "left", manifest, manifest.checksums, dict.fromkeys(range(SAMPLES), "bad"))
    with pytest.raises(DataError, match="excludes all 6 samples of this block.*flip shards drop"):
        take(excepted.folder, 1)


def test_adapter_rejects_several_data_loader_workers(original, monkeypatch):
    """Every worker would yield the same samples."""
    samples = Samples(original, batch=BATCH, lanes=LANES, seed=11, block=BLOCK)
    batches = DataLoader(
        webdataset.DataPipeline(samples), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    # torch waits this long for each process when the iterator is collected
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    with pytest.raises(ConfigError, match=r"each worker .*found: 2.*num_workers=0 or 1"):
        next(iter(batches))
    gc.collect()


def test_adapter_yields_samples_and_epochs_of_batches(original):
    """With default lanes and blocks, too; three epochs."""
    stream = flip.batches(original, batch=BATCH, size=24, patch=8, seed=11)
    expected = []
    for batch in itertools.islice(stream, 13):
        expected += zip(batch.ids.tolist(), batch.epochs.tolist(), strict=True)
    samples = itertools.islice(iter(Samples(original, batch=BATCH, seed=11)), len(expected))
    assert [(int(sample["__key__"]), sample["__epoch__"]) for sample in samples] == expected
    assert {epoch for _, epoch in expected} == {0, 1, 2, 3}
