"""Tests that loaders with weights give the same batches in any world and from any step, also with bad samples."""

import numpy as np
import pytest
import torch

import flip
from flip.data.manifest.manifest import Manifest, write
from flip.data.manifest.weights import write_weights
from flip.data.sources import load_sources
from flip.data.weighted_order import VIEWS
from flip.runs.errors import ConfigError, DataError
from flip.runs.formats import ORDER_NUMBER, WEIGHTED_ORDER_NUMBER
from tests.flip.data.loading import AFFINE, CHUNK, PLAIN, loader
from tests.flip.data.test_loader import same, spoil, take

BATCH = 8
FIELDS = {"lanes": 4, "block": 1}


def write_file(path, manifest, seed=1):
    """Weights of 1, 2 or 4 views, equal inside a chunk."""
    values = np.repeat(np.random.default_rng(seed).choice([1.0, 2.0, 4.0], manifest.chunks), CHUNK)[: manifest.samples]
    write_weights(path, manifest, [values], 0.0, "a test")
    return str(path)


@pytest.fixture(scope="module")
def weights(original, tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("weights") / "weights", Manifest.load(original))


def joined(original, world, workers, start, count, **fields):
    parts = []
    for rank in range(world):
        parts.append(take(loader(original, rank, world, workers, **FIELDS, **fields), start, count, BATCH))
    names = ("patches", "keep_indices", "tokens", "ids", "epochs")
    return [{n: torch.cat([getattr(part[t], n) for part in parts]) for n in names} for t in range(count)]


@pytest.mark.parametrize("augment", [PLAIN, AFFINE], ids=["plain", "affine"])
def test_batches_are_equal_in_any_world_and_from_any_step(original, weights, augment):
    fields = {"weights": weights, "augment": augment}
    reference = joined(original, 1, 0, 0, 40, **fields)
    for world, workers, start in [(2, 1, 0), (4, 0, 7), (1, 2, 23)]:
        count = 40 - start
        assert same(joined(original, world, workers, start * BATCH, count, **fields), reference[start:])
    for batch in reference:
        assert len(set(batch["ids"].tolist())) == BATCH
    views = [(int(i), int(e)) for batch in reference for i, e in zip(batch["ids"], batch["epochs"], strict=True)]
    assert len(set(views)) == len(views) and len({i for i, _ in views}) < len(views)
    first = {i: n for n, (i, _) in reversed(list(enumerate(views)))}
    again = next(n for n, (i, _) in enumerate(views) if first[i] != n)
    rows = [reference[n // BATCH]["keep_indices"][n % BATCH].tolist() for n in (first[views[again][0]], again)]
    assert rows[0] != rows[1], "another view has another mask"


def test_bad_samples_are_replaced_by_views_of_their_own(original, folder, tmp_path):
    bad = {3, 50, 120, 177}
    manifest = spoil(folder, bad)
    fields = FIELDS | {"weights": write_file(tmp_path / "weights", manifest), "folder": folder, "max_replaced": 0.3}
    whole = take(loader(original, **fields), 0, 60, BATCH)
    assert sum(batch.replaced for batch in whole) > 0
    for batch in whole:
        assert not bad & set(batch.ids.tolist())
    views = [(int(i), int(e)) for batch in whole for i, e in zip(batch.ids, batch.epochs, strict=True)]
    assert len(set(views)) == len(views)
    order = load_sources(loader(original, **fields).config.data)[0].order(11, 1)
    assert all(e % VIEWS == v % VIEWS for (_, e), v in zip(views, order.batch(0, 8)[1].tolist(), strict=False))
    halves = [take(loader(original, rank, 2, **fields), 13 * BATCH, 10, BATCH) for rank in range(2)]
    for step, (upper, lower) in enumerate(zip(*halves, strict=True)):
        assert upper.ids.tolist() + lower.ids.tolist() == whole[13 + step].ids.tolist()


def test_digest_and_number_of_order_change_with_weights(original, weights, tmp_path):
    plain = loader(original, **FIELDS)
    weighted = loader(original, weights=weights, **FIELDS)
    other = loader(original, weights=write_file(tmp_path / "other", Manifest.load(original), 2), **FIELDS)
    assert len({plain.digest, weighted.digest, other.digest}) == 3
    assert (plain.order_number, weighted.order_number) == (ORDER_NUMBER, WEIGHTED_ORDER_NUMBER) == (1, 2)


def test_weights_of_another_manifest_are_refused(original, weights, tmp_path):
    manifest = Manifest.load(original)
    other = write(tmp_path / "other", manifest, manifest.checksums, {3: "bad"})
    with pytest.raises(ConfigError, match="belong to another manifest"):
        loader(original, folder=other.folder, weights=weights, **FIELDS)
    with pytest.raises(DataError, match="no file of weights"):
        loader(original, weights=str(original / "manifest.json"), **FIELDS)


def test_batch_with_two_views_of_a_sample_is_refused(original, weights):
    with pytest.raises(ConfigError, match="two views of a sample could share a batch"):
        next(loader(original, weights=weights, lanes=12, block=3).batches(0, 48, "0.5"))


def test_flip_batches_takes_weights_and_resumes(original, weights):
    kwargs = {"batch": BATCH, "size": 24, "patch": 8, "weights": weights, "block": 1, "decoder": "pillow"}
    with flip.batches(original, **kwargs) as stream:
        assert stream.lanes == 8, "the most that keep views of a sample apart"
        whole = [next(stream).ids.tolist() for _ in range(6)]
        state = stream.state_dict() | {"samples_seen": 3 * BATCH}
    assert state["order"] == 2
    with flip.batches(original, **kwargs) as stream:
        stream.load_state_dict(state)
        assert [next(stream).ids.tolist() for _ in range(3)] == whole[3:]
    plain = {name: value for name, value in kwargs.items() if name != "weights"}
    with flip.batches(original, **plain) as stream, pytest.raises(ConfigError, match="another order"):
        stream.load_state_dict(state)
