"""The process group, FSDP, numeric modes, and helpers for sharded tensors: one code path for 1 CPU to many GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import inspect
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flip.common import devices, gpu_software
from flip.common.shutdown import COMPILE_MINUTES, SIGNALS
from flip.config import schema
from flip.distributed.compile_cache import code_folder
from flip.runs.checks import require
from flip.runs.node_address import address_for_others

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_Model = TypeVar("_Model", bound=nn.Module)
TIMEOUT_MARGIN_MINUTES = 5.0
"""Minutes that a collective waits longer than the watchdog, so that the watchdog, whose message is better, ends it."""
NEVER_MINUTES = 1440.0
"""Replaces ``hang_minutes: 0``. It is the longest time that a read may wait (``data.deadline``)."""
LOOPBACK = "127.0.0.1"
Connecting = Callable[[str], contextlib.AbstractContextManager[Any]]
"""A context with a short limit for the step that it names: ``Watchdog.connecting``."""
RECOMPILE_LIMIT = 64
"""Shapes for which a block may be compiled: stages x towers x micro-batches, and lengths of packed texts."""


@dataclass(frozen=True)
class World:
    """This rank and the process groups of all ranks."""

    rank: int
    size: int
    device: torch.device
    control_group: Any
    """A gloo group for flags and counts, never busy with tensors of the model."""
    checkpoint_group: Any
    """A gloo group for the thread that saves: sharing a group with training aborts the process (measured)."""
    timeout: datetime.timedelta = datetime.timedelta(minutes=20 + TIMEOUT_MARGIN_MINUTES)
    """Timeout of a collective of training, of every group (``collective_timeout``)."""
    connecting: Connecting = contextlib.nullcontext
    """Around a step that creates groups or runs their first collective."""

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0


def start(
    compute: schema.Compute, hang_minutes: float = 20.0, compiled: Path | None = None,
    connecting: Connecting = contextlib.nullcontext,
) -> World:  # fmt: skip
    """Join the other ranks and set threads, numeric modes and the folder for compiled code.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and the variables of ``open_store``. If LOCAL_WORLD_SIZE equals
    WORLD_SIZE, all ranks are on this host, and other hosts cannot connect to them. ``compiled``: the folder for code
    for CPUs. That for GPUs lies on the disk of this node; ``flip.training.compiled_code`` keeps a copy. ``connecting``:
    around each step after all ranks have started, until all groups of this function exist and one small collective of
    each has passed.
    """
    timeout = collective_timeout(hang_minutes)
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    _set_modes(compute, compiled)
    if compute.device == "cuda":
        require(gpu_software.OF_RANKS, compute.compile == "yes")
        device = devices.own_gpu()
        if compute.compile == "yes":
            start_compile_workers()
        torch.cuda.set_device(device)
        delay_nccl_monitor(timeout)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    if size == 1 or _is_single_host(size):
        stay_on_loopback()
    store = open_store(rank, size, timeout)
    wait_for_ranks(store, size)
    bound = device if device.type == "cuda" else None  # NCCL connects now, and guesses no device later
    with connecting("connecting the group of training"):
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=bound
        )
        check_group(None, device)
    with connecting("connecting the group of flags and counts"):
        control = distributed.new_group(backend="gloo", timeout=timeout)
        check_group(control)
    with connecting("connecting the group of saves"):
        checkpoint = distributed.new_group(backend="gloo", timeout=6 * timeout)  # rank 0 alone hashes full checkpoints
        check_group(checkpoint)
    torch.manual_seed(0)  # unused: weights and data have their own generators
    random.seed(0)
    return World(rank, size, device, control, checkpoint, timeout, connecting)


def _set_modes(compute: schema.Compute, compiled: Path | None) -> None:
    """Set threads, numeric modes and the folder for compiled code of this process."""
    torch.set_num_threads(compute.threads)
    torch.set_float32_matmul_precision("highest")  # images of NVIDIA turn TF32 on by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
    if compute.compile == "yes":  # first: torch sets its own folder when it is made deterministic
        set_compile_caches(compiled if compute.device == "cpu" else None)
    if compute.deterministic == "yes":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # By default every new tensor is filled with NaN first: two per cent of a step, and no bit differs.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def collective_timeout(hang_minutes: float) -> datetime.timedelta:
    """The timeout of all groups: above the watchdog's limit for a step, also for one that compiles. The watchdog, whose
    message is better, ends the process first."""
    limit = max(hang_minutes or NEVER_MINUTES, COMPILE_MINUTES)
    return datetime.timedelta(minutes=limit + TIMEOUT_MARGIN_MINUTES)


def wait_for_ranks(store: distributed.Store, size: int) -> None:
    """Wait until all ranks have come this far. Nodes start at different times, which no short limit may count."""
    if size > 1:
        if store.add("flip/started", 1) == size:
            store.set("flip/all-started", "1")
        store.wait(["flip/all-started"])


def check_group(group: Any, device: torch.device | None = None) -> None:
    """Wait for a small collective of a group, of tensors on a device (default: CPU): its connections work."""
    number = torch.zeros((), device=device)
    distributed.all_reduce(number, group=group)
    if number.is_cuda:
        torch.cuda.synchronize(device)


def delay_nccl_monitor(timeout: datetime.timedelta) -> None:
    """Delay NCCL's monitor, which would abort a process whose GPU hangs before the watchdog ends it with a better
    message.

    A value that the user chose stays.
    """
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(int(timeout.total_seconds())))


def stay_on_loopback() -> None:
    """Make gloo and NCCL listen on the loopback interface alone, unless the user chose an interface."""
    name = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def open_store(rank: int, size: int, timeout: datetime.timedelta) -> distributed.Store:
    """The key-value store in which ranks publish their addresses. On several nodes and below torchrun it is torch's, at
    MASTER_ADDR:MASTER_PORT.

    Ranks on one host share the file FLIP_STORE, in a folder of the launcher that is closed to other users; without it a
    TCPStore at MASTER_PORT listens on loopback alone. On several nodes it listens at the address of MASTER_ADDR alone;
    if that name leads to loopback on its own node, torch's store listens on all interfaces. torchrun serves a store
    itself.
    """
    if size == 1:
        return distributed.HashStore()
    path = os.environ.get("FLIP_STORE")
    port = int(os.environ.get("MASTER_PORT", 0))
    if path:
        store: distributed.Store = distributed.FileStore(path, size)
    elif "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        store = _torch_store(rank, size, timeout)
    elif _is_single_host(size):
        store = _store_at(LOOPBACK, port, rank, size, timeout)
    else:
        address = ""
        if rank == 0:
            address = address_for_others(os.environ.get("MASTER_ADDR", ""))
        if address:
            store = _store_at(address, port, rank, size, timeout)
        else:
            store = _torch_store(rank, size, timeout)
    store.set_timeout(timeout)
    return store


def _torch_store(rank: int, size: int, timeout: datetime.timedelta) -> distributed.Store:
    store, _, _ = next(distributed.rendezvous("env://", rank, size, timeout=timeout))
    return store


def _store_at(address: str, port: int, rank: int, size: int, timeout: datetime.timedelta) -> distributed.Store:
    """A TCPStore that listens at one address alone, on rank 0."""
    listening = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listening = socket.create_server((address, port), family=family, backlog=size).detach()
    return distributed.TCPStore(address, port, size, rank == 0, timeout, master_listen_fd=listening)


def apply_parallelism(
    model: nn.Module, world: World, compute: schema.Compute, mesh: DeviceMesh | None = None
) -> nn.Module:
    """Compile a model, shard it if there are several ranks, and allocate it, in this order.

    A model on the meta device, except its fixed tables, gets memory for this rank's shards alone, filled with NaN so
    that ``check_initialised`` detects parameters that were not initialised. Blocks are compiled in place and before
    sharding: parameter names stay, and activation checkpointing, which is inside the forward pass of a block for the
    same reason, is compiled with it, so that one graph serves the whole tower. Sharding is last, because it replaces
    parameters by this rank's shards. ``mesh``: of another model, to shard this one alike.
    """
    if compute.compile == "yes":
        model.text.bucket_lengths = True  # type: ignore[union-attr]
        # All blocks share one code object, compiled again for every shape. Beyond torch's limit of 8, further shapes
        # would run eagerly for good, for example those of the last stage.
        torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        for block in (*model.image.blocks, *model.text.blocks):  # type: ignore[union-attr, misc]
            block.compile(dynamic=False)  # type: ignore[operator]
        if world.device.type == "cuda" and hasattr(model.image, "scale_pixels"):
            model.image.scale_pixels = torch.compile(model.image.scale_pixels, dynamic=False)  # type: ignore
    if world.size > 1:
        _shard(model, compute, mesh or _mesh(world, compute.replicate))
    tables = dict(model.named_buffers())
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=world.device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
            for name, buffer in model.named_buffers():
                buffer.copy_(tables[name])
    return model.to(world.device)


def set_compile_caches(folder: Path | None = None) -> None:
    """Keep compiled code, which torch loads as pickles and shared objects, in a folder that only this user can write.

    ``folder``: of the run, so that later attempts find code for a CPU on whatever nodes they run (default: of this user
    on this node). All ranks may write at once: torch names files by their content, writes each under a temporary name,
    and locks what is slow to compile. torch's default is /tmp/torchinductor_USER, whoever owns it. Variables that are
    set already stay.
    """
    # Code for a CPU is compiled for its instructions, which torch does not make a part of the name.
    folder = code_folder(folder) / torch.backends.cpu.get_cpu_capability()
    for name, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(name, str(folder / part))


def start_compile_workers() -> None:
    """Start the processes in which Inductor compiles kernels, with the signals that stop a run blocked.

    Slurm may send a signal to all processes of a step. These would end, and the rank would wait for them or fail.
    """
    from torch._inductor.async_compile import AsyncCompile

    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        AsyncCompile.warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_fp32(model: _Model, build: Callable[[], _Model], world: World, compute: schema.Compute) -> _Model:
    """A model with the same weights that computes in fp32 outside of autocast, to score the weights as exported.

    This is ``model`` itself, unless it is sharded in bf16. Then ``build()``, the same model on meta, is sharded alike
    and gets copies of the fp32 shards (4 bytes per parameter, divided by W). Collective.
    """
    if world.size == 1 or compute.precision == "fp32":
        return model
    reshard(model)
    copy = build()
    mesh = next(model.parameters()).device_mesh  # type: ignore[attr-defined]
    apply_parallelism(copy, world, dataclasses.replace(compute, precision="fp32", compile="no"), mesh)
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, target in copy.named_parameters():  # which has no text classification head
            local(target).copy_(local(own[name]))
    return copy


def is_fsdp_unit(module: nn.Module | None) -> TypeGuard[FSDPModule]:
    """Whether ``fully_shard`` was applied to a module.

    The import of FSDP takes a third of a start-up. An unsharded model does not need it, so nothing here imports it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def separate_reductions(model: nn.Module, world: World, like: nn.Module | None = None) -> None:
    """Sum gradients in a process group of their own: NCCL runs the collectives of a group in turn, so that gathers of
    weights would wait for sums. For a model that is trained; has no effect before torch 2.13. Collective.

    torch would create the group with NCCL's timeout of ten minutes, less than the watchdog's limit. ``like``: a model
    whose group is used too, because another one would take about 1 GB of each GPU until the process ends.
    """
    enable = getattr(model, "set_separate_reduce_scatter_group", None)
    if enable is None or world.device.type != "cuda":
        return
    if is_fsdp_unit(model):
        mesh = _mesh_info(model)
        if is_fsdp_unit(like):
            mesh.reduce_scatter_process_group = _mesh_info(like).reduce_scatter_process_group
        else:
            ranks = distributed.get_process_group_ranks(mesh.shard_process_group)
            with world.connecting("connecting the group that sums gradients"):
                mesh.reduce_scatter_process_group = distributed.new_group(
                    ranks, timeout=world.timeout, use_local_synchronization=True, group_desc="sums of gradients"
                )
                check_group(mesh.reduce_scatter_process_group, world.device)
    enable()


def _mesh_info(model: FSDPModule) -> Any:
    return model._get_fsdp_state()._fsdp_param_groups[0].mesh_info


def check_initialised(model: nn.Module) -> None:
    """Raise RuntimeError unless every parameter and buffer has finite values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if local(tensor).is_meta or not bool(local(tensor).isfinite().all()):
            raise RuntimeError(f"{name} was never initialised, or has a value that is not finite")


def reshard(model: nn.Module) -> None:
    """Free the full weights that a forward pass without gradient leaves in memory: of the root unit, or of all units.

    Until then ``named_parameters`` returns full weights instead of the shards that optimiser and checkpoint need.
    """
    for unit in model.modules():
        if is_fsdp_unit(unit):
            unit.reshard()


def autocast(compute: schema.Compute, world: World) -> contextlib.AbstractContextManager[Any]:
    """A context with bf16 arithmetic over fp32 weights for an unsharded model in bf16; else a context without effect.

    A sharded model has bf16 weights while it computes, so gains, positions and embeddings are rounded differently. A
    single process avoids the copies of all weights that sharding makes in every step.
    """
    if compute.precision == "bf16" and world.size == 1:
        return torch.autocast(world.device.type, torch.bfloat16)
    return contextlib.nullcontext()


def replica_of(tensor: torch.Tensor) -> tuple[int, int]:
    """(number of the replica of its shard that this rank holds, count of replicas); (0, 1) if not replicated."""
    number = 0
    count = 1
    for i, placement in enumerate(getattr(tensor, "placements", ())):
        if placement.is_replicate():
            size = tensor.device_mesh.size(i)  # type: ignore[attr-defined]
            number = number * size + tensor.device_mesh.get_local_rank(i)  # type: ignore[attr-defined]
            count *= size
    return number, count


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor that may be sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def local_offsets(tensor: torch.Tensor) -> list[int]:
    """The index in the full tensor of the first element of this rank's shard, one number per dimension."""
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


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full value of a tensor that may be sharded. Collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def stop() -> None:
    """Leave the process group, if ``start`` has joined one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _is_single_host(size: int) -> bool:
    """Whether the launcher says that all ranks are on this host."""
    return os.environ.get("LOCAL_WORLD_SIZE") == str(size)


def _shard(model: nn.Module, compute: schema.Compute, mesh: DeviceMesh) -> None:
    """Shard in units that are gathered and freed together: each block, the rest of each tower, and the root.

    Only the full weights of one block are in memory at a time. With bf16 the weights of blocks and towers are gathered
    and multiplied in bf16; shards, sums of gradients over ranks and the optimiser stay fp32. Projections and the logit
    scale (and bias) are always fp32: they decide the precision of the loss. On CUDA the root unit has them all. On a
    CPU projections are units of their own: gloo adds a value in an order that depends on its place in the buffer, so
    that another unit changes the last bits of existing runs from three ranks on (measured).
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy()
    if compute.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    free = compute.reshard != "no"
    projections = nn.ModuleList()
    for tower in (model.image, model.text):
        for block in tower.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=free)
        projections.append(tower.projection)  # type: ignore[union-attr, arg-type]
        if compute.device != "cuda":
            fully_shard(tower.projection, mesh=mesh, reshard_after_forward=free)  # type: ignore[union-attr, arg-type]
        apart = set(tower.projection.parameters())  # type: ignore[union-attr]
        fully_shard(tower, mesh=mesh, mp_policy=policy, reshard_after_forward=free, ignored_params=apart)  # type: ignore[arg-type]
    if model.head is not None:  # always fp32
        fully_shard(model.head, mesh=mesh, reshard_after_forward=free)  # type: ignore[arg-type]
    # A unit takes the parameters of submodules, but not those below another unit: projections are below towers.
    model.projections = projections
    fully_shard(model, mesh=mesh)
    del model.projections
    for method in ("encode_image", "encode_text"):
        register_fsdp_forward_method(model, method)


def _mesh(world: World, replicas: int) -> DeviceMesh:
    """The mesh to shard over: all ranks, or ("copy", "shard") with neighbouring ranks for each copy of the weights."""
    if replicas == 1:
        return init_device_mesh(world.device.type, (world.size,))
    rows = torch.arange(world.size).view(replicas, -1)
    # Groups that the mesh creates have torch's default timeout, which may be shorter than a slow read.
    splits = "backend" in inspect.signature(distributed.split_group).parameters  # older torch would split gloo as NCCL
    groups: Any = []
    for kind, members in (("copies", rows.T.tolist()), ("shards", rows.tolist())):
        with world.connecting(f"connecting the groups of {kind} of the weights"):
            # one split of the communicator per dimension, instead of one per group
            if world.device.type == "cuda" and splits:
                group = distributed.split_group(split_ranks=members, timeout=world.timeout, backend="cuda:nccl")
            else:
                group = distributed.new_subgroups_by_enumeration(members, timeout=world.timeout)[0]
            check_group(group, world.device)
        groups.append(group)
    return DeviceMesh.from_group(groups, world.device.type, rows, mesh_dim_names=("copy", "shard"))
