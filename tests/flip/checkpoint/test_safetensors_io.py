"""Tests the files of checkpoints: their format, partial reads, and permissions."""

import math
import os
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from flip.checkpoint.safetensors_io import CheckpointFiles, read_tensors, save_tensors, write_shard
from flip.checkpoint.staging import StagedShard
from flip.evaluation.encoding.features import FeatureCache
from flip.runs.errors import DataError


def shard(full, offsets, part):
    """A stand-in for a DTensor: the part of a tensor that one rank holds."""
    chunks = [SimpleNamespace(offsets=offsets, sizes=part.shape)]
    return SimpleNamespace(
        dtype=full.dtype, shape=full.shape, ndim=full.ndim, numel=full.numel, placements=(), device_mesh=None,
        to_local=lambda: part, __create_chunk_list__=lambda: chunks,
    )  # fmt: skip


def write(folder, state, rank):
    staged = StagedShard(state, rank)
    staged.fill(state)
    return write_shard(folder, staged.data, rank)


@st.composite
def boxes(draw):
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    offsets = [draw(st.integers(0, n - 1)) for n in shape]
    return shape, offsets, [draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True)]


@given(boxes(), st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), st.integers(1, 3))
def test_read_tensors_returns_requested_slice_for_any_row_split(box, dtype, rows):
    shape, offsets, lengths = box
    full = torch.arange(1, math.prod(shape) + 1).reshape(shape).to(dtype)
    split = enumerate(full.split(rows)) if shape else ()
    saved = [shard(full, [i * rows, *[0] * (len(shape) - 1)], part) for i, part in split] or [full]
    loaded = torch.zeros(lengths, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for rank, part in enumerate(saved):
            files |= write(Path(folder), {"b": part, "a": torch.zeros(3)}, rank)
        read_tensors(CheckpointFiles(Path(folder), files), {"b": shard(full, offsets, loaded)})
    assert torch.equal(loaded, full[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files_are_interchangeable_with_torch_distributed_checkpoint(tmp_path):
    state = {"a": torch.arange(6.0).view(2, 3), "step": torch.tensor(7.0)}
    write(tmp_path, state, 0)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(loaded, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    folder = tmp_path / "dcp"
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=True)
    names = [path.name for path in tmp_path.glob("*.safetensors")]
    assert [path.name for path in folder.iterdir()] == names
    again = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    read_tensors(CheckpointFiles(folder, {name: {"bytes": (folder / name).stat().st_size} for name in names}), again)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_read_tensors_rejects_unknown_name_or_other_shape(tmp_path):
    full = torch.zeros(4, 3)
    files = CheckpointFiles(tmp_path, write(tmp_path, {"a": shard(full, [0, 0], full[:3])}, 0))
    for name, tensor, text in [
        ("b", full, "has no tensor b"),
        ("a", torch.zeros(4, 3), r"a has the shape \[3, 3\], the model needs \[4, 3\]"),
    ]:
        with pytest.raises(DataError, match=text):
            read_tensors(files, {name: tensor})


def test_read_tensors_names_three_of_the_parameters_that_the_model_lacks(tmp_path):
    state = {f"model.{name}": torch.zeros(2) for name in "abcde"}
    files = CheckpointFiles(tmp_path, write(tmp_path, state, 0))
    with pytest.raises(DataError, match="the checkpoint has 4 parameters") as error:
        read_tensors(files, {"model.a": torch.zeros(2)})
    assert "model.b, model.c, model.d" in str(error.value)
    assert "model.e" not in str(error.value)


def test_read_tensors_fails_if_shard_is_missing(tmp_path):
    full = torch.zeros(4, 3)
    files = {}
    for rank in (0, 2, 3):
        files |= write(tmp_path, {"a": shard(full, [rank, 0], full[rank : rank + 1])}, rank)
    with pytest.raises(DataError, match="a lacks 3 of its values"):
        read_tensors(CheckpointFiles(tmp_path, files), {"a": full})


@pytest.fixture(params=[0o022, 0o027, 0o002])
def mode(request):
    """Sets a umask. The value is the mode that a new file has under it."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def permissions(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_save_tensors_respects_umask_on_create_and_replace(mode, tmp_path):
    path = tmp_path / "weights.safetensors"
    for value in (1.0, 2.0):  # new, then replaced
        save_tensors({"a": torch.full((3, 2), value).T}, path)
        assert permissions(path) == mode and load_file(path)["a"].tolist() == [[value] * 3] * 2
    assert os.listdir(tmp_path) == ["weights.safetensors"]


def test_feature_cache_is_closed_to_writing_by_others(mode, tmp_path):
    cache = FeatureCache(tmp_path, "model")
    path = cache.path("images", 1)
    cache.put(path, {"features": torch.zeros(2, 3)})
    assert permissions(path) == mode & ~0o022 and not permissions(path.parent) & 0o022
