"""Checks the header of a safetensors file of a checkpoint, before memory is taken by the sizes that it states."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from flip.runs.checkpoint_folder import CorruptCheckpoint

METADATA = "__metadata__"
SHARDS = "DCP_SHARDING_INFO"
OFFSETS = "saved_offsets"
MAX_SIZE = 1 << 62
"""Offsets and sizes are below it: sums of two fit into int64."""


def parse_header(text: bytes, name: str, data_bytes: int, item_bytes: Mapping[str, int]) -> dict[str, Any]:
    """The header of the file ``name`` as its JSON value; the sharding information is parsed, too.

    ``data_bytes``: size of the file after the header. ``item_bytes``: dtype -> bytes of a value.
    Raises CorruptCheckpoint if a part is missing, has another type, or a tensor is not inside the file.
    """
    header = _object(text, name)
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict):
        raise CorruptCheckpoint(f"{name}: {METADATA} of its header is no object")
    saved = _object(metadata.get(SHARDS, "{}"), f"{name}: {SHARDS}")
    for tensor, entry in header.items():
        where = f"{name}: tensor {tensor[:200]!r}"
        _check_entry(entry, where, data_bytes, item_bytes)
        if saved:
            _check_offsets(saved.get(tensor), len(entry["shape"]), where)
    return {"tensors": header, "saved": saved}


def _object(text: Any, name: str) -> dict[str, Any]:
    if not isinstance(text, (str, bytes)):
        raise CorruptCheckpoint(f"{name} is no text")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{name} has no header of safetensors: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{name} has no header of safetensors: it is no object")
    return value


def _check_entry(entry: Any, where: str, data_bytes: int, item_bytes: Mapping[str, int]) -> None:
    if not isinstance(entry, dict):
        raise CorruptCheckpoint(f"{where} is no object")
    dtype = entry.get("dtype")
    shape = entry.get("shape")
    bounds = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in item_bytes:
        raise CorruptCheckpoint(f"{where} has an unknown dtype: {str(dtype)[:40]!r}")
    if not _are_sizes(shape):
        raise CorruptCheckpoint(f"{where} has no valid shape")
    if not _are_sizes(bounds) or len(bounds) != 2 or not bounds[0] <= bounds[1] <= data_bytes:
        raise CorruptCheckpoint(f"{where} is not inside the file")
    if math.prod(shape) * item_bytes[dtype] != bounds[1] - bounds[0]:
        raise CorruptCheckpoint(f"{where} has other bytes than its shape needs")


def _check_offsets(entry: Any, ndim: int, where: str) -> None:
    offsets = entry.get(OFFSETS) if isinstance(entry, dict) else None
    if not _are_sizes(offsets) or len(offsets) != ndim:
        raise CorruptCheckpoint(f"{where} has no valid {OFFSETS}")


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether a value is a list of at most 64 integers from 0 to ``MAX_SIZE``."""
    if not isinstance(value, list) or len(value) > 64:
        return False
    return all(type(number) is int and 0 <= number < MAX_SIZE for number in value)
