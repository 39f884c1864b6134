"""Tests that hostile headers of checkpoints, timm's weights and .npy files are read, or refused as damaged data."""

import io
import json
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flip.checkpoint.safetensors_io import CheckpointFiles, CheckpointIndex, read_headers
from flip.config.schema import Config
from flip.data.decode import DecodeError
from flip.data.manifest.uids import UidList
from flip.evaluation.metrics.measures import label_and_group
from flip.export import timm_source
from flip.runs.checkpoint_folder import CorruptCheckpoint
from flip.runs.errors import ConfigError, DataError
from tests.parsers.spoil import DEEP, spoiled, texts

SAVED = {"a": {"saved_offsets": [0, 0]}, "b": {"saved_offsets": [0]}}
HEADER = {
    "__metadata__": {"DCP_SHARDING_INFO": json.dumps(SAVED), "format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]},
}
NAME = "shard-00001-model-00001-of-00001.safetensors"


def safetensors(text, data=bytes(32)):
    return len(text).to_bytes(8, "little") + text + data


def header(**changes):
    """The bytes of the valid header in which tensor a has other fields."""
    return json.dumps({**HEADER, "a": {**HEADER["a"], **changes}}).encode()


def saved(text):
    return json.dumps({**HEADER, "__metadata__": {"DCP_SHARDING_INFO": text}}).encode()


@given(texts(HEADER))
@example(DEEP)
@example(b'{"a":' * 100_000)
@example(json.dumps({**HEADER, "__metadata__": []}).encode())
@example(json.dumps({"a": {}}).encode())
@example(header(shape=[2**63, 2**63]))
@example(header(shape=[0, 2**70], data_offsets=[0, 0]))
@example(header(data_offsets=[0, 2**70]))
@example(header(data_offsets=[-8, 16]))
@example(header(dtype="F4096"))
@example(saved("[" * 100_000))
@example(saved("[]"))
@example(saved(json.dumps({"a": {"saved_offsets": [2**70, 0]}, "b": {"saved_offsets": [0]}})))
@example(saved(json.dumps({"a": {"saved_offsets": [0]}, "b": {"saved_offsets": [0]}})))
def test_header_of_checkpoint_is_read_or_refused(tmp_path, text):
    content = safetensors(text)
    (tmp_path / NAME).write_bytes(content)
    files = CheckpointFiles(tmp_path, {NAME: {"bytes": len(content)}})
    with suppress(CorruptCheckpoint):
        index = CheckpointIndex.of(read_headers(files))
        for _, shape, parts in index.tensors.values():
            assert all(0 <= size < 2**63 for size in shape) and (parts >= 0).all()


def test_valid_header_of_checkpoint_is_read(tmp_path):
    content = safetensors(json.dumps(HEADER).encode())
    (tmp_path / NAME).write_bytes(content)
    index = CheckpointIndex.of(read_headers(CheckpointFiles(tmp_path, {NAME: {"bytes": len(content)}})))
    assert {name: shape for name, (_, shape, _) in index.tensors.items()} == {"a": [2, 3], "b": [1]}


@pytest.mark.parametrize("stated", [0, 4, 1 << 60])
def test_size_that_the_record_states_takes_no_memory(tmp_path, stated):
    content = safetensors(json.dumps(HEADER).encode())
    (tmp_path / NAME).write_bytes(content)
    files = CheckpointFiles(tmp_path, {NAME: {"bytes": stated}})
    with pytest.raises(CorruptCheckpoint):
        read_headers(files)
    with pytest.raises(CorruptCheckpoint):
        files.read(NAME, 1 << 40, 1 << 50)


TIMM = {
    "cls_token": {"dtype": "F32", "shape": [1, 1, 1], "data_offsets": [0, 4]},
    "blocks.0.norm1.weight": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    "pos_embed": {"dtype": "F32", "shape": [1, 1, 1], "data_offsets": [8, 12]},
}
DESCRIBED = {"architecture": "vit", "model_args": {"num_heads": 3}, "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}


def timm(name):
    return json.dumps({**TIMM, name: {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}).encode()


@given(texts(TIMM), texts(DESCRIBED))
@example(timm("blocks.999999999.norm1.weight"), json.dumps(DESCRIBED).encode())
@example(timm(f"blocks.{'9' * 5000}.norm1.weight"), json.dumps(DESCRIBED).encode())
@example(json.dumps(TIMM).encode(), DEEP)
@example(json.dumps(TIMM).encode(), b'{"model_args": {"num_heads": Infinity}}')
def test_weights_of_timm_are_read_or_refused(tmp_path, text, described):
    (tmp_path / "model.safetensors").write_bytes(safetensors(text, bytes(16)))
    (tmp_path / "config.json").write_bytes(described)
    timm_source.is_timm(tmp_path)
    with suppress(DataError, ConfigError):
        timm_source.source_config(tmp_path, Config())


def array(descr="'<i8'", shape="(2,)", data=bytes(16), version=(1, 0)):
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text + data


def saved_array(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


PAIRS = np.zeros(3, "u8,u8")


@given(st.one_of(spoiled(saved_array(np.arange(4))), spoiled(saved_array(PAIRS))))
@example(array(shape=f"({2**62},)"))
@example(array(shape=f"({2**70},)"))
@example(array(shape=f"(0, {2**70})", data=b""))
@example(array(shape="(-1,)"))
@example(array(descr="'O'"))
@example(array(descr="'V2147483647'", shape="(1,)"))
@example(array(shape="(" * 3000 + ")" * 3000))
@example(array(descr="[" * 300 + "]" * 300))
@example(array(version=(2, 0), shape=f"({2**40},)"))
@example(array(version=(9, 9)))
@example(b"PK\x03\x04")
@example(saved_array(np.array([float("inf")])))
@example(b"")
def test_array_is_read_or_refused(tmp_path, data):
    with suppress(DecodeError):
        label_and_group(0, {"npy": data, "cls": b"3"})
    (tmp_path / "uids.npy").write_bytes(data)
    with suppress(ConfigError):
        UidList.open(str(tmp_path / "uids.npy"))


def test_valid_arrays_are_read(tmp_path):
    assert label_and_group(1, {"npy": saved_array(np.array([5, 7])), "cls": b"3"}) == [3, 7]
    (tmp_path / "uids.npy").write_bytes(saved_array(PAIRS))
    assert UidList.open(str(tmp_path / "uids.npy")).count == 3
