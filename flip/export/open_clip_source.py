"""A model folder of open_clip as the source of a run's first weights: its architecture as fields of ``Model``.

``init.export`` may name such a folder if this toolkit has all parts of the model: open_clip's own ViT with learned
positions, and its text encoder as in CLIP. No torch: submission compares the fields with those of the run.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flip.config.schema import Augment, Config, ImageTower, Model, TextTower
from flip.evaluation.encoding.open_clip_folder import FILES, check
from flip.files.creation import read_regular
from flip.runs.errors import ConfigError

CONFIG_LIMIT = 1 << 20
"""Bytes of open_clip_config.json; real ones have one or two kB."""
_MEAN = [0.48145466, 0.4578275, 0.40821073]
_STD = [0.26862954, 0.26130258, 0.27577711]
"""open_clip's OPENAI_DATASET_MEAN and _STD, its defaults."""
_IMAGE_KEYS = (
    "image_size", "patch_size", "width", "layers", "head_width", "no_ln_pre", "pool_type", "norm_kwargs", "act_kwargs",
    "global_average_pool", "patch_dropout",
)  # fmt: skip
_TEXT_KEYS = (
    "context_length", "vocab_size", "width", "heads", "layers", "no_causal_mask", "pool_type", "norm_kwargs",
    "act_kwargs", "hf_tokenizer_name", "tokenizer_kwargs",
)  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "mlp_ratio": 4.0, "pos_embed_type": "learnable", "proj_type": "linear", "pad_id": 0, "text_mask": "first",
}  # fmt: skip
"""Keys with one value that fits; all others must be empty, zero or false."""


def is_open_clip(folder: Path) -> bool:
    """Whether a folder has the two files of a model of open_clip."""
    return all((folder / name).is_file() for name in FILES)


def source_config(folder: Path, like: Config) -> Config:
    """``like`` with the model, mean and deviation of the folder.

    Raises ConfigError with the part of the model that this toolkit lacks, and as ``open_clip_folder.check``.
    """
    check(str(folder))
    where = str(folder / FILES[0])
    described = json.loads(read_regular(where, CONFIG_LIMIT).decode("utf-8"))
    preprocess = described.get("preprocess_cfg") or {}
    try:
        model = _model(described["model_cfg"], like.model, where)
        mean = [float(value) for value in preprocess.get("mean", _MEAN)]
        std = [float(value) for value in preprocess.get("std", _STD)]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"is no configuration of open_clip: {type(error).__name__} {error}"
        raise ConfigError(what, where) from error
    augment: Augment = replace(like.augment, mean=mean, std=std)
    return replace(like, model=model, augment=augment)


def _model(model_cfg: Mapping[str, Any], like: Model, where: str) -> Model:
    vision = dict(model_cfg["vision_cfg"])
    text = dict(model_cfg["text_cfg"])
    _refuse_other_keys("vision_cfg", vision, _IMAGE_KEYS, where)
    _refuse_other_keys("text_cfg", text, _TEXT_KEYS, where)
    eps = _equal(
        "norm_kwargs.eps", vision, text, lambda tower: (tower.get("norm_kwargs") or {}).get("eps", 1e-5), where
    )
    if eps not in (1e-6, 1e-5):
        raise _lacking("norm_kwargs.eps", eps, where)
    approximate = _equal(
        "act_kwargs.approximate", vision, text, lambda tower: (tower.get("act_kwargs") or {}).get("approximate"), where
    )
    if approximate == "tanh":
        activation = "gelu_tanh"
    else:
        activation = "gelu"
    if model_cfg.get("quick_gelu"):
        activation = "quick_gelu"
    return replace(
        like,
        embed=int(model_cfg["embed_dim"]),
        image=_image_tower(vision, like.image, where),
        text=_text_tower(text, like.text, where),
        objective="siglip" if model_cfg.get("init_logit_bias") is not None else "clip",
        activation=activation,
        norm_eps=eps,
    )


def _image_tower(vision: Mapping[str, Any], like: ImageTower, where: str) -> ImageTower:
    pool = vision.get("pool_type", "avg" if vision.get("global_average_pool") else "tok")
    pools = {"tok": "class", "avg": "patches"}
    if pool not in pools:
        raise _lacking("vision_cfg.pool_type", pool, where)
    width = int(vision["width"])
    return replace(
        like,
        size=int(vision["image_size"]),
        patch=int(vision["patch_size"]),
        width=width,
        layers=int(vision["layers"]),
        heads=width // int(vision.get("head_width", 64)),
        pool=pools[pool],
        positions="learned",
        norm_pre=not vision.get("no_ln_pre", False),
    )


def _text_tower(text: Mapping[str, Any], like: TextTower, where: str) -> TextTower:
    causal = not text.get("no_causal_mask", False)
    pool = text.get("pool_type", "argmax")
    if pool != ("argmax" if causal else "first"):
        raise _lacking("text_cfg.pool_type", pool, where)
    return replace(
        like,
        length=int(text.get("context_length", 77)),
        vocabulary=int(text.get("vocab_size", 49_408)),
        width=int(text["width"]),
        layers=int(text["layers"]),
        heads=int(text["heads"]),
        causal=causal,
        prepend_cls=like.prepend_cls or not causal,  # of no effect in a causal text
        repair=True,  # open_clip repairs every text
        padding="attend",
    )


def _equal(key: str, vision: Any, text: Any, value_of: Any, where: str) -> Any:
    values = value_of(vision), value_of(text)
    if values[0] != values[1]:
        raise _lacking(key, f"{values[0]} and {values[1]}", where)
    return values[0]


def _refuse_other_keys(section: str, values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key, value in values.items():
        if key in _DEFAULTS:
            fits = value == _DEFAULTS[key]
        else:
            fits = not value
        if key not in known and not fits:
            raise _lacking(f"{section}.{key}", value, where)


def _lacking(key: str, value: object, where: str) -> ConfigError:
    what = f"init.export: cannot start from this model, because the toolkit has no model with this {key}"
    remedy = "A ViT of open_clip with learned positions and CLIP's text encoder fits (recipe clip): docs/export.md."
    return ConfigError(what, where, value, remedy)
