"""Whether a run fits the memory of its devices and hosts, and the smallest change of its configuration that does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from flip import model_costs
from flip.common.host import Host
from flip.config.derived import at_world, for_stage, world_size, world_sizes
from flip.config.schema import Config, Stage
from flip.runs.checks import OK, UNKNOWN, Check
from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.text import size

GPU_MEMORY = "GPU memory"
MEMORY = "memory"
"""Names of the rows."""
LIBRARIES = 400_000_000  # bytes of a rank's interpreter and libraries on its host
MAX_NODE_FACTOR = 64  # of the nodes in a proposal
CONTEXT = 1_500_000_000
COMMUNICATOR = 1_000_000_000
"""Bytes of a GPU that CUDA and its libraries take, and each communicator of NCCL: assumed, from reports of 0.7 to
1.6 GB (github.com/NVIDIA/nccl, issues 864, 964, 1685); not measured here."""


def largest_stage(config: Config) -> tuple[Stage, dict[str, int]]:
    """The stage that needs the most device memory per rank, and its parts (``flip.model_costs.stage_memory``)."""
    rows = ((stage, model_costs.stage_memory(config, stage)) for stage in config.stages)
    return max(rows, key=lambda row: row[1]["total"])


def reserved_bytes(config: Config) -> int:
    """Bytes of a GPU that are not for tensors: of CUDA, and of NCCL's groups (``flip.distributed.parallel``)."""
    groups = 0
    if world_size(config) != 1:
        groups = 2 if config.compute.replicate == 1 else 4
    return CONTEXT + groups * COMMUNICATOR


def fits_gpu(config: Config, profile: ClusterProfile) -> bool:
    """Whether every stage fits a GPU; True if its memory is unknown."""
    needed = largest_stage(config)[1]["total"] + reserved_bytes(config)
    return not profile.gpu_bytes or needed <= profile.gpu_bytes


def fit_reshard(config: Config, profile: ClusterProfile) -> None:
    """Set ``compute.reshard`` to yes if the GPUs have no room for all full weights on a number of nodes of a range."""
    sizes = [at_world(config, ranks) for ranks in world_sizes(config)]
    if config.resources.gpus and not all(fits_gpu(each, profile) for each in sizes):
        config.compute.reshard = "yes"


def host_bytes(config: Config) -> int:
    """Bytes of host memory of the ranks of a node; without GPUs this includes the model."""
    loader = max(model_costs.loader_memory(config, stage) for stage in config.stages)
    model = 0
    if not config.resources.gpus:
        model = largest_stage(config)[1]["total"]
    return config.resources.processes * (LIBRARIES + loader + model_costs.checkpoint_memory(config) + model)


def check(config: Config, profile: ClusterProfile, on: Host) -> list[Check]:
    """Rows of device and host memory; ConfigError if the run cannot fit."""
    rows: list[Check] = []
    more_nodes = profile.kind != "local"
    stage, parts = largest_stage(config)
    needed = f"about {size(parts['total'])}"
    if config.resources.gpus and not profile.gpu_bytes:
        rows.append(
            Check(UNKNOWN, f"{needed} a GPU; the profile gives no memory (gpu, gpu_memory_gb)", name=GPU_MEMORY)
        )
    elif config.resources.gpus:
        room = f"{size(profile.gpu_bytes)}, less about {size(reserved_bytes(config))} for CUDA and NCCL"
        if not fits_gpu(config, profile):
            what = f"stage {stage.name} needs {needed} of a GPU that has {room}: {describe(parts)}"
            raise ConfigError(what, remedy=smallest_change(config, lambda other: fits_gpu(other, profile), more_nodes))
        rows.append(Check(OK, f"{needed} of {room}: {describe(parts)}", name=GPU_MEMORY))
    total = host_bytes(config)
    if profile.kind != "local" and not profile.memory_gb:  # ``on`` describes this machine, which refuses nothing there
        return [
            *rows,
            Check(UNKNOWN, f"about {size(total)} a node; the profile gives no memory (memory_gb)", name=MEMORY),
        ]
    if total > on.memory:
        what = f"about {size(total)} of memory are needed on a node that has {size(on.memory)}"
        remedy = smallest_change(config, lambda other: host_bytes(other) <= on.memory, more_nodes)
        loader = "Lower data.buffer or leave data.lanes out. "
        raise ConfigError(what, remedy=loader if config.resources.gpus else remedy)
    detail = ""
    if not config.resources.gpus:
        detail = f"; a rank's model {describe(parts)}"
    return [*rows, Check(OK, f"about {size(total)} of {size(on.memory)} a node{detail}", name=MEMORY)]


def describe(parts: dict[str, int]) -> str:
    """The parts of a device's memory in words, grouped, without small ones."""
    groups = {
        "weights": ("weights", "gathered", "bf16_weights"), "optimiser": ("moments",), "gradients": ("gradients",),
        "activations": ("image_activations", "text_activations", "temporary"), "loss": ("loss",), "batch": ("batch",),
        "classification head": ("head",),
    }  # fmt: skip
    sums = {name: sum(parts.get(part, 0) for part in members) for name, members in groups.items()}
    return ", ".join(f"{name} {size(count)}" for name, count in sums.items() if count > parts["total"] // 200)


def smallest_change(config: Config, fits: Callable[[Config], bool], nodes: bool = True) -> str:
    """The smallest change that fits, and the first of each other kind; changes of the science come last.

    ``nodes``: whether more nodes are available.
    """
    changes: list[str] = []
    kinds = (_recompute, _accumulate, _recompute_and_accumulate, _more_nodes, _smaller_batch)
    for kind in kinds:
        if (kind is _more_nodes and not nodes) or (kind is _recompute_and_accumulate and changes):
            continue
        first = next((description for description, other in kind(config) if fits(other)), "")
        if first:
            changes += [first]
    if not changes:
        return "No single change makes it fit: take a smaller model, or GPUs with more memory."
    others = ""
    if changes[1:]:
        others = f" Or: {'; '.join(changes[1:])}."
    return f"The smallest change that fits: {changes[0]}.{others}"


def _changed(config: Config, key: str, value: Any) -> tuple[str, Config]:
    """(KEY=VALUE, a copy of the configuration with it)."""
    other = copy.deepcopy(config)
    section, name = key.split(".")
    setattr(getattr(other, section), name, value)
    return f"{key}={value}", other


def _recompute(config: Config) -> Iterator[tuple[str, Config]]:
    """In the stage with the most memory alone, if there are several, or in all."""
    largest = largest_stage(config)[0]
    modes = "no", "selective", "block"
    for mode in modes[modes.index(for_stage(config, largest).compute.recompute) + 1 :]:
        if len(config.stages) > 1:
            other = copy.deepcopy(config)
            next(each for each in other.stages if each.name == largest.name).compute.recompute = mode
            yield f"stages.{largest.name}.compute.recompute={mode}", other
        yield _changed(config, "compute.recompute", mode)


def _accumulate(config: Config) -> Iterator[tuple[str, Config]]:
    ranks = world_size(config)
    batches = [stage.batch // ranks for stage in config.stages]
    for micro in range(config.compute.accumulate + 1, min(batches) + 1):
        if all(batch % micro == 0 for batch in batches):
            yield _changed(config, "compute.accumulate", micro)


def _recompute_and_accumulate(config: Config) -> Iterator[tuple[str, Config]]:
    for first, other in _recompute(config):
        for second, both in _accumulate(other):
            yield f"{first} with {second}", both


def _more_nodes(config: Config) -> Iterator[tuple[str, Config]]:
    factor = 2
    while factor <= MAX_NODE_FACTOR:
        description, other = _changed(config, "resources.nodes", config.resources.nodes * factor)
        if config.compute.device == "cuda" and config.compute.replicate == config.resources.nodes:
            other.compute.replicate = other.resources.nodes  # as ``auto`` resolves if this is submitted
        ranks = world_size(other)
        even = all(stage.batch % ranks == 0 for stage in other.stages) and other.data.lanes % ranks == 0
        if even and all(stage.batch // ranks % other.compute.accumulate == 0 for stage in other.stages):
            yield description, other
        factor *= 2


def _smaller_batch(config: Config) -> Iterator[tuple[str, Config]]:
    """Half the batch of every stage with the largest batch, and half again."""
    other = copy.deepcopy(config)
    unit = max(config.data.lanes, world_size(config) * config.compute.accumulate)
    while True:
        top = max(stage.batch for stage in other.stages)
        if top % 2 or (top // 2) % unit:
            return
        other = copy.deepcopy(other)
        for stage in other.stages:
            if stage.batch == top:
                stage.batch = top // 2
        changed = [(a, b) for a, b in zip(config.stages, other.stages, strict=True) if a.batch != b.batch]
        yield " and ".join(f"stages.{b.name}.batch={b.batch}" for a, b in changed), other
