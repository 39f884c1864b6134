"""Reading a checkpoint at a URL: by ranges of its files, of which a rank reads what it needs."""

import json
import math
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from flip.checkpoint import restorer
from flip.checkpoint import saver as checkpoint
from flip.checkpoint.restorer import Place
from flip.config import schema
from flip.data.storage.fsspec_storage import Anywhere
from flip.data.storage.retry import Patience
from flip.distributed import parallel
from flip.runs import commit
from flip.runs.errors import DataError, PermissionDenied
from flip.runs.rundir import RunDir
from tests.flip.checkpoint.test_saver import state_of, trained


@pytest.fixture(scope="module")
def world():
    yield parallel.start(schema.Compute(device="cpu", threads=1, deterministic="no"))
    parallel.stop()


@pytest.fixture
def saved(tmp_path, world, monkeypatch):
    """A run with one commit at a URL, its checkpointer, what was saved, and the ranges that are read from now on."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.begin_attempt({})
    saver = checkpoint.Checkpointer(run, 1, world, 1, url=f"file://{tmp_path}/there", patience=Patience(deadline=1.0))
    expected = state_of(*trained())
    saver.save(expected, "pretrain", 16)
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")  # nothing is copied to the node
    ranges, get = [], Anywhere._get
    monkeypatch.setattr(
        Anywhere, "_get", lambda self, key, start, stop: (ranges.append((start, stop)), get(self, key, start, stop))[1]
    )
    return run, saver, expected, ranges


def test_all_of_it_comes_without_a_copy_on_the_node(saved):
    run, saver, expected, ranges = saved
    (size,) = (facts["bytes"] for facts in commit.commits(run)[0].record["files"].values())
    newest = saver.newest()
    assert ranges == [(0, size)], "verified: read once, by one of the ranks"
    found = state_of(*trained(steps=0))
    saver.load(newest, found)
    assert found.keys() == expected.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_of_one_tensor_its_bytes_are_read_and_the_header(saved, monkeypatch):
    _, saver, expected, ranges = saved
    monkeypatch.setattr(restorer, "HEAD", 64)
    monkeypatch.setattr(restorer, "GAP", 0)
    newest, name = saver.newest(), "model.0.weight"
    del ranges[:]
    found = {name: torch.zeros_like(expected[name])}
    saver.load(newest, found)
    assert torch.equal(found[name], expected[name])
    (_, head), (after, begin), (start, stop) = ranges
    assert (head, after) == (64, 64) and start >= begin and stop - start == expected[name].nbytes


def test_what_goes_wrong_while_it_is_read_keeps_its_cause(saved):
    run, saver, _, _ = saved
    newest = saver.newest()
    saver.load(newest, state_of(*trained(steps=0)))
    for path in run.path.parents[1].glob("there/**/*.safetensors"):
        path.unlink()
    with pytest.raises(DataError, match="a file of the checkpoint is missing"):
        saver.load(newest, state_of(*trained(steps=0)))


def test_another_object_is_found_by_its_etag(saved, monkeypatch):
    run, _, _, _ = saved
    (made,) = commit.commits(run)
    files = restorer.Files(made, Patience(deadline=1.0))
    (name,) = files.names
    files.facts[name]["etag"] = "other"
    monkeypatch.setattr(Anywhere, "_get", lambda *_: SimpleNamespace(data=b"x", etag="E"))
    with pytest.raises(commit.Damaged, match="another object than was committed: E"):
        files.read(name, 0, 1)


def test_a_header_that_states_gigabytes_is_not_read(tmp_path):
    size = 1 << 40
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write((size - 8).to_bytes(8, "little"))
        file.truncate(size)  # a hole
    record = {"files": {"a.safetensors": {"bytes": size}}, "stage": "pretrain", "samples": 1, "attempt": 1}
    files = restorer.Files(commit.Commit(tmp_path, record), Patience(deadline=1.0))
    with pytest.raises(commit.Damaged, match=f"states a header of {size:,} bytes, at most"):
        restorer._headers(files)


@st.composite
def cuts(draw):
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    offsets = [draw(st.integers(0, n - 1)) for n in shape]
    return shape, offsets, [draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True)]


@given(cuts(), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), st.integers(0, 9))
def test_a_cut_of_a_part_is_that_of_the_tensor(cut, dtype, before):
    shape, offsets, lengths = cut
    whole = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    data = safetensors.torch.save({"a": torch.zeros(before), "b": whole})
    size = 8 + int.from_bytes(data[:8], "little")
    begin = size + json.loads(data[8:size])["b"]["data_offsets"][0]
    item = SimpleNamespace(storage_offsets=torch.Size(offsets), lengths=torch.Size(lengths))
    place = Place("f", torch.Size(shape), dtype, begin)
    start, stop = place.range(item)
    found = place.tensor(item, bytearray(data[start - 3 : stop]), 3)
    cut_out = tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))
    assert found.dtype == dtype and torch.equal(found, whole[cut_out])


def test_an_address_in_another_users_record_is_followed_only_below_a_named_place(saved, world, tmp_path):
    """What evaluation jobs, and runs that begin from another one, read."""
    run, saver, expected, ranges = saved
    (made,) = commit.commits(run)
    (made.path / commit.MARK).chmod(0o666)
    del ranges[:]
    for url in ("", "s3://there", f"file://{tmp_path}/ther"):
        other = restorer.Restorer(run, 0, world, Patience(deadline=1.0), url)
        for read in (lambda: other.open(made.path), other.newest):  # noqa: B023
            with pytest.raises(PermissionDenied, match="names an address, and its record is not trusted"):
                read()
    assert not ranges
    other, found = restorer.Restorer(run, 0, world, Patience(deadline=1.0), f"{tmp_path}/there"), state_of(*trained(0))
    other.load(other.open(made.path), found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
