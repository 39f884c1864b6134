"""Checks of a configuration: each field by its rules, then what fields must agree on. The numbers of its plan."""

import math
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from typing import Any

from flip.common.option import why_invalid
from flip.config import callback_names
from flip.config.derived import (
    WEIGHT_TOLERANCE,
    DatasetLanes,
    buffer_bytes,
    dataset_lanes,
    for_stage,
    patches,
    stage_spans,
    usable_nodes,
    visible_patch_count,
    visible_token_count,
    weight_error,
    world_size,
)
from flip.config.schema import Augment, Config, Data, ImageTower, Stage, walk_fields
from flip.runs import addresses
from flip.runs.checks import Rule, require
from flip.runs.errors import ConfigError, nearest

MAX_PATCHES = 2**15 - 1
"""Patch positions are int16."""
_NEEDED = {"zeroshot": ("classes",), "retrieval": (), "probe": ("train",)}
"""Fields that a member of evaluate.sets needs for its task, in addition to the manifest."""
_SOURCES = {
    "manifest": "Name the manifest of its images, which `flip shards index` writes.",
    "classes": "Name its classes.json, which `flip shards make` or `flip prompts` writes.",
    "train": "Name the manifest of its training images, which `flip shards index` writes.",
}
"""Remedy if such a field is empty."""


LOWEST_LR = 1e-6
HIGHEST_LR = 0.02
"""Peak learning rates of AdamW outside this range are probably mistakes, except 0."""
DEFAULT_LR_BATCH = 1024
"""For smaller batches the default of base_lr, the published one, gives a peak too low to learn (1.6e-5 or less)."""


def check_fields(config: Config) -> None:
    """Raise ConfigError for the first field that is invalid whatever the other fields are. ``auto`` is allowed."""
    for key, _, field, value in walk_fields(config):
        if value is None:
            continue
        what, remedy = why_invalid(value, field.metadata)
        if what:
            raise ConfigError(f"{key}: {what}", value=value, remedy=remedy or _suggestion(config, key))
        if value == math.inf:
            raise ConfigError(f"{key}: must be finite", value=value)
    _check_augment("augment", config.augment)
    for stage in config.stages:
        _check_augment(f"stages.{stage.name}.augment", stage.augment)
    reason = config.checkpoint.url and addresses.why_refused(config.checkpoint.url)
    if reason:
        what = f"checkpoint.url: is no address of a storage: {reason}"
        raise ConfigError(what, value=config.checkpoint.url, remedy=addresses.admitted_forms(addresses.CHECKPOINTS))
    if not config.data.captions:
        raise ConfigError("data.captions: names no member", remedy="Example: [txt]")
    weights = config.data.caption_weights
    if weights and len(weights) != len(config.data.captions):
        remedy = "Give a weight for each of data.captions, as in {txt: 1, json:synthetic: 3}, or none."
        raise ConfigError("data.caption_weights: as many as data.captions are needed", value=weights, remedy=remedy)
    names = config.data.fields
    if "" in names or len(set(names)) < len(names):
        raise ConfigError("data.fields: needs names, each once", value=names, remedy="Example: [similarity]")


def _check_augment(key: str, augment: Augment) -> None:
    """Check the lists of an ``augment`` section; those of a stage may be None."""
    for name, most in (("crop_area", 1.0), ("crop_aspect", math.inf)):
        pair = getattr(augment, name)
        if pair is not None and not (len(pair) == 2 and 0 < pair[0] <= pair[1] <= most):
            limit = "" if most == math.inf else f", at most {most:g}"
            raise ConfigError(f"{key}.{name}: needs two numbers above 0{limit}, the smaller first", value=list(pair))
    for name in ("mean", "std"):
        values = getattr(augment, name)
        if values is not None and len(values) != 3:
            raise ConfigError(f"{key}.{name}: needs three numbers", value=list(values))


def _suggestion(config: Config, key: str) -> str:
    """A remedy if the field belongs to a stage whose name is similar to another: a typing error adds a stage."""
    section, _, name = key.rpartition(".")[0].partition(".")
    others = [stage.name for stage in config.stages if section == "stages" and stage.name != name]
    near = nearest(name, others)
    if near:
        return f"Did you mean stages.{near[0]}? An unknown name adds a new stage."
    return ""


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _nearest_multiples(number: int, divisor: int) -> str:
    """The multiples of ``divisor`` next to ``number``, as words."""
    below = number // divisor * divisor
    return " or ".join(str(n) for n in (below, below + divisor) if n)


def _check_names(key: str, names: Iterable[str]) -> None:
    """Check that the names of a list's members are valid and unique."""
    earlier: set[str] = set()
    for name in names:
        if not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", name):
            what = f"{key}: a name has 1 to 100 letters, digits, _ and -, and does not start with -"
            raise ConfigError(what, value=name)
        if name in earlier:
            raise ConfigError(f"{key}: two have the same name", value=name, remedy="Rename one of them.")
        earlier.add(name)


def _check_towers(config: Config) -> None:
    image = config.model.image
    text = config.model.text
    _check_image("model.image", image)
    for name, tower in (("image", image), ("text", text)):
        if tower.width % tower.heads:
            remedy = f"Set the width to {_nearest_multiples(tower.width, tower.heads)}, or another number of heads."
            what = f"model.{name}.heads: {tower.heads} heads do not divide width {tower.width}"
            raise ConfigError(what, remedy=remedy)
    if image.tower == ImageTower.tower:
        lacking = {"registers": image.registers, "qk_norm": image.qk_norm, "pool": image.pool == "attention"}
        for key, is_set in lacking.items():
            if is_set:
                what = f"model.image.{key}: no setting of this tower"
                raise ConfigError(what, value=getattr(image, key), remedy="Set model.image.tower: timm.")
    scale = 1 / config.model.temperature
    most = config.model.max_logit_scale
    if not 1 <= scale <= most:
        remedy = f"Take one from {1 / most:g} to 1: outside, the scale has no gradient and is never learned."
        raise ConfigError("model.temperature: out of the range of the logit scale", value=1 / scale, remedy=remedy)
    if image.width % 4 and image.positions == "sincos":
        remedy = f"Set it to {_nearest_multiples(image.width, 4)}."
        raise ConfigError("model.image.width: sin-cos positions need a multiple of 4", value=image.width, remedy=remedy)


def _check_image(key: str, image: ImageTower) -> None:
    """Check the grid of patches. ``key``: the section that sets it, of the model or of a stage."""
    if image.size % image.patch:
        remedy = f"Set {key}.size to {_nearest_multiples(image.size, image.patch)}, or another patch."
        raise ConfigError(f"{key}.patch: {image.patch} does not divide size {image.size}", remedy=remedy)
    if patches(image) > MAX_PATCHES:
        what = f"{key}.patch: {patches(image)} patches, at most {MAX_PATCHES} are supported"
        raise ConfigError(what, value=image.patch, remedy="Take a larger patch or a smaller image.")


def _check_mask(key: str, mask: str, remaining: Callable[[str], int], total: str) -> None:
    if not 0 <= Fraction(mask) < 1:
        raise ConfigError(f"{key}: must be at least 0 and below 1", value=mask, remedy="Example: 0.5")
    if remaining(mask) < 1:
        raise ConfigError(f"{key}: keeps none of {total}", value=mask, remedy="Mask less.")


def _check_stages(config: Config) -> None:
    if not config.stages:
        raise ConfigError("stages: none is given", remedy="Give at least one with samples and batch.")
    _check_names("stages", (stage.name for stage in config.stages))
    ranks = world_size(config)
    for stage in config.stages:
        key = f"stages.{stage.name}"
        model = for_stage(config, stage).model
        image = model.image
        text = model.text
        _check_image(f"{key}.image", image)
        _check_mask(f"{key}.mask", stage.mask, partial(visible_patch_count, image), f"{patches(image)} patches")
        _check_mask(f"{key}.text_mask", stage.text_mask, partial(visible_token_count, text), f"{text.length} positions")
        _check_locked(key, stage, config.optim.name)
        if stage.classification and not config.data.token_table:
            what = f"{key}.classification: needs the counts of tokens, but data.token_table is not given"
            remedy = "Make it: flip tokenizer table TOKENIZER --captions MANIFEST --out FILE."
            raise ConfigError(what, value=stage.classification, remedy=remedy)
        if stage.batch % ranks:
            # else _check_order refuses it
            if config.data.lanes % ranks == 0:
                unit = config.data.lanes
            else:
                unit = ranks
            remedy = (
                f"Set it to {_nearest_multiples(stage.batch, unit)}, or change resources.nodes or resources.processes."
            )
            what = f"{key}.batch: {stage.batch} does not divide by {ranks} ranks"
            raise ConfigError(what, remedy=remedy)
        if stage.batch // ranks % config.compute.accumulate:
            what = f"compute.accumulate: it does not divide the {stage.batch // ranks} samples of a rank, {key}"
            raise ConfigError(what, value=config.compute.accumulate, remedy="Take a divisor.")
        if stage.warmup > stage.samples:
            what = f"{key}.warmup: longer than the {stage.samples} samples of its stage"
            raise ConfigError(what, value=stage.warmup, remedy="Shorten it.")
        if bool(stage.cooldown) != (stage.schedule == "wsd"):
            what = f"{key}.cooldown: schedule {stage.schedule}"
            remedy = "Set schedule: wsd and cooldown together."
            raise ConfigError(what, value=stage.cooldown, remedy=remedy)
        if stage.warmup + stage.cooldown > stage.samples:
            what = f"{key}.cooldown: with the warm-up of {stage.warmup} longer than the {stage.samples} samples"
            raise ConfigError(what, value=stage.cooldown, remedy="Shorten it.")


def _check_locked(key: str, stage: Stage, optimizer: str) -> None:
    """Check that ``locked`` names each tower once and leaves something that the optimiser trains."""
    if len(set(stage.locked)) < len(stage.locked):
        raise ConfigError(f"{key}.locked: names a tower twice", value=stage.locked, remedy="Name each tower once.")
    if optimizer == "muon" and len(stage.locked) == 2:
        what = f"{key}.locked: leaves no matrix of a block that optim.name muon could train"
        raise ConfigError(what, value=stage.locked, remedy="Set optim.name to adamw, or lock one tower.")


def _check_order(config: Config) -> None:
    data = config.data
    ranks = world_size(config)
    for stage in config.stages:
        if stage.batch % data.lanes:
            remedy = f"Set the batch to {_nearest_multiples(stage.batch, data.lanes)}, or leave data.lanes out."
            what = f"data.lanes: {data.lanes} lanes do not divide stages.{stage.name}.batch {stage.batch}"
            raise ConfigError(what, remedy=remedy)
    if data.lanes % ranks:
        remedy = (
            f"Set it to {_nearest_multiples(data.lanes, ranks)}, or the world size to one of {_divisors(data.lanes)}."
        )
        raise ConfigError(f"data.lanes: {data.lanes} lanes do not divide by {ranks} ranks", remedy=remedy)
    for part in dataset_lanes(data):
        _check_data_size(config, part)
    if data.workers > data.lanes // ranks:
        remedy = f"Set it to at most {data.lanes // ranks}: each lane is read by one worker."
        what = f"data.workers: more than the {data.lanes // ranks} lanes of a rank"
        raise ConfigError(what, value=data.workers, remedy=remedy)


def _check_data_size(config: Config, part: DatasetLanes) -> None:
    """Check that a pass over a data set has two blocks for each of its lanes."""
    data = config.data
    lanes = len(part.lanes)
    key = f"data.sets.{part.name}." if part.name else "data."
    if part.chunk < 1:
        raise ConfigError(f"{key}chunk: is not resolved", value=part.chunk)
    chunks = part.dataset_size // part.chunk
    if 2 * lanes * data.block > chunks:
        what = (
            f"{key}lanes: {lanes} lanes with blocks of {data.block} chunks need {2 * lanes * data.block} chunks,"
            f" the data set has {chunks} ({part.dataset_size} samples in chunks of {part.chunk})"
        )
        fitting = chunks // (2 * lanes)
        if fitting:
            remedy = f"Set data.block to {fitting}"
        else:
            remedy = "Use fewer ranks or lanes"
        raise ConfigError(what, remedy=remedy + ", index the shards with a smaller --chunk, or bring more data.")


def _check_datasets(config: Config) -> None:
    """Check that the lanes of several data sets add up to those of the run and match the weights."""
    data = config.data
    _check_names("data.sets", (dataset.name for dataset in data.sets))
    lanes = [dataset.lanes for dataset in data.sets]
    weights = [dataset.weight for dataset in data.sets]
    if not data.sets:
        return
    if data.weights:
        remedy = "Index all shards into one manifest (flip shards index --add), or leave data.weights out."
        raise ConfigError("data.weights: several data sets (data.sets) have none", value=data.weights, remedy=remedy)
    if min(lanes) < 1 or sum(lanes) != data.lanes:
        what = f"data.sets: they have {' + '.join(map(str, lanes))} lanes, the run has {data.lanes}"
        raise ConfigError(
            what, remedy="Leave lanes out of data.sets; if a set got none, raise its weight or data.lanes."
        )
    if weight_error(lanes, weights) > WEIGHT_TOLERANCE:
        shown = ", ".join(f"{dataset.name} {dataset.lanes / data.lanes:.4g}" for dataset in data.sets)
        what = f"data.sets: {data.lanes} lanes give shares of {shown}, more than {WEIGHT_TOLERANCE:.0%} off the weights"
        remedy = "Set weights that match lanes, such as 3 and 5 of 8, or use more lanes (they divide every batch)."
        raise ConfigError(what, value=weights, remedy=remedy)


def _check_init(config: Config) -> None:
    """Check that an export is given alone, and that an extended run's S is between two steps of this run."""
    init = config.init
    key = f"init.samples: {config.init.samples}"
    if init.export and (init.run or init.stage or init.samples or init.extend):
        remedy = (
            "It has the weights of one checkpoint and no moments; to choose a checkpoint or to extend, give init.run."
        )
        raise ConfigError("init.export: excludes the other fields of init", value=init.export, remedy=remedy)
    if (init.run or init.export) and not init.commit:
        raise ConfigError("init.commit: is not resolved", value=init.run or init.export)
    if (init.stage or init.samples or init.extend) and not init.run:  # else it would train from scratch
        what = "init.run: is not given, but init.stage, init.samples or init.extend is"
        raise ConfigError(what, remedy="Name the run to start from.")
    if not init.extend:
        return
    span = next((span for span in stage_spans(config) if init.samples < span.end), None)
    if span is None:
        raise ConfigError(f"{key} is not before the end of the run", value=stage_spans(config)[-1].end)
    if (init.samples - span.start) % span.stage.batch or init.samples % config.data.lanes:
        what = f"{key} is not a step of stage {span.stage.name}, which starts at S = {span.start}"
        remedy = "Use the stages, batches and data.lanes of the other run up to this point."
        raise ConfigError(what, value=span.stage.batch, remedy=remedy)
    if span.start < init.samples and span.stage.name != init.stage:
        remedy = "Give the stages the same names, lengths and order up to this point."
        raise ConfigError(f"{key} is in stage {span.stage.name}, but in {init.stage} of the other run", remedy=remedy)


def _check_keep_at(config: Config) -> None:
    """Check that each S of ``checkpoint.keep_at`` is the end of a step."""
    for samples in config.checkpoint.keep_at:
        span = next((span for span in stage_spans(config) if span.start < samples <= span.end), None)
        if span is None:
            raise ConfigError("checkpoint.keep_at: is after the end of the run", value=samples)
        if (samples - span.start) % span.stage.batch:
            near = _nearest_multiples(samples - span.start, span.stage.batch)
            start = ""
            if span.start:
                start = f", counted from its start at S = {span.start}"
            what = f"checkpoint.keep_at: no step of stage {span.stage.name} ends there"
            raise ConfigError(what, value=samples, remedy=f"Set it to {near}{start}.")


def _check_compute(config: Config) -> None:
    compute = config.compute
    resources = config.resources
    ranks = world_size(config)
    if ranks % compute.replicate:
        remedy = f"Set it to one of {_divisors(ranks)}; with the value of resources.nodes each node has one copy."
        what = f"compute.replicate: {compute.replicate} copies of the weights do not divide {ranks} ranks"
        raise ConfigError(what, remedy=remedy)
    if compute.device == "cuda" and resources.gpus == 0:
        raise ConfigError("compute.device: cuda, but resources.gpus is 0", remedy="Set resources.gpus.")
    if compute.device == "cuda" and resources.processes != resources.gpus:
        what = f"resources.processes: {resources.processes} ranks for the {resources.gpus} GPUs of a node"
        raise ConfigError(what, remedy=f"One rank per GPU: set it to {resources.gpus}.")


def _check_nodes(config: Config) -> None:
    """Ranges and spares. All other rules hold for the largest number of nodes."""
    resources = config.resources
    if resources.least_nodes and resources.least_nodes >= resources.nodes:
        what = "resources.nodes: a range needs a least number below the most"
        raise ConfigError(what, value=[resources.least_nodes, resources.nodes], remedy="Example: [8, 16]")
    if resources.least_nodes and len(usable_nodes(config)) == 1:
        ranks = f"{resources.processes} ranks each" if resources.processes > 1 else "a rank each"
        what = (
            f"resources.nodes: of the range, only {resources.nodes} nodes of {ranks} divide {config.data.lanes} lanes"
        )
        possible = [n for n in _divisors(config.data.lanes // resources.processes) if n < resources.nodes]
        remedy = "Give one number."
        if possible:
            remedy = f"Begin the range with one of {', '.join(map(str, possible))}, or give one number."
        raise ConfigError(what, value=[resources.least_nodes, resources.nodes], remedy=remedy)
    if resources.spares and resources.nodes == 1:
        what = "resources.spares: a run on one node ends with its node, which also decides about restarts"
        raise ConfigError(what, value=resources.spares, remedy="Set it to 0.")


def _shuffle_buffer(data: Data) -> int:
    parts = dataset_lanes(data)
    return sum(buffer_bytes(len(part.lanes), data.block, part.chunk, part.sample_bytes) for part in parts)


def _peak_lr(stage: Stage) -> float:
    return stage.base_lr * stage.batch / 256


def _notes(config: Config) -> list[str]:
    data = config.data
    notes = []
    size = _shuffle_buffer(data) / 1e9
    limit = data.buffer / 1e9
    if size > limit:
        notes.append(f"the shuffle buffer needs {size:.1f} GB, data.buffer is {limit:.1f} GB: use fewer lanes")
    for span in stage_spans(config):
        extra = span.end - span.start - span.stage.samples
        if extra:
            notes.append(f"stage {span.stage.name} takes {extra} samples more, to complete its last batch")
    if config.compute.device == "cpu" and config.resources.gpus:
        notes.append(f"{config.resources.gpus} GPUs per node are requested, but compute.device is cpu")
    if not config.evaluate.sets:
        notes.append("no evaluation set is given: the run ends without an accuracy")
    return notes


def warnings(config: Config) -> list[str]:
    """Warnings about a valid configuration: implausible learning rates and batches, settings without effect."""
    result = []
    for stage in config.stages:
        name = f"stage {stage.name}"
        peak = _peak_lr(stage)
        rate = f"the peak learning rate is {peak:.3g} (base_lr {stage.base_lr:g} * batch {stage.batch} / 256)"
        if stage.base_lr == Stage.base_lr and stage.batch < DEFAULT_LR_BATCH:
            what = f"base_lr is the default {stage.base_lr:g}, meant for batches of 16,384 or more"
            result.append(f"{name}: {what}: {rate}. Set stages.{stage.name}.base_lr")
        elif not peak:
            result.append(f"{name}: base_lr is 0, so no weight changes. Set stages.{stage.name}.base_lr")
        elif not LOWEST_LR <= peak <= HIGHEST_LR:
            result.append(f"{name}: {rate}; usual values are {LOWEST_LR:g} to {HIGHEST_LR:g}")
        if stage.batch > config.data.samples:
            what = f"a batch of {stage.batch} has more pairs than the data set ({config.data.samples})"
            result.append(f"{name}: {what}: a pair is then its own negative. Reduce the batch")
        if stage.patch_masking != Stage.patch_masking and not Fraction(stage.mask):
            result.append(f"{name}: patch_masking {stage.patch_masking} has no effect, as mask is 0")
        if stage.text_masking != Stage.text_masking and not Fraction(stage.text_mask):
            result.append(f"{name}: text_masking {stage.text_masking} has no effect, as text_mask is 0")
    return result


def validate(config: Config) -> list[str]:
    """Return notes on a resolved configuration. Raises ConfigError with values and a remedy if it cannot run."""
    require(RULES, config)
    return _notes(config)


def _check_resolved(config: Config) -> None:
    for key, _, field, value in walk_fields(config):
        if "auto" in field.metadata and value == field.metadata["auto"]:
            raise ConfigError(f"{key}: is not resolved", value=value)


def _check_hang_limit(config: Config) -> None:
    limit = 60 * config.monitor.hang_minutes
    if 0 < limit <= config.data.deadline:
        what = f"monitor.hang_minutes: a read may wait {config.data.deadline / 60:g} minutes (data.deadline)"
        raise ConfigError(what, value=config.monitor.hang_minutes, remedy="Set it to more, or lower data.deadline.")


def _check_callback_names(config: Config) -> None:
    callback_names.parse(config.monitor.callbacks)


def _check_evaluation_sets(config: Config) -> None:
    _check_names("evaluate.sets", (dataset.name for dataset in config.evaluate.sets))
    for dataset in config.evaluate.sets:
        for key in ("manifest", *_NEEDED[dataset.task]):
            if not getattr(dataset, key):
                raise ConfigError(f"evaluate.sets.{dataset.name}.{key}: is not given", remedy=_SOURCES[key])


RULES = (
    Rule("fields", check_fields, "has each of them a valid value, whatever the others are?"),
    Rule("towers", _check_towers, "do patches divide the image, and heads the width?"),
    Rule("stages", _check_stages, "do ranks divide the batches, and do the parts of the schedule fit?"),
    Rule("automatic values", _check_resolved, "has each `auto` a value?"),
    Rule("data sets", _check_datasets, "do the lanes of several sets match their weights?"),
    Rule("order of samples", _check_order, "do lanes divide batches, and has each lane two blocks?"),
    Rule("initial weights", _check_init, "do the fields of `init` agree, and is S the end of a step?"),
    Rule("kept checkpoints", _check_keep_at, "is each S of `checkpoint.keep_at` the end of a step?"),
    Rule("devices", _check_compute, "has each rank its GPU, and do copies of the weights divide the ranks?"),
    Rule("nodes", _check_nodes, "can the run use several numbers of nodes, or spares?"),
    Rule("hang limit", _check_hang_limit, "is it longer than the deadline of a read?"),
    Rule("callbacks", _check_callback_names, "is each entry FILE.py:Class?"),
    Rule("evaluation sets", _check_evaluation_sets, "has each the paths that its task needs?"),
)
"""Of a resolved configuration. Later rules rely on earlier ones."""


def plan_numbers(config: Config) -> dict[str, Any]:
    """The numbers of a resolved, valid configuration as plain JSON values, for plans.

    ``worlds``: the world sizes that keep the order of samples. ``passes``: S / N at the end. ``image``: its size in
    pixels. ``kept``: visible patches.
    ``positions``: text tokens left by the text mask. ``lr``: the peak. Buffers are in bytes.
    """
    data = config.data
    ranks = world_size(config)
    buffer = _shuffle_buffer(data)
    stages = [
        {
            "name": span.stage.name, "samples": span.stage.samples, "batch": span.stage.batch,
            "local_batch": span.stage.batch // ranks, "mask": span.stage.mask, "image": model.image.size,
            "patch_masking": span.stage.patch_masking,
            "patches": patches(model.image), "kept": visible_patch_count(model.image, span.stage.mask),
            "positions": visible_token_count(model.text, span.stage.text_mask),
            "steps": span.steps, "start": span.start, "end": span.end,
            "passes": (span.end - span.start) / data.samples, "warmup": span.stage.warmup, "lr": _peak_lr(span.stage),
        }
        for span in stage_spans(config)
        for model in [for_stage(config, span.stage).model]
    ]  # fmt: skip
    end = stage_spans(config)[-1].end
    sets = [
        {
            "name": part.name, "samples": part.dataset_size, "chunk": part.chunk, "lanes": len(part.lanes),
            "passes": end * len(part.lanes) / data.lanes / part.dataset_size,
        }
        for part in dataset_lanes(data)
    ]  # fmt: skip
    return {
        "world": ranks,
        "worlds": _divisors(data.lanes),
        "data": {
            "samples": data.samples, "block": data.block, "lanes": data.lanes, "workers": data.workers,
            "buffer": buffer, "buffer_per_rank": -(-buffer // ranks),
            "passes": sum(stage["passes"] for stage in stages), "sets": sets,
        },
        "stages": stages,
    }  # fmt: skip
