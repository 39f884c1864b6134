"""Whether a run fits into its devices and hosts, and the smallest change of its configuration that does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from flip import costs
from flip.config.derived import world_size
from flip.config.host import Host
from flip.config.schema import Config, Stage
from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.text import size

LIBRARIES = 400_000_000
"""Bytes of a rank's interpreter and libraries on its host."""
MOST_NODES = 64
"""Times the nodes asked for, at most, in what is proposed."""


def largest(config: Config) -> tuple[Stage, dict[str, int]]:
    """The stage that needs most of a rank's device, and the parts of it (``flip.costs.stage_memory``)."""
    return max(((stage, costs.stage_memory(config, stage)) for stage in config.stages), key=lambda one: one[1]["total"])


def on_host(config: Config) -> int:
    """Bytes that the ranks of a node hold on their host; on a CPU the model is there too."""
    loader = max(costs.loader_memory(config, stage) for stage in config.stages)
    model = 0 if config.resources.gpus else largest(config)[1]["total"]
    return config.resources.processes * (LIBRARIES + loader + costs.checkpoint_memory(config) + model)


def check(config: Config, profile: ClusterProfile, on: Host) -> list[tuple[str, str, bool]]:
    """(name, what was seen, whether it could not be looked at) of device and host; ConfigError for what cannot fit."""
    found: list[tuple[str, str, bool]] = []
    card = profile.gpu_bytes if config.resources.gpus else 0
    stage, parts = largest(config)
    wants = f"about {size(parts['total'])}"
    if config.resources.gpus and not card:
        what = f"{wants} a GPU; the profile does not say what a card has (gpu, gpu_memory_gb)"
        found.append(("GPU memory", what, True))
    elif config.resources.gpus:
        if parts["total"] > card:
            what = f"stage {stage.name} needs {wants} of a GPU that has {size(card)}: {said(parts)}"
            raise ConfigError(
                what, remedy=advise(config, lambda one: largest(one)[1]["total"] <= card, profile.kind != "local")
            )
        found.append(("GPU memory", f"{wants} of {size(card)}: {said(parts)}", False))
    needed = on_host(config)
    if profile.kind != "local" and not profile.memory_gb:  # ``on`` has what this machine has: it refuses nothing there
        what = f"about {size(needed)} a node; the profile does not say what one has (memory_gb)"
        return [*found, ("memory", what, True)]
    if needed > on.memory:
        what = f"about {size(needed)} of memory are needed on a node that has {size(on.memory)}"
        loader = "Lower data.buffer or leave data.lanes out. "
        remedy = advise(config, lambda one: on_host(one) <= on.memory, profile.kind != "local")
        raise ConfigError(what, remedy=loader if config.resources.gpus else remedy)
    detail = "" if config.resources.gpus else f"; a rank's model {said(parts)}"
    return [*found, ("memory", f"about {size(needed)} of {size(on.memory)} a node{detail}", False)]


def said(parts: dict[str, int]) -> str:
    """The parts of a device's memory in words, in groups, those of note."""
    groups = {
        "weights": ("weights", "gathered", "bf16_weights"), "optimiser": ("moments",), "gradients": ("gradients",),
        "activations": ("image_activations", "text_activations", "temporary"), "loss": ("loss",), "batch": ("batch",),
    }  # fmt: skip
    sums = {name: sum(parts.get(part, 0) for part in members) for name, members in groups.items()}
    return ", ".join(f"{name} {size(count)}" for name, count in sums.items() if count > parts["total"] // 200)


def advise(config: Config, fits: Callable[[Config], bool], nodes: bool = True) -> str:
    """The smallest change that fits, and the first of each other kind, from what moves least to what moves science.

    ``nodes``: whether more of them can be had.
    """
    found: list[str] = []
    for kind in (_waited, _recomputed, _accumulated, _both, *([_spread] if nodes else []), _smaller):
        change = next((words for words, one in kind(config) if fits(one)), None)
        if change and not (kind is _both and found):
            found.append(change)
    if not found:
        return "No single change makes it fit: take a smaller model, or cards with more memory."
    others = f" Or: {'; '.join(found[1:])}." if found[1:] else ""
    return f"The smallest change that fits: {found[0]}.{others}"


def _waited(config: Config) -> Iterator[tuple[str, Config]]:
    if config.checkpoint.background == "yes" and config.compute.device != "cuda":  # there it saves nothing
        one = copy.deepcopy(config)
        one.checkpoint.background = "no"
        yield "checkpoint.background=no", one


def _recomputed(config: Config) -> Iterator[tuple[str, Config]]:
    ways = ("no", "selective", "block")
    for way in ways[ways.index(config.compute.recompute) + 1 :]:
        one = copy.deepcopy(config)
        one.compute.recompute = way
        yield f"compute.recompute={way}", one


def _accumulated(config: Config) -> Iterator[tuple[str, Config]]:
    ranks = world_size(config)
    locals = [stage.batch // ranks for stage in config.stages]
    for micro in range(config.compute.accumulate + 1, min(locals) + 1):
        if all(local % micro == 0 for local in locals):
            one = copy.deepcopy(config)
            one.compute.accumulate = micro
            yield f"compute.accumulate={micro}", one


def _both(config: Config) -> Iterator[tuple[str, Config]]:
    for first, one in _recomputed(config):
        for second, other in _accumulated(one):
            yield f"{first} with {second}", other


def _spread(config: Config) -> Iterator[tuple[str, Config]]:
    times = 2
    while times <= MOST_NODES:
        one = copy.deepcopy(config)
        one.resources.nodes *= times
        ranks = world_size(one)
        fair = all(stage.batch % ranks == 0 for stage in one.stages) and one.data.lanes % ranks == 0
        if fair and all(stage.batch // ranks % one.compute.accumulate == 0 for stage in one.stages):
            yield f"resources.nodes={one.resources.nodes}", one
        times *= 2


def _smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """Half the batch of every stage that is as large as the largest, and half again."""
    one = copy.deepcopy(config)
    unit = max(config.data.lanes, world_size(config) * config.compute.accumulate)
    while True:
        top = max(stage.batch for stage in one.stages)
        if top % 2 or (top // 2) % unit:
            return
        one = copy.deepcopy(one)
        for stage in one.stages:
            stage.batch = top // 2 if stage.batch == top else stage.batch
        changed = [(a, b) for a, b in zip(config.stages, one.stages, strict=True) if a.batch != b.batch]
        yield " and ".join(f"stages.{b.name}.batch={b.batch}" for a, b in changed), one
