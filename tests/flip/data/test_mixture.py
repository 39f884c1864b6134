"""Tests runs with several data sets: each has its own stream on its own lanes (docs/contracts.md)."""

import numpy as np
import pytest
import webdataset

from flip.config import schema
from flip.data import masking
from flip.data.loader import Loader
from flip.data.manifest.build import index
from flip.data.order import IDS, SampleOrder
from flip.data.sources import DatasetSource, datasets_digest, load_sources
from flip.data.worker import WorkerConfig
from flip.rng import key
from flip.runs.errors import ConfigError, DataError
from flip.tokenizer import Tokenizer
from tests.flip.data.loading import BATCH, BLOCK, CHUNK, LANES, PLAIN, SAMPLES
from tests.synthetic import caption, draw_image, encode, make_dataset
from tools.shards_commands import inspect_samples

OTHER = 90


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("other"), OTHER, 2, size=32, seed=5, chunk=1)


def mixed(original, other, lanes=(8, 4), **fields):
    sets = [
        schema.DataSet("a", str(original), 2, lanes[0], SAMPLES, chunk=CHUNK),
        schema.DataSet("b", str(other), 1, lanes[1], OTHER, chunk=1),
    ]
    values = {"block": BLOCK, "lanes": LANES, "decoder": "pillow", "resize": "pillow", "max_replaced": 0.1} | fields
    return schema.Data(sets=sets, tokenizer=str(original.parent / "tokenizer.json"), **values)


def take(data, start, count, workers=0):
    data.workers = workers
    image = schema.ImageTower(size=24, patch=8)
    text = schema.TextTower(length=8, vocabulary=300)
    batches = Loader(WorkerConfig(data, PLAIN, image, text, 11)).batches(start, BATCH, "0.5")
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


@pytest.mark.parametrize("start", [0, 7 * BATCH])
def test_mixed_batch_joins_independent_streams_of_data_sets(original, other, start):
    batch = take(mixed(original, other), start, 1)[0]
    per_lane = BATCH // LANES
    first = SampleOrder(11, SAMPLES, CHUNK, BLOCK, 8).batch(start // LANES * 8, 8 * per_lane)
    second = SampleOrder(int(key(11, 2**63 + 2, 1)), OTHER, 1, BLOCK, 4).batch(start // LANES * 4, 4 * per_lane)
    ids = np.concatenate([first[0], second[0] + IDS])
    assert batch.ids.tolist() == ids.tolist() and IDS == 2**48
    epochs = np.concatenate([first[1], second[1]])
    assert batch.keep_indices.tolist() == masking.visible_patches(11, epochs, ids, 9, 4).tolist()


@pytest.mark.parametrize("start", [0, 7 * BATCH])
def test_inspect_samples_shows_batch_of_loader(original, other, start):
    data = mixed(original, other)
    taken = list(inspect_samples.batch(schema.Config(seed=11, data=data), load_sources(data), start, BATCH))
    batch = take(data, start, 1)[0]
    tokens = Tokenizer(data.tokenizer, 8, True)([entry.caption for entry in taken])
    assert [entry.id for entry in taken] == batch.ids.tolist() and tokens.tolist() == batch.tokens.tolist()
    assert [entry.lane for entry in taken] == [lane for lane in range(LANES) for _ in range(BATCH // LANES)]
    assert {entry.shard.rsplit("/", 2)[-2] for entry in taken if entry.id >= IDS} == {other.name}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_sample_is_replaced_within_its_data_set(original, tmp_path, workers, caplog):
    bad = {3, 50, 51}
    with webdataset.TarWriter(str(tmp_path / "0.tar"), mtime=0) as writer:
        for i in range(OTHER):
            if i in bad:
                image = b"\x89PNG broken"
            else:
                image = encode(draw_image(i, 32))
            writer.write({"__key__": f"{i:04d}", "png": image, "txt": caption(i)})
    index([str(tmp_path / "0.tar")], tmp_path, chunk=1)
    batches = take(mixed(original, tmp_path), 0, 6, workers)
    order = SampleOrder(int(key(11, 2**63 + 2, 1)), OTHER, 1, BLOCK, 4)
    scheduled = [id for t in range(6) for id in order.batch(t * 16, 16)[0].tolist()]
    used = [id - IDS for batch in batches for id in batch.ids.tolist() if id >= IDS]
    assert [a for a, b in zip(scheduled, used, strict=True) if a != b] == [a for a in scheduled if a in bad]
    assert sum(batch.replaced for batch in batches) == sum(a in bad for a in scheduled) > 0
    assert not bad & set(used) and "0.tar, sample 50 replaced" in caplog.text


def test_datasets_digest_depends_on_all_data_sets_and_lanes(original, other):
    first, second = load_sources(mixed(original, other))
    assert datasets_digest([first]) == first.manifest.digest
    digest = datasets_digest([first, second])
    changed = [DatasetSource(0, first.manifest, range(9)), DatasetSource(1, second.manifest, range(9, 12))]
    assert len({digest, datasets_digest([second, first]), datasets_digest(changed), first.manifest.digest}) == 4


def test_load_sources_opens_only_data_sets_of_given_lanes(original, other, tmp_path):
    data = mixed(original, other)
    assert [entry.number for entry in load_sources(data, range(6))] == [0]
    assert [entry.number for entry in load_sources(data, range(8, 9))] == [1]
    assert [entry.own_lanes(range(6, 10)) for entry in load_sources(data, range(6, 10))] == [range(6, 8), range(2)]
    data.sets[1].manifest = str(tmp_path / "none")
    load_sources(data, range(8))
    with pytest.raises(DataError, match="no manifest"):
        load_sources(data, range(9))


def test_loader_names_data_set_with_wrong_chunk_size(original, other):
    data = mixed(original, other)
    data.sets[1].chunk = 2
    with pytest.raises(ConfigError, match=r"chunks of 1 .*data\.sets\.b\.chunk|data\.sets\.b\.chunk.*chunks of 1"):
        take(data, 0, 1)
