"""Tests ``flip.batches``: the loader of the trainer, for any loop, with a state of one integer."""

import itertools
import json
import multiprocessing

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import flip
from flip.data.manifest.manifest import Manifest, write
from flip.data.order import SampleOrder
from flip.runs.errors import ConfigError, DataError
from tests.flip.data.loading import BATCH, BLOCK, CHUNK, LANES, SAMPLES, loader
from tests.synthetic import caption, draw_image, make_dataset

FIELDS = ("patches", "keep_indices", "tokens", "ids", "epochs")


def stream(folder, **arguments):
    defaults = {"batch": BATCH, "size": 24, "patch": 8, "seed": 11}
    return flip.batches(folder, **defaults | arguments)


def take(folder, count, **arguments):
    with stream(folder, **arguments) as batches:
        return list(itertools.islice(batches, count))


def same(first, second):
    """Whether two lists of batches are equal in samples, views and captions."""
    tensors = all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(first, second, strict=True) for name in FIELDS
    )
    return tensors and [batch.texts for batch in first] == [batch.texts for batch in second]


def joined(parts):
    """The global batches of the batches of all ranks."""
    return [
        batches[0]._replace(
            **{name: torch.cat([getattr(batch, name) for batch in batches]) for name in FIELDS},
            texts=sum((batch.texts for batch in batches), []),
        )
        for batches in zip(*parts, strict=True)
    ]


@pytest.fixture(scope="module")
def reference(original):
    return take(original, 9)


def test_batches_are_those_of_the_trainer(original):
    tokenizer = original.parent / "tokenizer.json"
    own = take(original, 3, lanes=LANES, block=BLOCK, tokenizer=tokenizer, length=8, decoder="pillow", resize="pillow")
    expected = loader(original).batches(0, BATCH, "0.5")
    for batch, other in zip(own, expected, strict=False):
        assert batch.texts is None and batch.samples_seen == other.samples_seen
        assert all(torch.equal(getattr(batch, name), getattr(other, name)) for name in FIELDS)
    expected.close()


def test_epochs_are_those_of_the_order_and_of_replacements(original, tmp_path):
    order = SampleOrder(11, SAMPLES, CHUNK, BLOCK, LANES)
    batches = take(original, 9, lanes=LANES, block=BLOCK)
    for batch in batches:
        ids, epochs = order.batch(batch.samples_seen - BATCH, BATCH)
        assert batch.ids.tolist() == ids.tolist() and batch.epochs.tolist() == epochs.tolist()
    assert set(batches[-1].epochs.tolist()) == {1, 2}
    manifest = Manifest.load(original)
    excepted = write(tmp_path / "left", manifest, manifest.checksums, dict.fromkeys(range(0, SAMPLES, 3), "bad"))
    drawn = {}
    for batch in take(excepted.folder, 9, lanes=LANES, block=BLOCK):
        for id, epoch, keep in zip(batch.ids.tolist(), batch.epochs.tolist(), batch.keep_indices.tolist(), strict=True):
            assert drawn.setdefault((id, epoch), keep) == keep, "a mask is a function of id and epoch"
    assert len(drawn) > SAMPLES


@pytest.mark.parametrize("workers", [0, 2])
def test_texts_are_captions_of_the_samples(original, workers):
    for batch in take(original, 2, workers=workers):
        assert batch.tokens.shape == (BATCH, 0) and len(batch.texts) == BATCH
        assert all(text in caption(id).split("\n") for text, id in zip(batch.texts, batch.ids.tolist(), strict=True))
    labels = take(original, 1, workers=workers, captions=["cls:whole"])[0]
    assert labels.texts == [str(id % 7) for id in labels.ids.tolist()]
    assert set(take(original, 1, workers=workers, captions=[])[0].texts) == {""}


def test_several_data_sets_share_a_batch_by_weight(original, tmp_path):
    other = make_dataset(tmp_path / "other", 120, 3, size=32, seed=1, chunk=1)
    sets = [
        {"name": "a", "manifest": str(original), "weight": 3},
        {"name": "b", "manifest": str(other), "weight": 1},
    ]
    for workers in (0, 3):
        batch = take("", 1, sets=sets, lanes=16, workers=workers)[0]
        ids = batch.ids.tolist()
        assert [id >> 48 for id in ids] == [0] * 36 + [1] * 12
        assert all(text in caption(id % 2**48).split("\n") for text, id in zip(batch.texts, ids, strict=True))


def test_images_are_whole_images(original):
    whole = {"crop_area": [1.0, 1.0], "crop_aspect": [1.0, 1.0], "flip": 0}
    batch = take(original, 1, mask="0", size=32, augment=whole)[0]
    for image, id in zip(batch.images(), batch.ids.tolist(), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), draw_image(id, 32))
    for mask in ("0.5", "0.75"):  # with 4 of 16 patches, too
        with pytest.raises(ConfigError, match=r'Batch.images\(\).*mask="0"'):
            take(original, 1, mask=mask, size=32)[0].images()


# -- the position -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 2), (2, 1), (3, 0)])
def test_loop_continues_with_other_ranks_and_workers(original, reference, world, workers):
    before = stream(original, workers=2)
    assert same(list(itertools.islice(before, 5)), reference[:5])
    state = json.loads(json.dumps(before.state_dict()))
    before.close()
    assert state["samples_seen"] == 5 * BATCH, "batches that workers have prepared in advance do not count"
    parts = []
    for rank in range(world):
        with stream(original, rank=rank, world=world, workers=workers) as batches:
            batches.load_state_dict(state)
            parts.append(list(itertools.islice(batches, 4)))
    assert same(joined(parts), reference[5:])
    assert same(take(original, 4, start=5 * BATCH), reference[5:])


def test_default_lanes_depend_on_data_and_batch_alone(original):
    lanes = {stream(original, world=world, rank=world - 1).lanes for world in (1, 2, 3, 12)}
    assert lanes == {12}
    assert stream(original, batch=10).lanes == 10
    assert stream(original, block=1).lanes == 48


def test_state_brings_its_lanes_and_blocks(original, reference):
    state = stream(original, lanes=6, block=2, start=BATCH).state_dict()
    assert state == {
        "samples_seen": BATCH, "manifest": Manifest.load(original).digest, "seed": 11, "lanes": 6, "block": 2,
        "order": 1,
    }  # fmt: skip
    expected = take(original, 2, lanes=6, block=2, start=BATCH)
    assert not same(expected, reference[1:3])
    batches = stream(original)
    next(batches)
    batches.load_state_dict(state)
    assert (batches.lanes, batches.block, batches.samples_seen) == (6, 2, BATCH)
    assert same(list(itertools.islice(batches, 2)), expected)
    larger = stream(original, batch=2 * BATCH)
    larger.load_state_dict(state)
    assert sorted(next(larger).ids.tolist()) == sorted(torch.cat([batch.ids for batch in expected]).tolist())


def test_iterating_again_continues(original, reference):
    batches = stream(original)
    first = list(itertools.islice(batches, 2))
    assert same(first + list(itertools.islice(batches, 2)), reference[:4])
    batches.close()
    assert same([next(batches)], reference[4:5])


def test_error_of_a_batch_does_not_move_the_position(folder, reference):
    shard = folder / "00002.tar"
    batches = stream(folder)
    shard.rename(folder / "elsewhere")
    with pytest.raises(DataError, match=r"00002\.tar"):
        list(itertools.islice(batches, 8))
    position = batches.samples_seen // BATCH
    (folder / "elsewhere").rename(shard)
    assert same([next(batches)], reference[position : position + 1])


def test_state_of_another_order_is_refused(original, tmp_path):
    state = stream(original).state_dict()
    other = make_dataset(tmp_path / "other", 120, 3, size=32, seed=1, chunk=1)
    cases = [
        (stream(other), state, "manifest", "Name the manifest of that loop"),
        (stream(original, seed=12), state, "seed is 12.*found: 11", "Pass seed=11"),
        (stream(original, lanes=6), state, "lanes is 6.*found: 12", "Leave lanes out, or pass lanes=12"),
        (stream(original, block=2), state, "block is 2.*found: 4", "Leave block out"),
        (stream(original), state | {"order": 2}, "order is 1.*found: 2", "release that wrote the state"),
        (stream(original), {"samples_seen": 0}, "manifest is missing", "what state_dict"),
        (stream(original), state | {"samples_seen": 5}, "multiple of the 12 lanes", "samples_seen of a batch"),
        (stream(original), state | {"samples_seen": "x"}, "samples_seen: must be a whole number", "int"),
        (stream(original, batch=30), state, "batch: must be a multiple of the 12 lanes", "Set it to one"),
    ]
    for batches, given, what, remedy in cases:
        with pytest.raises(ConfigError, match=f"{what}.*{remedy}"):
            batches.load_state_dict(given)
        assert batches.samples_seen == 0


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch": 0}, "batch: must be at least 1.*found: 0"),
        ({"batch": 48.5}, "batch: must be a whole number.*found: 48.5"),
        ({"lanes": 0}, "lanes: must be at least 1.*found: 0"),
        ({"lanes": 5}, "batch: must be a multiple of the 5 lanes.*found: 48.*set lanes to a divisor"),
        ({"lanes": 48}, "48 lanes with blocks of 4 chunks need 384 chunks, the data set has 101.*data.block"),
        ({"block": 0}, "block: must be at least 1"),
        ({"start": 5}, "start: S, .*must be a multiple of the 12 lanes.*found: 5"),
        ({"start": -BATCH}, "start: must be at least 0"),
        ({"rank": -1}, "rank: must be at least 0"),
        ({"rank": 2, "world": 2}, "rank: must be from 0 to 1.*found: 2.*rank and world of this process"),
        ({"world": 0}, "world: must be at least 1"),
        ({"world": 5}, "multiple of the 5 ranks.*found: 12.*others give another order"),
        ({"workers": 13}, "workers: more than the 12 lanes.*found: 13.*at most 12"),
        ({"mask": "1"}, "mask: must be at least 0 and below 1.*found: '1'.*Example"),
        ({"mask": "half"}, "mask: needs a decimal number.*found: 'half'.*Example"),
        ({"mask": "0.95"}, "keeps none of 9 patches.*Mask less"),
        ({"patch": 7}, "7 does not divide size 24.*Set model.image.size to 21 or 28"),
        ({"tokenizer": "missing.json"}, "missing.json: no such tokenizer"),
        ({"augment": {"flips": 1}}, "augment.flips: unknown key.*Did you mean augment.flip?"),
        ({"augment": {"flip": 2}}, "augment.flip: must be.*found: 2"),
        ({"augment": {"steps": ["a.py:B"]}}, "takes no FILE.py:Class.*found: 'a.py:B'.*flip submit"),
        ({"worker": 2}, "data.worker: unknown key.*Did you mean data.workers?"),
        ({"captions": "txt"}, "data.captions: needs a list.*found: 'txt'"),
        ({"seed": -1}, "seed: must be at least 0.*found: -1"),
    ],
)
def test_wrong_arguments_are_refused(original, arguments, message):
    with pytest.raises(ConfigError, match=message):
        stream(original, **arguments)


def test_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(DataError, match="no manifest in this folder.*flip shards index"):
        stream(tmp_path)
    with pytest.raises(ConfigError, match="no data set is given"):
        stream("")


# -- torch's DataLoader -----------------------------------------------------------------------------------------------


def test_stream_is_an_iterable_data_set_of_torch(original, reference):
    batches = stream(original, workers=1)
    delivered = list(itertools.islice(DataLoader(batches, batch_size=None), 3))
    batches.close()
    assert same(delivered, reference[:3]) and batches.state_dict()["samples_seen"] == 3 * BATCH


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader_are_refused(original, method, monkeypatch):
    """Each would repeat the batches of the others, and the position here would stay at the start."""
    context = multiprocessing.get_context(method)
    batches = DataLoader(stream(original), batch_size=None, num_workers=1, multiprocessing_context=context)
    # torch waits this long for each process when the iterator is collected
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    with pytest.raises(ConfigError, match=r"num_workers=0\), and flip.batches\(..., workers=N\)"):
        next(iter(batches))
