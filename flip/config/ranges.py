"""What each field by itself may be: bounds and names. What fields must agree on is in ``validate``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Any

from flip.config.schema import Config
from flip.runs.errors import ConfigError

_CHOICES = {
    "model.objective": ("clip", "siglip"),
    "model.image.pool": ("all", "patches"),
    "model.text.padding": ("attend", "mask"),
    "data.decoder": ("auto", "pillow", "simplejpeg"),
    "data.client": ("s3fs", "obstore"),
    "data.resize": ("auto", "pillow", "torchvision"),
    "data.to_rgb": ("flatten", "convert"),
    "evaluate.preprocess": ("crop_resize", "resize_crop"),
    "compute.device": ("auto", "cpu", "cuda"),
    "compute.precision": ("auto", "fp32", "bf16"),
    "compute.attention": ("auto", "explicit", "sdpa"),
    "compute.deterministic": ("auto", "yes", "no"),
    "compute.recompute": ("no", "selective", "block"),
    "compute.compile": ("yes", "no"),
    "checkpoint.background": ("yes", "no"),
    "stages.*.text_masking": ("random", "prioritised"),
    "evaluate.sets.*.role": ("validation", "test"),
    "evaluate.sets.*.task": ("zeroshot", "retrieval", "probe"),
}

MOST_SAMPLES = 2**53 - 1
"""Length of a stage. Above it counts are not exact in every reader of JSON; no training comes near."""

#: key -> (least, most, whether the least itself is allowed)
_BOUNDS: dict[str, tuple[float, float, bool]] = {
    "seed": (0, 2**64 - 1, True),
    "model.embed": (1, 2**20, True),
    "model.image.size": (1, 2**14, True),
    "model.image.patch": (1, 2**14, True),
    "model.image.width": (1, 2**20, True),
    "model.image.layers": (1, 2**12, True),
    "model.image.heads": (1, 2**12, True),
    "model.text.length": (1, 2**14, True),
    "model.text.vocabulary": (1, 2**31 - 1, True),
    "model.text.width": (1, 2**20, True),
    "model.text.layers": (1, 2**12, True),
    "model.text.heads": (1, 2**12, True),
    "model.temperature": (0, math.inf, False),
    "model.max_logit_scale": (1, math.inf, True),
    "model.logit_bias": (-1e6, 1e6, True),
    "data.samples": (0, 2**48 - 1, True),
    "data.sample_bytes": (1, 2**40, True),
    "data.workers": (-1, 1024, True),
    "data.chunk": (0, 2**20, True),
    "data.block": (1, 2**20, True),
    "data.lanes": (0, 2**20, True),
    "data.buffer": (0, math.inf, True),
    "data.max_replaced": (0, 1, True),
    "data.deadline": (0, 86_400, True),
    "data.timeout": (0, 3600, False),
    "data.sets.*.weight": (0, 1e9, False),
    "data.sets.*.lanes": (0, 2**20, True),
    "data.sets.*.samples": (0, 2**48 - 1, True),
    "data.sets.*.sample_bytes": (1, 2**40, True),
    "data.sets.*.chunk": (0, 2**20, True),
    "data.hedge": (0, 3600, True),
    "data.cache_bytes": (1, math.inf, True),
    "augment.flip": (0, 1, True),
    "augment.rotate": (0, 180, True),
    "augment.translate": (0, 1, True),
    "augment.zoom": (0, 10, True),
    "augment.brightness": (0, 1, True),
    "augment.contrast": (0, 1, True),
    "augment.saturation": (0, 1, True),
    "augment.grey": (0, 1, True),
    "augment.std.*": (0, math.inf, False),
    "init.samples": (0, math.inf, True),
    "stages.*.samples": (1, MOST_SAMPLES, True),
    "stages.*.batch": (1, 2**31 - 1, True),
    "stages.*.base_lr": (0, math.inf, True),
    "stages.*.warmup": (0, MOST_SAMPLES, True),
    "optim.beta1": (0, 1, True),
    "optim.beta2": (0, 1, True),
    "optim.eps": (0, math.inf, False),
    "optim.weight_decay": (0, math.inf, True),
    "optim.clip": (0, math.inf, True),
    "compute.threads": (0, 4096, True),
    "compute.accumulate": (1, 2**20, True),
    "compute.replicate": (1, 2**20, True),
    "checkpoint.minutes": (0, math.inf, True),
    "checkpoint.samples": (0, math.inf, True),
    "checkpoint.keep": (1, 1000, True),
    "evaluate.every": (0, math.inf, True),
    "evaluate.batch": (1, 2**31 - 1, True),
    "monitor.log_every": (1, 2**31 - 1, True),
    "monitor.hang_minutes": (0, 1e6, True),
    "monitor.status_seconds": (0, math.inf, False),
    "monitor.spike": (0, math.inf, True),
    "monitor.spike_window": (3, 10_000, True),
    "monitor.profile_steps": (0, 1000, True),
    "monitor.profile_from": (0, math.inf, True),
    "monitor.sample_minutes": (0, 1e6, True),
    "resources.nodes": (1, 2**20, True),
    "resources.processes": (1, 1024, True),
    "resources.gpus": (0, 1024, True),
    "resources.cpus": (0, 4096, True),
    "resources.hours": (0, math.inf, False),
}


def _values(owner: Any, path: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted key, value) pairs that a pattern names; ``*`` is every member of a list, called by its name."""
    if not path:
        yield prefix, owner
    elif path[0] == "*":
        for i, member in enumerate(owner):
            yield from _values(member, path[1:], f"{prefix}.{getattr(member, 'name', '') or i}")
    else:
        yield from _values(getattr(owner, path[0]), path[1:], f"{prefix}.{path[0]}" if prefix else path[0])


def _span(config: Config, key: str, low: float, high: float) -> None:
    """A pair of numbers, the smaller first, both above ``low`` and at most ``high``."""
    pair = getattr(config.augment, key.rpartition(".")[2])
    if len(pair) != 2 or not low < pair[0] <= pair[1] <= high:
        most = "" if high == math.inf else f", at most {high:g}"
        raise ConfigError(f"{key}: needs two numbers above {low:g}{most}, the smaller first", value=list(pair))


def _meant(config: Config, key: str) -> str:
    """A remedy where the field is of a stage that has nearly the name of another: the typing error made a stage."""
    section, _, name = key.rpartition(".")[0].partition(".")
    others = [stage.name for stage in config.stages if section == "stages" and stage.name != name]
    near = difflib.get_close_matches(name, others, n=1)
    return f"Did you mean stages.{near[0]}? A name that is not there makes a new stage." if near else ""


def check_ranges(config: Config) -> None:
    """Raise ConfigError for the first field that cannot be right whatever the others are. ``auto`` may still stand."""
    for pattern, names in _CHOICES.items():
        for key, value in _values(config, pattern.split(".")):
            if value not in names:
                raise ConfigError(f"{key}: no such choice", value=value, remedy=f"One of: {', '.join(names)}.")
    for pattern, (least, most, closed) in _BOUNDS.items():
        for key, value in _values(config, pattern.split(".")):
            if not (least <= value if closed else least < value):
                what = f"{key}: must be {'at least' if closed else 'above'} {least:g}"
                raise ConfigError(what, value=value, remedy=_meant(config, key))
            if value > most or value == math.inf:
                raise ConfigError(f"{key}: must be {f'at most {most}' if most < math.inf else 'finite'}", value=value)
    for key in ("beta1", "beta2"):
        if getattr(config.optim, key) == 1:
            raise ConfigError(f"optim.{key}: must be below 1", value=1.0)
    _span(config, "augment.crop_area", 0, 1)
    _span(config, "augment.crop_aspect", 0, math.inf)
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
