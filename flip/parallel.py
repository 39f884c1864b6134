"""One code path from one CPU process to many GPUs: the process group, the placement of a model, the numeric modes."""

from __future__ import annotations

import contextlib
import datetime
import os
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from flip.config import schema

PATIENCE = 5.0
"""Minutes that a collective waits for its slowest rank beyond the limit of the watchdog, which ends it better."""


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    control: Any
    """A gloo group of all ranks for flags and counts: never busy with tensors of the model."""
    storage: Any
    """Another one for checkpoints: sharing a group with training aborts the process (measured)."""

    @property
    def first(self) -> bool:
        return self.rank == 0


def start(compute: schema.Compute, hang_minutes: float = 20.0) -> World:
    """Join the ranks named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and set threads and numeric modes."""
    patience = datetime.timedelta(minutes=(hang_minutes or 20.0) + PATIENCE)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(compute.threads)
    # Bits must not depend on what a library finds in the environment.
    if compute.deterministic == "yes":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Else every new tensor is filled with NaN before it is written: two per cent of a step, and no bit differs.
        torch.utils.deterministic.fill_uninitialized_memory = False
    if compute.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if size == 1:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1, timeout=patience)
    else:
        distributed.init_process_group(backend, rank=rank, world_size=size, timeout=patience)
    control = distributed.new_group(backend="gloo", timeout=patience)
    storage = distributed.new_group(backend="gloo", timeout=6 * patience)  # rank 0 hashes whole checkpoints alone
    torch.manual_seed(0)  # nothing draws from it: weights and data have their own generators
    random.seed(0)
    return World(rank, size, device, control, storage)


def place(pair: nn.Module, world: World, compile: bool = False) -> nn.Module:
    """Move the pair to its device and, with several ranks, shard it: every block of both towers, then the rest.

    Blocks are units so that only one block's full weights are held at a time; the root holds embeddings, norms,
    projections and the logit scale. Weights are initialised in full before, so they do not depend on the world size.
    ``compile``: every block by torch.compile, in place and before it is sharded, which keeps the names of parameters;
    what a block recomputes in its backward pass is inside it, and compiled with it.
    """
    pair.to(world.device)
    if compile:
        pair.text.few_shapes = True  # type: ignore[union-attr]
        for block in (*pair.image.blocks, *pair.text.blocks):  # type: ignore[union-attr, misc]
            block.compile(dynamic=False)
    if world.size > 1:
        for tower in (pair.image, pair.text):
            for block in tower.blocks:  # type: ignore[union-attr]
                fully_shard(block)
        fully_shard(pair)
        for method in ("encode_image", "encode_text"):
            torch.distributed.fsdp.register_fsdp_forward_method(pair, method)
    return pair


def reshard(pair: nn.Module) -> None:
    """Give back the full weights that a pass without gradient leaves at the root.

    Until then ``named_parameters`` names those copies, not the shards that optimiser and checkpoint mean.
    """
    if isinstance(pair, FSDPModule):
        pair.reshard()


def autocast(compute: schema.Compute, world: World) -> contextlib.AbstractContextManager[Any]:
    """bf16 arithmetic over fp32 weights where the configuration says bf16."""
    if compute.precision == "bf16":
        return torch.autocast(world.device.type, torch.bfloat16)
    return contextlib.nullcontext()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full value of a tensor that may be sharded. Collective: call it on all ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def stop() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
