"""One code path from one CPU process to many GPUs: the process group, the placement of a model, the numeric modes."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import os
import random
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from flip.config import schema
from flip.runs.ownership import private_folder

_Model = TypeVar("_Model", bound=nn.Module)
PATIENCE = 5.0
"""Minutes that a collective waits for its slowest rank beyond the limit of the watchdog, which ends it better."""
LOOPBACK = "127.0.0.1"
SHAPES = 64
"""For which a block may be compiled: stages times towers times parts of a batch, and lengths of packed texts."""


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    control: Any
    """A gloo group of all ranks for flags and counts: never busy with tensors of the model."""
    storage: Any
    """Another one for checkpoints, whose thread uses it at any time: sharing a group with training aborts the process
    (measured)."""

    local_rank: int = 0
    """Among the ranks of a node, whose ranks are neighbours."""
    patience: datetime.timedelta = datetime.timedelta(minutes=20 + PATIENCE)
    """How long a collective of training waits."""

    @property
    def first(self) -> bool:
        return self.rank == 0


def start(compute: schema.Compute, hang_minutes: float = 20.0) -> World:
    """Join the other ranks and set threads and numeric modes.

    RANK and WORLD_SIZE number the ranks. They meet as ``open_store`` says. If LOCAL_WORLD_SIZE is WORLD_SIZE, all of
    them are on this host, and other hosts cannot connect to them.
    """
    patience = datetime.timedelta(minutes=(hang_minutes or 20.0) + PATIENCE)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(compute.threads)
    # Bits must not depend on what a library finds in the environment.
    if compute.deterministic == "yes":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Else every new tensor is filled with NaN before it is written: two per cent of a step, and no bit differs.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if compute.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if size == 1 or _one_host(size):
        stay_on_loopback()
    store = open_store(rank, size, patience)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    control = distributed.new_group(backend="gloo", timeout=patience)
    storage = distributed.new_group(backend="gloo", timeout=6 * patience)  # rank 0 hashes whole checkpoints alone
    torch.manual_seed(0)  # nothing draws from it: weights and data have their own generators
    random.seed(0)
    return World(rank, size, device, control, storage, int(os.environ.get("LOCAL_RANK", 0)), patience)


def _one_host(size: int) -> bool:
    """Whether the launcher says that all ranks are on this host."""
    return os.environ.get("LOCAL_WORLD_SIZE") == str(size)


def stay_on_loopback() -> None:
    """Have gloo and NCCL listen on the loopback interface alone, unless the user chose an interface."""
    name = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def open_store(rank: int, size: int, patience: datetime.timedelta) -> distributed.Store | None:
    """The key-value store in which ranks publish their addresses; None: torch's TCPStore at MASTER_ADDR:MASTER_PORT.

    One rank needs no store that others reach. Ranks on one host share the file FLIP_STORE, which the launcher puts into
    a folder that is closed to other users; without it a TCPStore at MASTER_PORT listens on loopback alone (torch's own
    always listens on all interfaces). torchrun serves a store itself.
    """
    if size == 1:
        return distributed.HashStore()
    path, port = os.environ.get("FLIP_STORE"), int(os.environ.get("MASTER_PORT", 0))
    if path:
        store: distributed.Store = distributed.FileStore(path, size)
    elif _one_host(size) and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        listening = socket.create_server((LOOPBACK, port), backlog=size).detach() if rank == 0 else None
        store = distributed.TCPStore(LOOPBACK, port, size, rank == 0, patience, master_listen_fd=listening)
    else:
        return None
    store.set_timeout(patience)
    return store


def place(pair: nn.Module, world: World, compute: schema.Compute, mesh: DeviceMesh | None = None) -> nn.Module:
    """Compile, with several ranks shard, and give memory to the pair, in this order (docs/parallel.md says why).

    A pair that was built on meta gets memory for this rank's shards alone, full of NaN: ``check`` then finds whatever
    nobody drew. One that has its weights keeps them. Every block is compiled in place and before it is sharded: names
    of parameters stay, and what a block computes again in its backward pass is inside it and compiled with it.
    ``mesh``: of a pair that is sharded already, to be sharded alike.
    """
    if compute.compile == "yes":
        set_compile_caches()
        pair.text.bucket_lengths = True  # type: ignore[union-attr]
        # All blocks share one code, compiled anew for every shape. At torch's own limit of 8 the next shapes would run
        # eagerly for good: that of the last stage, say, and in a process that was started in it, not.
        torch._dynamo.config.recompile_limit = max(SHAPES, torch._dynamo.config.recompile_limit)
        for block in _blocks(pair):
            block.compile(dynamic=False)
    if world.size > 1:
        _shard(pair, compute, mesh or _mesh(world, compute.replicate))
    tables = dict(pair.named_buffers())
    if any(parameter.is_meta for parameter in pair.parameters()):
        pair.to_empty(device=world.device)
        with torch.no_grad():
            for parameter in pair.parameters():
                parameter.fill_(torch.nan)
            for name, buffer in pair.named_buffers():
                buffer.copy_(tables[name])
    return pair.to(world.device)


def set_compile_caches() -> None:
    """Keep compiled code, which torch loads as pickles and shared objects, in a folder that nobody else can write to.

    torch's own default is /tmp/torchinductor_USER, whoever made it. Variables that are set already stay.
    """
    try:
        folder = private_folder(Path(tempfile.gettempdir()) / f"flip-compile-{os.geteuid()}")
    except PermissionError:  # another user made it
        folder = Path(tempfile.mkdtemp(prefix="flip-compile-"))
    for name, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(name, str(folder / part))


def _blocks(pair: nn.Module) -> list[nn.Module]:
    return [*pair.image.blocks, *pair.text.blocks]  # type: ignore[union-attr, list-item, misc]


def in_fp32(pair: _Model, build: Callable[[], _Model], world: World, compute: schema.Compute) -> _Model:
    """The weights of ``pair`` in a model that computes in fp32 outside of autocast: to score them as they are exported.

    That is ``pair`` itself, unless it is sharded in bf16: then what ``build`` makes, the same model on meta, is sharded
    alike and gets copies of the fp32 shards (4 bytes per parameter, divided by W). Collective.
    """
    if world.size == 1 or compute.precision == "fp32":
        return pair
    reshard(pair)
    scored, mesh = build(), next(pair.parameters()).device_mesh  # type: ignore[attr-defined]
    place(scored, world, dataclasses.replace(compute, precision="fp32", compile="no"), mesh)
    with torch.no_grad():
        for own, source in zip(scored.parameters(), pair.parameters(), strict=True):
            own.to_local().copy_(source.to_local())  # type: ignore[attr-defined]
    return scored


def _shard(pair: nn.Module, compute: schema.Compute, mesh: DeviceMesh) -> None:
    """The units that are gathered, used and given back together: every block, each tower's rest, each projection.

    A block is a unit so that only one block's full weights are held at a time. With bf16 the weights of blocks and
    towers are gathered and multiplied in bf16; shards, their gradients' sums over ranks and the optimiser stay fp32.
    Projections and the logit scale, which is left to the root, decide the precision of the loss: fp32 always.
    Several copies: neighbouring ranks hold one, so that gathering stays among them.
    """
    policy = MixedPrecisionPolicy()
    if compute.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for tower in (pair.image, pair.text):
        for block in tower.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(tower.projection, mesh=mesh)  # type: ignore[union-attr, arg-type]
        fully_shard(tower, mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
    fully_shard(pair, mesh=mesh)
    for method in ("encode_image", "encode_text"):
        torch.distributed.fsdp.register_fsdp_forward_method(pair, method)


def _mesh(world: World, copies: int) -> DeviceMesh:
    """All ranks in a row, or a row for each copy of the weights."""
    if copies == 1:
        return init_device_mesh(world.device.type, (world.size,))
    rows = torch.arange(world.size).view(copies, -1)
    # Groups of our own: those that a mesh makes have torch's patience, which may end before a slow read does.
    ours = [
        distributed.new_subgroups_by_enumeration(lines.tolist(), timeout=world.patience)[0] for lines in (rows.T, rows)
    ]
    return DeviceMesh.from_group(ours, world.device.type, rows, mesh_dim_names=("copy", "shard"))


def check(pair: nn.Module) -> None:
    """RuntimeError unless every weight and table has a value that somebody gave it."""
    for name, tensor in (*pair.named_parameters(), *pair.named_buffers()):
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
        if local.is_meta or not bool(local.isfinite().all()):
            raise RuntimeError(f"{name} was never given a value, or holds one that is not finite")


def reshard(pair: nn.Module) -> None:
    """Give back the full weights that a pass without gradient leaves at the root.

    Until then ``named_parameters`` names those copies, not the shards that optimiser and checkpoint mean.
    """
    if isinstance(pair, FSDPModule):
        pair.reshard()


def autocast(compute: schema.Compute, world: World) -> contextlib.AbstractContextManager[Any]:
    """bf16 arithmetic over fp32 weights where the configuration says bf16, for a pair that is not sharded.

    A sharded one has bf16 weights while it computes (``place``), which is the same but for the rounding of gains,
    positions and embeddings. A single process is spared the copies of all weights that sharding makes in every step.
    """
    if compute.precision == "bf16" and world.size == 1:
        return torch.autocast(world.device.type, torch.bfloat16)
    return contextlib.nullcontext()


def copies(tensor: torch.Tensor) -> int:
    """Ranks that hold the same part of a tensor that may be sharded."""
    places = enumerate(getattr(tensor, "placements", ()))
    return math.prod(tensor.device_mesh.size(i) for i, place in places if place.is_replicate())  # type: ignore


def copy_number(tensor: torch.Tensor) -> int:
    """Which of the ``copies`` of its part of a sharded tensor this rank holds: 0, 1, ..."""
    number, mesh = 0, tensor.device_mesh  # type: ignore[attr-defined]
    for i, place in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if place.is_replicate():
            number = number * mesh.size(i) + mesh.get_local_rank(i)
    return number


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def local_offsets(tensor: torch.Tensor) -> list[int]:
    """The index in the full tensor of the first element of this rank's part."""
    if not hasattr(tensor, "__create_chunk_list__"):
        return [0] * tensor.ndim
    (chunk,) = tensor.__create_chunk_list__()
    return list(chunk.offsets)


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``tensor``, which every rank holds in full, sharded as ``like``. Nothing is sent."""
    if not hasattr(like, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes a second, which unsharded models need not pay

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full value of a tensor that may be sharded. Collective: call it on all ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def stop() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
