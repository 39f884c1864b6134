"""Copies this rank's part of a training state to host memory, as the bytes of the safetensors file that is written.

Which tensors a rank writes, and at which bytes of its file, depends on names, types, shapes and placements alone. All
ranks decide alike, without exchanging plans, and keep the layout with its buffer until one of these changes.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flip.checkpoint.safetensors_header import METADATA, OFFSETS, SHARDS
from flip.checkpoint.safetensors_io import DTYPE_NAMES
from flip.distributed.parallel import local, local_offsets, replica_of

log = logging.getLogger(__name__)


def own_part(state: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors of which this rank writes its part, so that every part is written once.

    All ranks decide alike, by the order of the names and the full sizes. Rank 0 writes tensors that are not sharded,
    so a rank that loads opens one other file. Replicas write about as much each.
    """
    own = {}
    written = Counter[int]()
    for name, tensor in state.items():
        writes = rank == 0
        if hasattr(tensor, "placements"):
            replica, count = replica_of(tensor)
            writer = min(range(count), key=written.__getitem__)
            written[writer] += tensor.numel()
            writes = replica == writer
        if writes:
            own[name] = tensor
    return own


class StagedShard:
    """This rank's file of a checkpoint in one buffer: the header, and space for the tensors, which ``fill`` copies.

    Args:
        state: the tensors of the checkpoint, on all ranks in the same order; only their layout is used.
        pinned: page-locked memory, to which a GPU copies without an intermediate buffer. torch rounds its size up to
            a power of two. Pageable memory is taken if the driver refuses.
    """

    def __init__(self, state: Mapping[str, Tensor], rank: int, pinned: bool = False) -> None:
        self._layout = _layout(state)
        part = own_part(state, rank)
        offsets = {name: {OFFSETS: local_offsets(tensor)} for name, tensor in part.items()}
        header: dict[str, Any] = {METADATA: {SHARDS: json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}}
        tensors = {name: local(tensor) for name, tensor in part.items()}
        size = 0
        for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):  # keeps all aligned
            start = size
            size += tensors[name].nbytes
            dtype = DTYPE_NAMES[tensors[name].dtype]
            shape = list(tensors[name].shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, size]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8, as safetensors requires
        first = 8 + len(text)
        self._buffer = _host_buffer(first + size if part else 0, pinned)
        self.tensors: dict[str, Tensor] = {}
        """Name -> this rank's part of the tensor, a view of the buffer."""
        if part:
            self._buffer[:first] = torch.frombuffer(
                bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8
            )
        for name, tensor in tensors.items():
            start, stop = (first + offset for offset in header[name]["data_offsets"])
            self.tensors[name] = self._buffer[start:stop].view(tensor.dtype).view(tensor.shape)

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether ``state`` has the layout for which the buffer was made."""
        return self._layout == _layout(state)

    @torch.no_grad()
    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Copy the values of ``state``, which may change as soon as this returns."""
        for name, target in self.tensors.items():
            target.copy_(local(state[name]), non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies, on the rank's device

    @property
    def data(self) -> memoryview:
        """The bytes of the file; empty if this rank writes none."""
        return self._buffer.numpy().data


def _layout(state: Mapping[str, Tensor]) -> list[tuple[Any, ...]]:
    """All that ``own_part`` and the header depend on."""
    return [
        (name, tensor.dtype, tensor.shape, getattr(tensor, "placements", None), getattr(tensor, "device_mesh", None))
        for name, tensor in state.items()
    ]


def _host_buffer(size: int, pinned: bool) -> Tensor:
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            log.warning("memory for checkpoints is not page-locked, so copies to it take longer: %s", error)
    return torch.empty(size, dtype=torch.uint8)
