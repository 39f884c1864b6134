"""What the fields of a resolved configuration must agree on; the numbers of its plan."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from functools import partial
from typing import Any

from flip.config.derived import (
    WEIGHT_TOLERANCE,
    DatasetLanes,
    buffer_bytes,
    dataset_lanes,
    kept_patches,
    kept_tokens,
    patches,
    stage_spans,
    weight_error,
    world_size,
)
from flip.config.schema import Config, Data, Stage
from flip.runs.errors import ConfigError

MAX_PATCHES = 2**15 - 1
"""Positions of patches are int16."""
_NEEDED = {"zeroshot": ("classes",), "retrieval": (), "probe": ("train",)}
"""What a member of evaluate.sets must name for its task, beside the manifest."""


LOWEST_LR, HIGHEST_LR = 1e-6, 0.02
"""Peak learning rates of AdamW outside of which a value is taken for a mistake; 0 is meant."""
DEFAULT_LR_BATCH = 1024
"""Batches for which the default of base_lr, the published one, gives a peak too low to learn (1.6e-5 and less)."""


_BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}
"""Rules of ``flip.config.schema.option`` -> test, words."""


def _values(section: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any], Any]]:
    """(dotted key, rules, value) of every field below a section; members of a list by their names or positions."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), prefix + field.name
        members = {key: value}
        if isinstance(value, list):
            members = {f"{key}.{getattr(member, 'name', '') or i}": member for i, member in enumerate(value)}
        for name, member in members.items():
            if dataclasses.is_dataclass(member):
                yield from _values(member, f"{name}.")
            else:
                yield name, field.metadata, member


def _interval(config: Config, key: str, low: float, high: float) -> None:
    """A pair of numbers, the smaller first, both above ``low`` and at most ``high``."""
    pair = getattr(config.augment, key.rpartition(".")[2])
    if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
        most = "" if high == math.inf else f", at most {high:g}"
        raise ConfigError(f"{key}: needs two numbers above {low:g}{most}, the smaller first", value=list(pair))


def _suggestion(config: Config, key: str) -> str:
    """A remedy where the field is of a stage that has nearly the name of another: the typing error made a stage."""
    section, _, name = key.rpartition(".")[0].partition(".")
    others = [stage.name for stage in config.stages if section == "stages" and stage.name != name]
    near = difflib.get_close_matches(name, others, n=1)
    return f"Did you mean stages.{near[0]}? A name that is not there makes a new stage." if near else ""


def check_fields(config: Config) -> None:
    """Raise ConfigError for the first field that is invalid whatever the other fields are. ``auto`` is allowed."""
    for key, rules, value in _values(config):
        choices = rules.get("choices")
        if choices and value not in choices:
            raise ConfigError(f"{key}: no such choice", value=value, remedy=f"One of: {', '.join(choices)}.")
        for rule, (holds, words) in _BOUNDS.items():
            if rule in rules and not holds(value, rules[rule]):
                what = f"{key}: must be {words} {rules[rule]}"
                raise ConfigError(what, value=value, remedy=_suggestion(config, key))
        if value == math.inf:
            raise ConfigError(f"{key}: must be finite", value=value)
    _interval(config, "augment.crop_area", 0, 1)
    _interval(config, "augment.crop_aspect", 0, math.inf)
    for key in ("mean", "std"):
        if len(getattr(config.augment, key)) != 3:
            raise ConfigError(f"augment.{key}: needs three numbers", value=list(getattr(config.augment, key)))
    if "://" in config.data.cache:
        raise ConfigError("data.cache: must be a folder on each node's own disk", value=config.data.cache)
    url = config.checkpoint.url
    if url and not url.startswith("/") and "://" not in url:
        raise ConfigError("checkpoint.url: must be a URL or a folder's absolute path", value=url)
    if not config.data.captions:
        raise ConfigError("data.captions: names no member", remedy="Example: [txt]")


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _near(number: int, divisor: int) -> str:
    """The multiples of ``divisor`` beside ``number``, as words."""
    below = number // divisor * divisor
    return " or ".join(str(n) for n in (below, below + divisor) if n)


def _unique(key: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", name):
            raise ConfigError(
                f"{key}: a name is made of letters, digits, _ and, after the first, -; at most 100", value=name
            )
        if name in seen:
            raise ConfigError(f"{key}: two have the same name", value=name, remedy="Rename one.")
        seen.add(name)


def _towers(config: Config) -> None:
    image, text = config.model.image, config.model.text
    if image.size % image.patch:
        remedy = f"Set model.image.size to {_near(image.size, image.patch)}, or another patch."
        raise ConfigError(f"model.image.patch: {image.patch} does not divide size {image.size}", remedy=remedy)
    for name, tower in (("image", image), ("text", text)):
        if tower.width % tower.heads:
            remedy = f"Set the width to {_near(tower.width, tower.heads)}, or another number of heads."
            what = f"model.{name}.heads: {tower.heads} heads do not divide width {tower.width}"
            raise ConfigError(what, remedy=remedy)
    if patches(image) > MAX_PATCHES:
        what = f"model.image.patch: {patches(image)} patches, positions are held for at most {MAX_PATCHES}"
        raise ConfigError(what, value=image.patch, remedy="Take a larger patch or a smaller image.")
    if image.width % 4:
        remedy = f"Set it to {_near(image.width, 4)}."
        raise ConfigError("model.image.width: sin-cos positions need a multiple of 4", value=image.width, remedy=remedy)


def _mask(key: str, mask: str, kept: Callable[[str], int], whole: str) -> None:
    if not 0 <= Fraction(mask) < 1:
        raise ConfigError(f"{key}: must be at least 0 and below 1", value=mask)
    if kept(mask) < 1:
        raise ConfigError(f"{key}: keeps none of {whole}", value=mask, remedy="Mask less.")


def _stages(config: Config) -> None:
    if not config.stages:
        raise ConfigError("stages: there is none", remedy="Give at least one with samples and batch.")
    _unique("stages", (stage.name for stage in config.stages))
    ranks = world_size(config)
    for stage in config.stages:
        key = f"stages.{stage.name}"
        image, text = config.model.image, config.model.text
        _mask(f"{key}.mask", stage.mask, partial(kept_patches, image), f"{patches(image)} patches")
        _mask(f"{key}.text_mask", stage.text_mask, partial(kept_tokens, text), f"{text.length} positions")
        if stage.batch % ranks:
            unit = config.data.lanes if config.data.lanes % ranks == 0 else ranks  # else the next check refuses it
            remedy = f"Set it to {_near(stage.batch, unit)}, or change resources.nodes or resources.processes."
            what = f"{key}.batch: {stage.batch} does not divide by {ranks} ranks"
            raise ConfigError(what, remedy=remedy)
        if stage.batch // ranks % config.compute.accumulate:
            what = f"compute.accumulate: it does not divide the {stage.batch // ranks} samples of a rank, {key}"
            raise ConfigError(what, value=config.compute.accumulate, remedy="Take a divisor.")
        if stage.warmup > stage.samples:
            remedy = "A warm-up ends within its stage."
            raise ConfigError(
                f"{key}.warmup: longer than its {stage.samples} samples", value=stage.warmup, remedy=remedy
            )


def _order(config: Config) -> None:
    data, ranks = config.data, world_size(config)
    for key in ("lanes", "samples", "buffer"):
        if getattr(data, key) < 1:
            raise ConfigError(f"data.{key}: is not resolved", value=getattr(data, key))
    if data.workers < 0:
        raise ConfigError("data.workers: is not resolved", value=data.workers)
    for stage in config.stages:
        if stage.batch % data.lanes:
            remedy = f"Set the batch to {_near(stage.batch, data.lanes)}, or leave data.lanes out."
            what = f"data.lanes: {data.lanes} lanes do not divide stages.{stage.name}.batch {stage.batch}"
            raise ConfigError(what, remedy=remedy)
    if data.lanes % ranks:
        remedy = f"Set it to {_near(data.lanes, ranks)}, or a world size out of {_divisors(data.lanes)}."
        raise ConfigError(f"data.lanes: {data.lanes} lanes do not divide by {ranks} ranks", remedy=remedy)
    for share in dataset_lanes(data):
        _room(config, share)
    if data.workers > data.lanes // ranks:
        remedy = f"Set it to at most {data.lanes // ranks}: a lane has one worker."
        what = f"data.workers: more than the {data.lanes // ranks} lanes of a rank"
        raise ConfigError(what, value=data.workers, remedy=remedy)


def _room(config: Config, share: DatasetLanes) -> None:
    """Two blocks of every lane fit into a pass."""
    data, lanes = config.data, len(share.lanes)
    key = f"data.sets.{share.name}." if share.name else "data."
    if share.chunk < 1:
        raise ConfigError(f"{key}chunk: is not resolved", value=share.chunk)
    chunks = share.samples // share.chunk
    if 2 * lanes * data.block > chunks:
        what = (
            f"{key}lanes: {lanes} lanes with blocks of {data.block} chunks need {2 * lanes * data.block} chunks,"
            f" the data set has {chunks} ({share.samples} samples in chunks of {share.chunk})"
        )
        fitting = chunks // (2 * lanes)
        remedy = f"Set data.block to {fitting}" if fitting else "Use fewer ranks or lanes"
        raise ConfigError(what, remedy=remedy + ", index the shards with a smaller --chunk, or bring more data.")


def _sets(config: Config) -> None:
    """The lanes of several data sets are those of the run, and keep the weights."""
    data = config.data
    _unique("data.sets", (one.name for one in data.sets))
    held, weights = [one.lanes for one in data.sets], [one.weight for one in data.sets]
    if not data.sets:
        return
    if min(held) < 1 or sum(held) != data.lanes:
        what = f"data.sets: they hold {' + '.join(map(str, held))} lanes, the run has {data.lanes}"
        raise ConfigError(what, remedy="Leave lanes out of data.sets; where a set got none, raise its weight or L.")
    if weight_error(held, weights) > WEIGHT_TOLERANCE:
        shown = ", ".join(f"{one.name} {one.lanes / data.lanes:.4g}" for one in data.sets)
        what = f"data.sets: {data.lanes} lanes give shares of {shown}, more than {WEIGHT_TOLERANCE:.0%} off the weights"
        remedy = "Set the weights to lanes, as 3 and 5 of 8, or take more lanes (they divide every batch)."
        raise ConfigError(what, value=weights, remedy=remedy)


def _init(config: Config) -> None:
    """An export is named alone. Where a run extends another, that one's S is between two steps of it."""
    init, key = config.init, f"init.samples: {config.init.samples}"
    if init.export and (init.run or init.stage or init.samples or init.extend):
        remedy = "It holds the weights of one commit and no moments; name a run to choose, or to extend."
        raise ConfigError("init.export: stands alone", value=init.export, remedy=remedy)
    if (init.run or init.export) and not init.commit:
        raise ConfigError("init.commit: is not resolved", value=init.run or init.export)
    if not init.extend:
        return
    if not init.run:
        raise ConfigError("init.extend: there is no init.run", remedy="Name the run that it extends.")
    span = next((span for span in stage_spans(config) if init.samples < span.end), None)
    if span is None:
        raise ConfigError(f"{key} is not before the end of the run", value=stage_spans(config)[-1].end)
    if (init.samples - span.start) % span.stage.batch or init.samples % config.data.lanes:
        what = f"{key} is no step of stage {span.stage.name}, which begins at S = {span.start}"
        remedy = "Let stages, batches and data.lanes be those of the other run as far as it came."
        raise ConfigError(what, value=span.stage.batch, remedy=remedy)
    if span.start < init.samples and span.stage.name != init.stage:
        remedy = "Give the stages the same names, lengths and order as far as it came."
        raise ConfigError(f"{key} lies in stage {span.stage.name}, there in {init.stage}", remedy=remedy)


def _compute(config: Config) -> None:
    compute, resources, ranks = config.compute, config.resources, world_size(config)
    if ranks % compute.replicate:
        remedy = f"Set it to one out of {_divisors(ranks)}; resources.nodes makes each copy that of one node."
        what = f"compute.replicate: {compute.replicate} copies of the weights do not divide {ranks} ranks"
        raise ConfigError(what, remedy=remedy)
    fields = {**vars(compute), "decoder": config.data.decoder, "resize": config.data.resize}
    for key, value in fields.items():
        if value in ("auto", 0):
            section = "compute" if hasattr(compute, key) else "data"
            raise ConfigError(f"{section}.{key}: is not resolved", value=value)
    if compute.device == "cuda" and resources.gpus == 0:
        raise ConfigError("compute.device: cuda, but resources.gpus is 0", remedy="Set resources.gpus.")
    if compute.device == "cuda" and resources.processes != resources.gpus:
        what = f"resources.processes: {resources.processes} ranks for {resources.gpus} GPUs of a node"
        raise ConfigError(what, remedy=f"One rank per GPU: set it to {resources.gpus}.")


def _buffer(data: Data) -> int:
    return sum(buffer_bytes(len(one.lanes), data.block, one.chunk, one.sample_bytes) for one in dataset_lanes(data))


def _notes(config: Config) -> list[str]:
    data, notes = config.data, []
    held = _buffer(data)
    if held > data.buffer:
        notes.append(
            f"the shuffle buffer holds {held / 1e9:.1f} GB, data.buffer is {data.buffer / 1e9:.1f} GB: take fewer lanes"
        )
    for span in stage_spans(config):
        extra = span.end - span.start - span.stage.samples
        if extra:
            notes.append(f"stage {span.stage.name} takes {extra} samples more, to the end of its last batch")
    if config.compute.device == "cpu" and config.resources.gpus:
        notes.append(f"{config.resources.gpus} GPUs a node are asked for, and compute.device is cpu")
    if not config.evaluate.sets:
        notes.append("no evaluation set is named: the run ends without an accuracy")
    return notes


def warnings(config: Config) -> list[str]:
    """What is possible but hardly meant in a resolved, valid configuration: learning rates and batches."""
    found = []
    for stage in config.stages:
        name, peak = f"stage {stage.name}", stage.base_lr * stage.batch / 256
        rate = f"the peak learning rate is {peak:.3g} (base_lr {stage.base_lr:g} * batch {stage.batch} / 256)"
        if stage.base_lr == Stage.base_lr and stage.batch < DEFAULT_LR_BATCH:
            what = f"base_lr is the default {stage.base_lr:g}, meant for batches of 16,384 or more"
            found.append(f"{name}: {what}: {rate}. Set stages.{stage.name}.base_lr")
        elif peak and not LOWEST_LR <= peak <= HIGHEST_LR:
            found.append(f"{name}: {rate}; usual are {LOWEST_LR:g} to {HIGHEST_LR:g}")
        if stage.batch > config.data.samples:
            what = f"a batch of {stage.batch} holds more pairs than the data set, {config.data.samples}"
            found.append(f"{name}: {what}: a pair is then its own negative. Lower the batch")
    return found


def validate(config: Config) -> list[str]:
    """Notes on a resolved configuration that can run; ConfigError with values and remedy for one that cannot."""
    check_fields(config)
    _towers(config)
    _stages(config)
    _sets(config)
    _order(config)
    _init(config)
    _compute(config)
    limit = 60 * config.monitor.hang_minutes
    if 0 < limit <= config.data.deadline:
        what = f"monitor.hang_minutes: a read may wait {config.data.deadline / 60:g} minutes (data.deadline)"
        raise ConfigError(what, value=config.monitor.hang_minutes, remedy="Set it to more, or lower data.deadline.")
    _unique("evaluate.sets", (dataset.name for dataset in config.evaluate.sets))
    for dataset in config.evaluate.sets:
        for key in ("manifest", *_NEEDED[dataset.task]):
            if not getattr(dataset, key):
                raise ConfigError(f"evaluate.sets.{dataset.name}.{key}: is not given")
    return _notes(config)


def plan_numbers(config: Config) -> dict[str, Any]:
    """The arithmetic of a resolved, valid configuration for people to read: plain JSON values.

    world; data: samples, block, lanes, workers, buffer and buffer_per_rank (bytes), passes (S / N at the end), and
    sets: name (empty: the only one), samples, chunk, lanes, passes;
    worlds: the world sizes that keep this order; stages: name, samples, batch, local_batch, mask, patches, kept,
    positions (of a caption, that a text mask leaves), steps, start, end, passes, warmup,
    lr (peak, base_lr * batch / 256).
    """
    data, ranks = config.data, world_size(config)
    held = _buffer(data)
    stages = [
        {
            "name": span.stage.name,
            "samples": span.stage.samples,
            "batch": span.stage.batch,
            "local_batch": span.stage.batch // ranks,
            "mask": span.stage.mask,
            "patches": patches(config.model.image),
            "kept": kept_patches(config.model.image, span.stage.mask),
            "positions": kept_tokens(config.model.text, span.stage.text_mask),
            "steps": span.steps,
            "start": span.start,
            "end": span.end,
            "passes": (span.end - span.start) / data.samples,
            "warmup": span.stage.warmup,
            "lr": span.stage.base_lr * span.stage.batch / 256,
        }
        for span in stage_spans(config)
    ]
    end = stage_spans(config)[-1].end
    return {
        "world": ranks,
        "worlds": _divisors(data.lanes),
        "data": {
            "samples": data.samples,
            "block": data.block,
            "lanes": data.lanes,
            "workers": data.workers,
            "buffer": held,
            "buffer_per_rank": -(-held // ranks),
            "passes": sum(stage["passes"] for stage in stages),
            "sets": [
                {
                    "name": one.name,
                    "samples": one.samples,
                    "chunk": one.chunk,
                    "lanes": len(one.lanes),
                    "passes": end * len(one.lanes) / data.lanes / one.samples,
                }
                for one in dataset_lanes(data)
            ],
        },
        "stages": stages,
    }
