"""Quantities derived from a configuration: stages, ranks, patches, lanes, the shuffle buffer, the name of a model.

docs/contracts.md defines them. S, the number of samples seen, continues from stage to stage.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any, NamedTuple

from flip.config.schema import MODEL_PRESETS, Config, Data, ImageTower, Model, Stage, TextTower
from flip.runs.errors import ConfigError

WEIGHT_TOLERANCE = 0.01
"""Largest relative difference between a data set's share of the lanes and its share of the weights."""
BUFFER_OVERHEAD = 1.5
"""Bytes held per byte of raw sample in the shuffle buffer: the next block is fetched while one is read."""
MAX_TARGETS = 77
"""Most tokens of a caption that are classified, as many as CLIP's texts have."""
MAX_LABEL_FIELDS = 3
"""Most fields that the label of a model lists."""
_RANK_REMEDY = "Pass rank and world of this process: ranks count from 0."


@dataclass(frozen=True)
class StageSpan:
    """One stage on the axis of samples seen: from S = ``start`` to S = ``end`` in ``steps`` steps."""

    stage: Stage
    start: int
    end: int
    steps: int


def stage_spans(config: Config) -> list[StageSpan]:
    """The stages in order. steps = ceil(samples / batch), end = start + steps * batch: every step is complete."""
    result: list[StageSpan] = []
    start = 0
    for stage in config.stages:
        steps = -(-stage.samples // stage.batch)
        result.append(StageSpan(stage, start, start + steps * stage.batch, steps))
        start = result[-1].end
    return result


def for_stage(config: Config, stage: Stage) -> Config:
    """The configuration with the overrides of one of its stages: image size, patch, text length, augmentation and
    ``recompute``."""
    model = config.model
    model = replace(model, image=_override(model.image, stage.image), text=_override(model.text, stage.text))
    augment = _override(config.augment, stage.augment)
    compute = _override(config.compute, stage.compute)
    return replace(config, model=model, augment=augment, compute=compute)


def _override(section: Any, overrides: Any) -> Any:
    """A copy of a section with the fields of ``overrides`` (``schema.overrides``) that are not None."""
    given = {field.name: getattr(overrides, field.name) for field in fields(overrides)}
    return replace(section, **{name: value for name, value in given.items() if value is not None})


def weights_config(config: Config, stage: str) -> Config:
    """``for_stage`` for the stage of this name, whose weights are used; ``config`` itself if there is no such stage."""
    return next((for_stage(config, own) for own in config.stages if own.name == stage), config)


def stage_at(config: Config, samples_seen: int) -> Stage:
    """The stage that has trained the weights at S = ``samples_seen``: at a border the earlier one, for S = 0 the first.

    Beyond the end of the run it is the last stage.
    """
    return next((span.stage for span in stage_spans(config) if samples_seen <= span.end), config.stages[-1])


def world_size(config: Config) -> int:
    """W, the number of ranks; of a range of nodes, on all of them."""
    return config.resources.nodes * config.resources.processes


def usable_nodes(config: Config) -> list[int]:
    """Numbers of nodes on which a run can train, ascending: of a range those whose ranks divide the lanes."""
    resources = config.resources
    smaller = range(resources.least_nodes or resources.nodes, resources.nodes)
    return [nodes for nodes in smaller if _divides(config, nodes)] + [resources.nodes]


def _divides(config: Config, nodes: int) -> bool:
    ranks = nodes * config.resources.processes
    return config.data.lanes % ranks == 0 and ranks % _replicate(config, nodes) == 0


def _replicate(config: Config, nodes: int) -> int:
    """Copies of the weights: one per node if the configuration has as many as nodes."""
    if config.compute.replicate == config.resources.nodes:
        return nodes
    return config.compute.replicate


def world_sizes(config: Config) -> list[int]:
    """W of each number of ``usable_nodes``."""
    return [nodes * config.resources.processes for nodes in usable_nodes(config)]


def at_world(config: Config, ranks: int) -> Config:
    """The configuration on another world size of its range: with its number of nodes, without the range.

    The batch, and so order and learning rate, stay. ``accumulate`` grows, so that a rank computes no more samples at
    once than on all nodes. Raises ConfigError if the run cannot train on so many ranks.
    """
    if not config.resources.least_nodes:
        return config
    if ranks not in world_sizes(config):
        what = f"resources.nodes: {ranks} ranks were started"
        raise ConfigError(what, remedy=f"The range permits {', '.join(map(str, world_sizes(config)))}.")
    nodes = ranks // config.resources.processes
    resources = replace(config.resources, nodes=nodes, least_nodes=0)
    compute = replace(config.compute, accumulate=_accumulate(config, ranks), replicate=_replicate(config, nodes))
    return replace(config, resources=resources, compute=compute)


def _accumulate(config: Config, ranks: int) -> int:
    """The fewest micro-batches of equal length that are no longer than on all nodes."""
    local = math.gcd(*(stage.batch for stage in config.stages)) // ranks
    least = -(-config.compute.accumulate * world_size(config) // ranks)
    return next(count for count in range(least, local + 1) if local % count == 0)


def patches(image: ImageTower) -> int:
    """P, the number of patches of an image."""
    return (image.size // image.patch) ** 2


def visible_patch_count(image: ImageTower, mask: str) -> int:
    """K = floor(P * (1 - mask)), the number of patches that a mask ratio leaves visible, in exact arithmetic."""
    return int(patches(image) * (1 - Fraction(mask)))


def target_count(stage: Stage) -> int:
    """Positions of the distinct tokens of a caption that a stage classifies, of all of the caption; 0: none."""
    return MAX_TARGETS if stage.classification else 0


def visible_token_count(text: TextTower, mask: str) -> int:
    """floor(T * (1 - mask)), the number of caption positions that a text mask leaves visible, in exact arithmetic."""
    return int(text.length * (1 - Fraction(mask)))


class DatasetLanes(NamedTuple):
    """One data set of a resolved configuration."""

    name: str
    """``""`` for the only data set of a configuration without ``data.sets``."""
    manifest: str
    dataset_size: int
    """N of this set, samples."""
    chunk: int
    """R of this set."""
    sample_bytes: int
    lanes: range
    """The lanes of this set: a contiguous part of the L lanes of the run."""


def dataset_lanes(data: Data) -> list[DatasetLanes]:
    """The data sets in order; if ``data.sets`` is empty, the one that ``data`` itself names."""
    if not data.sets:
        return [DatasetLanes("", data.manifest, data.samples, data.chunk, data.sample_bytes, range(data.lanes))]
    result = list[DatasetLanes]()
    first = 0
    for dataset in data.sets:
        lanes = range(first, first + dataset.lanes)
        result.append(
            DatasetLanes(dataset.name, dataset.manifest, dataset.samples, dataset.chunk, dataset.sample_bytes, lanes)
        )
        first = lanes.stop
    return result


def rank_lanes(lanes: int, rank: int, world: int) -> range:
    """The lanes of one of ``world`` ranks: rL/W .. (r+1)L/W - 1. Raises ConfigError if these numbers do not fit."""
    if not 0 <= rank < world:
        raise ConfigError(f"must be from 0 to {world - 1}, as there are {world} ranks", "rank", rank, _RANK_REMEDY)
    if lanes < 1 or lanes % world:
        what = f"the number of lanes must be a multiple of the {world} ranks"
        remedy = "Use a number of ranks that divides it, or choose the lanes: others give another order."
        raise ConfigError(what, "data.lanes", lanes, remedy)
    return range(rank * lanes // world, (rank + 1) * lanes // world)


def check_position(start: int, batch: int, lanes: int) -> None:
    """Raise ConfigError unless lanes have equal shares of the global batches of B = ``batch`` from S = ``start`` on."""
    if batch < lanes or batch % lanes:
        what = f"must be a multiple of the {lanes} lanes"
        raise ConfigError(what, "batch", batch, "Set it to one, or set lanes to a divisor of the batch.")
    if start < 0 or start % lanes:
        what = f"S, the number of samples seen, must be a multiple of the {lanes} lanes"
        raise ConfigError(what, "start", start, "Give samples_seen of a batch, and the lanes of that order.")


def allocate_lanes(lanes: int, weights: Sequence[float]) -> list[int]:
    """Divide ``lanes`` among data sets in proportion to their weights (largest remainders are rounded up)."""
    exact = [lanes * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda s: (counts[s] - exact[s], s))
    for s in by_remainder[: lanes - sum(counts)]:
        counts[s] += 1
    return counts


def weight_error(lanes: Sequence[int], weights: Sequence[float]) -> float:
    """The largest relative difference between a set's share of the lanes and its share of the weights."""
    parts = zip(lanes, weights, strict=True)
    return max(abs(count / sum(lanes) / (weight / sum(weights)) - 1) for count, weight in parts)


def buffer_bytes(lanes: int, block: int, chunk: int, mean_bytes: float) -> int:
    """Bytes of raw samples that all ranks together hold for shuffling.

    Args:
        lanes: L, of the data set.
        block: Q, chunks per block of a lane.
        chunk: R, samples per chunk.
        mean_bytes: mean bytes of a sample.
    """
    return math.ceil(lanes * block * chunk * mean_bytes * BUFFER_OVERHEAD)


def missing_in_transformers(model: Model) -> list[str]:
    """Features of a model that CLIPModel of transformers lacks, each with its field; empty if it can hold the model."""
    image = model.image
    text = model.text
    lacks = {
        f"pooling of image tokens by their mean (model.image.pool: {image.pool})": image.pool != "class",
        "an image encoder without LayerNorm before its blocks (model.image.norm_pre: false)": not image.norm_pre,
        "a text encoder that attends to later tokens (model.text.causal: false)": not text.causal,
        "a logit bias (model.objective: siglip)": model.objective == "siglip",
    }
    return [feature for feature, applies in lacks.items() if applies]


def model_label(settings: Mapping[str, Any]) -> str | None:
    """The name of a model: its size, and the fields that differ from that size. None if there is no ``model.size``.

    ``settings``: dotted key -> value, as returned by ``flip.config.identity.flatten``.
    """
    size = settings.get("model.size")
    changed = []
    for section, value in MODEL_PRESETS.get(size or "", {}).items():
        if section == "embed":
            preset = {section: value}
        else:
            preset = {f"{section}.{name}": item for name, item in value.items()}
        changed += [key for key, item in preset.items() if settings.get(f"model.{key}", item) != item]
    if len(changed) > MAX_LABEL_FIELDS:
        return "custom size"
    if changed:
        return f"{size} with " + ", ".join(f"{key} {settings.get(f'model.{key}')}" for key in changed)
    return size
