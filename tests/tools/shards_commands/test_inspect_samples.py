"""Tests that shards inspect shows the same samples as training uses."""

import dataclasses
import os

import numpy as np
import pytest

from flip.config import schema
from flip.data.manifest.manifest import Manifest, write
from flip.data.manifest.weights import write_weights
from flip.data.order import SampleOrder
from flip.data.sources import DatasetSource, load_sources
from flip.data.weighted_order import VIEWS
from flip.runs.errors import ConfigError, DataError
from flip.tokenizer import Tokenizer
from tests.flip.data.loading import BATCH, BLOCK, CHUNK, LANES, SAMPLES, loader
from tests.flip.data.test_loader import spoil, take
from tests.synthetic import caption, draw_image, encode
from tools.shards_commands import inspect_samples


def config(samples=SAMPLES, **data):
    values = {"samples": samples, "chunk": CHUNK, "block": BLOCK, "lanes": LANES, "decoder": "pillow"} | data
    return schema.Config(seed=11, data=schema.Data(**values))


def sources_of(manifest):
    return [DatasetSource(0, manifest, range(LANES))]


def test_sample_returns_members_and_position(original):
    manifest = Manifest.load(original)
    sample = inspect_samples.sample(manifest, 123)
    assert (sample.id, sample.ordinal, sample.chunk, sample.key) == (123, 2, 61, "000030123")
    assert os.path.basename(sample.shard) == "00003.tar" and sample.excepted is None and sample.damage is None
    assert sample.image == ("png", encode(draw_image(123, 32))) and sample.captions == caption(123).split("\n")
    assert sample.picture == {"format": "PNG", "width": 32, "height": 32, "mode": "RGB"}
    assert sample.json == {"number": 123} and list(sample.members) == ["cls", "json", "png", "txt"]
    assert inspect_samples.sample(manifest, 121).key == "000030121"  # in the second shard of its chunk
    assert inspect_samples.sample(manifest, 120).key == "000020120"
    for id in (-1, SAMPLES):
        with pytest.raises(ConfigError, match="0 .. 202"):
            inspect_samples.sample(manifest, id)


def test_batch_shows_views_and_weights(original, tmp_path):
    manifest = Manifest.load(original)
    values = np.repeat(np.resize([1.0, 2.0, 4.0], manifest.chunks), CHUNK)[:SAMPLES]
    write_weights(tmp_path / "weights", manifest, [values], 0.0, "a test")
    weighted = config(manifest=str(original), weights=str(tmp_path / "weights"), lanes=4, block=1)
    sources = load_sources(weighted.data)
    shown = [item for step in range(60) for item in inspect_samples.batch(weighted, sources, 8 * step, 8)]
    batches = take(loader(original, weights=weighted.data.weights, lanes=4, block=1), 0, 60, 8)
    assert [item.id for item in shown] == [id for batch in batches for id in batch.ids.tolist()]
    epochs = [epoch for batch in batches for epoch in batch.epochs.tolist()]
    assert [item.visit + VIEWS * item.view for item in shown] == epochs
    assert all(item.weight == values[item.id] for item in shown) and len({item.view for item in shown}) > 3
    assert inspect_samples._row(shown[0]).endswith(f"weight {shown[0].weight:.3g}  {shown[0].caption}")


def test_sample_reports_exception_and_damage(folder):
    manifest = spoil(folder, {3})
    known = write(folder.parent / "known", manifest, manifest.checksums, {3: "seen before"})
    sample = inspect_samples.sample(known, 3)
    assert sample.excepted == "seen before" and "undecodable" in sample.picture and sample.captions
    with open(manifest.keys[0], "r+b") as file:
        file.write(b"rot")
    rotten = inspect_samples.sample(known, 1)
    assert "CRC32" in rotten.damage and rotten.image is None and rotten.ordinal == 1


@pytest.mark.parametrize("start", [0, 5 * BATCH])
def test_batch_equals_loader_batch(original, start):
    manifest = Manifest.load(original)
    samples = list(inspect_samples.batch(config(), sources_of(manifest), start, BATCH))
    batch = take(loader(original), start, 1)[0]
    tokens = Tokenizer(str(original.parent / "tokenizer.json"), 8, True)([sample.caption for sample in samples])
    assert [sample.id for sample in samples] == batch.ids.tolist() and tokens.tolist() == batch.tokens.tolist()
    order = SampleOrder(11, SAMPLES, CHUNK, BLOCK, LANES)
    assert [sample.visit for sample in samples] == order.batch(start, BATCH)[1].tolist()
    assert [sample.lane for sample in samples] == [lane for lane in range(LANES) for _ in range(BATCH // LANES)]
    ids = list(inspect_samples.batch(config(), sources_of(manifest), start, BATCH, read=False))
    assert [sample._replace(caption=None) for sample in samples] == ids


def test_batch_contains_same_replacements_as_loader_batch(original, folder):
    manifest = spoil(folder, {3, 50, 51, 120})
    known = write(folder.parent / "known", manifest, manifest.checksums, {7: "known", 90: "known"})
    samples = list(inspect_samples.batch(config(200), sources_of(known), 0, 192))
    batch = take(loader(original, folder=known.folder, max_replaced=0.1), 0, 1, batch=192)[0]
    assert [sample.id for sample in samples] == batch.ids.tolist()
    replaced = {sample.stands_for for sample in samples} - {None}
    assert len(replaced - {7, 90}) == batch.replaced > 0 and replaced & {7, 90}
    unread = inspect_samples.batch(config(200), sources_of(known), 0, 192, read=False)
    assert {sample.stands_for for sample in unread} - {None} == replaced & {7, 90}
    nothing = write(folder.parent / "nothing", manifest, manifest.checksums, dict.fromkeys(range(200), "all"))
    with pytest.raises(DataError, match="none of the 6 samples"):
        list(inspect_samples.batch(config(200), sources_of(nothing), 0, 48, read=False))


def test_batch_rejects_manifest_of_other_size(original):
    other = dataclasses.replace(config(), data=schema.Data(samples=200, chunk=CHUNK, lanes=LANES))
    with pytest.raises(ConfigError, match="planned for N = 200"):
        next(inspect_samples.batch(other, sources_of(Manifest.load(original)), 0, BATCH))
