"""Writing a model as a folder that open_clip, timm and ``flip.load`` read (docs/export.md)."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from flip.checkpoint import export_record
from flip.checkpoint.safetensors_io import save_tensors
from flip.config import merge as configuration
from flip.config.schema import Augment, Config, Model
from flip.evaluation.task import merge_results
from flip.export import card, fold_padding, weights
from flip.export.load import Loaded
from flip.models.clip import EPS
from flip.monitoring.results import read_run
from flip.runs.commit import sha256
from flip.runs.errors import ConfigError, StorageError
from flip.runs.records import POINT
from flip.runs.rundir import RunDir, fsync_path, load_record, write_json, write_text

VARIANTS = ("native", "extra-block", "timm-tower")
"""How open_clip holds the image encoder: as its own ViT; as that with one computed block more; as timm's."""
_OF_COMMIT = ("stage", "samples", "attempt", "step", "manifest", "order", "world")


def variant_of(model: Model, wished: str = "") -> str:
    """native or extra-block, as the model needs, or the wished one. Raises ConfigError where that cannot hold it."""
    natural = "native" if model.image.pool == "patches" else "extra-block"
    variant = wished or natural
    if variant not in VARIANTS:
        raise ConfigError("no such variant", "variant", variant, f"There are: {', '.join(VARIANTS)}.")
    if variant not in (natural, "timm-tower"):
        pooled = {"patches": "the mean over patches", "all": "the mean over class token and patches"}[model.image.pool]
        raise ConfigError(f"cannot hold {pooled} (model.image.pool)", "variant", variant, f"Use {natural}, timm-tower.")
    if model.text.padding == "mask" and not model.text.prepend_cls:
        what = "without [CLS] an empty caption is nothing but padding, which open_clip cannot leave out"
        raise ConfigError(what, "model.text.padding", model.text.padding)
    if variant == "extra-block" and model.embed >= model.image.width:
        remedy = "Use the variant timm-tower."
        raise ConfigError("extra-block needs model.embed < model.image.width", "variant", model.embed, remedy)
    return variant


def export(loaded: Loaded, out: str | os.PathLike[str], variant: str = "", replace: bool = False) -> dict[str, Any]:
    """Write ``loaded`` to the folder ``out``, whole or not at all, and return its export.json.

    ``variant``: one of VARIANTS; empty: native, or extra-block where the class token is in the mean. ``replace``: an
    export that is there gives way. Raises ConfigError where ``out`` exists or the variant cannot hold the model,
    StorageError or OSError where it cannot be written.
    """
    place = Path(out).resolve()
    variant = variant_of(loaded.config.model, variant)
    _refuse(place, replace)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f"{place.name}.tmp.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
    temporary.mkdir()
    try:
        record = _fill(temporary, place, loaded, variant)
        if place.exists():
            aside = place.with_name(f"{place.name}.old.{os.getpid()}")
            os.replace(place, aside)
            os.replace(temporary, place)
            shutil.rmtree(aside)
        else:
            os.replace(temporary, place)
        fsync_path(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return record


def _refuse(place: Path, replace: bool) -> None:
    if not place.exists() or (replace and export_record.is_export(place)):
        return
    if export_record.is_export(place):
        raise ConfigError("there is an export already", place, remedy="Replace it (--replace), or name another folder.")
    raise ConfigError("exists already, and is no export", place, remedy="Name another folder.")


def _fill(folder: Path, place: Path, loaded: Loaded, variant: str) -> dict[str, Any]:
    """All files of the export into ``folder``, which will be called ``place``; export.json is the last."""
    config, pair = loaded.config, loaded.pair
    state = {name: value.detach().cpu().float() for name, value in pair.state_dict().items()}
    positions = pair.image.positions.cpu()
    if variant == "native":
        image = weights.image_to_native(state, positions)
    elif variant == "extra-block":
        image = weights.image_to_extra(state, positions, config.model.image.layers)
    else:
        image = weights.image_to_timm_tower(state, positions)
    shape, eps = config.model, EPS
    if shape.text.padding == "mask":
        state, text, factor = fold_padding.attending(state, shape.text)
        shape, eps = dataclasses.replace(shape, text=text), EPS * factor
    (folder / "timm").mkdir()
    _save(image | weights.text_to_open_clip(state, pair.max_logit_scale), folder / export_record.OPEN_CLIP)
    _save(weights.to_timm(state, positions), folder / export_record.TIMM)
    _json(folder / "open_clip_config.json", open_clip_config(shape, config.augment, variant, place / "timm", eps))
    _json(folder / "timm" / "config.json", timm_config(config.model, config.augment))
    write_text(folder / export_record.TOKENIZER, loaded.tokenizer.to_json())
    _json(folder / "tokenizer_config.json", tokenizer_config(config.model))
    write_text(folder / export_record.CONFIG, configuration.dump(_public(config)))
    record = {"form": export_record.FORM, "variant": variant, "differences": card.differences(config), **facts(loaded)}
    write_text(folder / "README.md", card.text(record, config))
    record["files"] = _seal(folder)
    write_json(folder / export_record.MARK, record)
    return record


def facts(loaded: Loaded) -> dict[str, Any]:
    """Where a model is from: run, commit, data set, identity, code, and its scores at that commit."""
    source = loaded.source
    found = {name: source.record[name] for name in _OF_COMMIT if name in source.record}
    if "variant" in source.record:  # exported again: nothing is nearer to the run than what the first one says
        return found | {name: source.record[name] for name in ("run", "identity", "code", "evaluations")}
    run = RunDir(source.path.parents[2])
    identity = load_record(run.identity)
    own = load_record(run.eval / f"{source.stage}-{source.samples}.json", POINT).get("evaluations", [])
    scores = merge_results(own, read_run(run.path).job_scores.get((source.stage, source.samples), ()))
    # results of earlier versions do not say it: they were computed as the run was trained
    scores = [{"precision": loaded.config.compute.precision, **score} for score in scores]
    kept = ("name", "task", "role", "n", "top1", "top5", "interval", "classes", "precision")
    return found | {
        "run": f"{run.sweep}/{run.name}", "identity": identity.get("hash"), "code": identity.get("code"),
        "evaluations": [{key: score[key] for key in kept if key in score} for score in scores],
    }  # fmt: skip


def open_clip_config(model: Model, augment: Augment, variant: str, timm: Path, text_eps: float = EPS) -> dict[str, Any]:
    """open_clip_config.json. Every key that it names is one whose default is another model (docs/export.md).

    ``text_eps``: of the text encoder's norms, where that is the wider one without a mask
    (``flip.export.fold_padding``).
    """
    both = {"norm_kwargs": {"eps": EPS}, "act_kwargs": {"approximate": "tanh"}}
    bias = {"init_logit_bias": model.logit_bias} if model.objective == "siglip" else {}
    image, text = model.image, model.text
    extra = variant == "extra-block"
    vision: dict[str, Any] = {
        "image_size": image.size, "patch_size": image.patch, "width": image.width, "layers": image.layers + extra,
        "head_width": image.width // image.heads, "no_ln_pre": True, "pool_type": "tok" if extra else "avg",
        "pos_embed_type": "sin_cos_2d", **both,
    }  # fmt: skip
    if variant == "timm-tower":
        place = {"timm_model_name": f"local-dir:{timm}", "timm_pool": "avg", "timm_proj": "linear"}
        vision = {"image_size": image.size, **place}
    return {
        "model_cfg": {
            "embed_dim": model.embed, **bias,
            "vision_cfg": vision,
            "text_cfg": {
                "context_length": text.length, "vocab_size": text.vocabulary, "hf_tokenizer_name": "local",
                "width": text.width, "heads": text.heads, "layers": text.layers, "no_causal_mask": True,
                "pool_type": "first", **both, "norm_kwargs": {"eps": text_eps},
            },
        },
        "preprocess_cfg": {
            "size": image.size, "mean": augment.mean, "std": augment.std, "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }  # fmt: skip


def timm_config(model: Model, augment: Augment) -> dict[str, Any]:
    """timm/config.json: the architecture's name is a shell, all sizes are in ``model_args``."""
    image = model.image
    return {
        "architecture": "vit_base_patch16_224", "num_classes": 0, "num_features": image.width, "global_pool": "avg",
        "model_args": {
            "img_size": image.size, "patch_size": image.patch, "embed_dim": image.width, "depth": image.layers,
            "num_heads": image.heads, "no_embed_class": True, "global_pool": "avg", "fc_norm": False,
            "pool_include_prefix": image.pool == "all", "act_layer": "gelu_tanh",
        },
        "pretrained_cfg": {
            "input_size": [3, image.size, image.size], "fixed_input_size": True, "interpolation": "bicubic",
            "crop_pct": 1.0, "crop_mode": "center", "mean": augment.mean, "std": augment.std, "num_classes": 0,
            "first_conv": "patch_embed.proj", "classifier": "head",
        },
    }  # fmt: skip


def tokenizer_config(model: Model) -> dict[str, Any]:
    """tokenizer_config.json for transformers. The classes named after BERT would add [CLS] and [SEP] by themselves."""
    first = {"cls_token": "[CLS]"} if model.text.prepend_cls else {}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.text.length, "pad_token": "[PAD]",
        "unk_token": "[UNK]", **first, "padding_side": "right", "truncation_side": "right",
        "clean_up_tokenization_spaces": False, "split_special_tokens": True,
    }  # fmt: skip


def _public(config: Config) -> Config:
    """Without the places of the machine that trained it."""
    data = dataclasses.replace(
        config.data, manifest="", tokenizer=export_record.TOKENIZER, cache="",
        sets=[dataclasses.replace(one, manifest="") for one in config.data.sets],
    )  # fmt: skip
    sets = [dataclasses.replace(one, manifest="", classes="", train="") for one in config.evaluate.sets]
    return dataclasses.replace(
        config, data=data, evaluate=dataclasses.replace(config.evaluate, sets=sets),
        init=dataclasses.replace(config.init, run="", export=""),
        checkpoint=dataclasses.replace(config.checkpoint, url=""),
        resources=dataclasses.replace(config.resources, cluster=""),
    )  # fmt: skip


def _json(path: Path, value: Any) -> None:
    """In the order given: people read it."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_tensors(tensors, path)
    except SafetensorError as error:  # what it makes of any trouble with the disk
        raise StorageError(
            f"cannot be written: {error}", path, remedy="Free space, or choose another place."
        ) from error


def _seal(folder: Path) -> dict[str, dict[str, Any]]:
    """Sync every file and folder; their sizes and checksums by name."""
    files = {}
    for path in sorted(folder.rglob("*")):
        fsync_path(path)  # a file's content as well
        if path.is_file():
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return files
