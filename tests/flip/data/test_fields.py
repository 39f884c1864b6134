"""Tests of data.fields: numbers of samples reach the batch, and a sample without them counts as damaged."""

import json
import logging

import numpy as np
import pytest
import torch
import webdataset

import flip
from flip.data import sample_members
from flip.data.decode import DecodeError
from flip.data.manifest.build import index
from flip.runs.errors import DataError
from tests.flip.data.loading import BATCH, CHUNK, SAMPLES, loader
from tests.synthetic import caption, draw_image, encode, make_tokenizer

NAMES = ["similarity", "rank"]
BAD = {
    5: {"rank": 1},
    17: {"rank": 1, "similarity": "0.5"},
    40: {"rank": 1, "similarity": None},
    41: {"rank": True, "similarity": 0.5},
    90: {"rank": float("nan"), "similarity": 0.5},
    111: {"rank": 10**400, "similarity": 0.5},
    160: ["similarity", "rank"],
    161: None,
}
"""Sample -> its json member; None: it has none."""


def numbers(ids):
    return np.stack([np.asarray(ids) / 7, np.asarray(ids) % 5], axis=1)


def written(folder, bad):
    folder.mkdir(parents=True)
    with webdataset.TarWriter(str(folder / "0.tar"), mtime=0) as writer:
        for i in range(SAMPLES):
            sample = {"__key__": f"{i:05d}", "png": encode(draw_image(i, 32), "png"), "txt": caption(i)}
            content = bad.get(i, {"rank": i % 5, "similarity": i / 7, "other": "text"})
            if content is not None:
                sample["json"] = json.dumps(content).encode()
            writer.write(sample)
    index([str(folder / "0.tar")], folder, chunk=CHUNK)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("fields")
    make_tokenizer(root / "tokenizer.json")
    return {"good": written(root / "good", {}), "bad": written(root / "bad", BAD)}


def taken(folder, count=4, **fields):
    source = loader(folder, **fields)
    try:
        stream = source.batches(0, BATCH, "0.5")
        return [detached(next(stream)) for _ in range(count)]
    finally:
        source.close()


def detached(batch):
    """A batch whose memory is its own."""
    tensors = {name: value.clone() for name, value in batch._asdict().items() if isinstance(value, torch.Tensor)}
    return batch._replace(**tensors)


@pytest.mark.parametrize("world, workers", [(1, 0), (1, 2), (2, 1)])
def test_numbers_of_samples_reach_the_batch_on_any_ranks_and_workers(folders, world, workers):
    plain = taken(folders["good"])
    ranks = [taken(folders["good"], fields=NAMES, rank=rank, world=world, workers=workers) for rank in range(world)]
    for n, batch in enumerate(plain):
        assert batch.fields is None
        parts = [rank[n] for rank in ranks]
        both = torch.cat([part.fields for part in parts])
        assert both.dtype == torch.float64 and both.shape == (BATCH, 2)
        assert np.array_equal(both, numbers(batch.ids))
        for name in ("patches", "keep_indices", "tokens", "ids", "epochs"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


@pytest.mark.parametrize("workers", [0, 2])
def test_sample_without_a_number_is_replaced_counted_and_logged(folders, workers, caplog):
    with caplog.at_level(logging.WARNING, logger="flip.data"):
        batches = taken(folders["bad"], fields=NAMES, workers=workers, max_replaced=0.1)
    ids = np.concatenate([batch.ids for batch in batches])
    planned = np.concatenate([batch.ids for batch in taken(folders["good"])])
    spoiled = np.isin(planned, list(BAD))
    assert sum(batch.replaced for batch in batches) == spoiled.sum() >= 5
    assert not np.isin(ids, list(BAD)).any() and np.array_equal(ids[~spoiled], planned[~spoiled])
    assert np.array_equal(np.concatenate([batch.fields for batch in batches]), numbers(ids))
    for id in {int(id) for id in planned[spoiled]}:
        assert any(f"sample {id} replaced:" in message for message in caplog.messages)
    assert taken(folders["bad"], count=1)[0].replaced == 0, "without the setting nothing is read"


def test_training_stops_above_the_limit_of_replaced_samples(folders):
    with pytest.raises(DataError, match="more than data.max_replaced allows"):
        taken(folders["bad"], fields=NAMES, max_replaced=0.001)
    with pytest.raises(DataError, match=r"none of the 6 samples of block .*no field 'absent' in its json"):
        taken(folders["good"], fields=["absent"])


@pytest.mark.parametrize("content", [content for content in BAD.values() if content is not None])
def test_reason_names_the_field(content):
    with pytest.raises(DecodeError, match="field '(similarity|rank)' in its json"):
        sample_members.fields_of({"json": json.dumps(content).encode()}, NAMES)


def test_fields_are_numbers_of_the_top_level():
    sample = {"json": b'{"a": 3, "b": -0.25, "c": {"a": 1}}', "txt": b"x"}
    assert sample_members.fields_of(sample, ["b", "a"]) == [-0.25, 3.0] and sample_members.fields_of({}, []) == []
    with pytest.raises(DecodeError, match="no json with the fields"):
        sample_members.fields_of({"txt": memoryview(b"x")}, ["a"])


def test_loop_of_ones_own_gets_the_numbers(folders):
    with flip.batches(folders["good"], batch=24, size=24, patch=8, mask="0", fields=["rank"]) as stream:
        batch = next(stream)
    assert np.array_equal(batch.fields[:, 0], numbers(batch.ids)[:, 1])
