"""Writes a model as a folder for other libraries: open_clip and timm, transformers, or ONNX (docs/export.md)."""

import dataclasses
import json
import os
import secrets
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from flip import tower_kinds
from flip.checkpoint import export_record
from flip.checkpoint.safetensors_io import save_tensors
from flip.config import merge as configuration
from flip.config.derived import missing_in_transformers
from flip.config.schema import Config, Model
from flip.evaluation.metrics.result_files import read_scores, shown
from flip.export import fold_padding, format, onnx_models, weights
from flip.export.differences import differences
from flip.export.load import TrainedModel
from flip.files import deletion
from flip.files.creation import fsync_path, new_output_folder, output_folder, publish_folder
from flip.models.clip import CLIPModel
from flip.runs.checkpoint_folder import sha256
from flip.runs.errors import ConfigError, StorageError
from flip.runs.formats import EXPORT_NUMBER
from flip.runs.rundir import RunDir, load_record, write_json, write_text

FORMATS = ("open_clip", "transformers", "onnx")
_OTHER_FORM = "Use --to open_clip --variant timm-tower, which holds all settings of both towers."
VARIANTS = ("native", "extra-block", "timm-tower")
"""Form of the image encoder in open_clip: its own ViT; the same with one computed block more; a model of timm."""
_OF_CHECKPOINT = ("stage", "samples", "attempt", "step", "manifest", "order", "world")


def choose_format(model: Model, form: str, variant: str = "") -> str:
    """The variant for open_clip, empty for other formats. Raises ConfigError if ``form`` cannot hold the model."""
    if form not in FORMATS:
        raise ConfigError("no such format", "--to", form, f"There are: {', '.join(FORMATS)}.")
    if form == "open_clip":
        return choose_variant(model, variant)
    lacking = tower_kinds.declared(model.image.tower).why_not_exported(model.image, form)
    if lacking:
        raise ConfigError(f"{form} cannot hold {lacking}", f"--to {form}", remedy=_OTHER_FORM)
    if variant:
        raise ConfigError("variants are for --to open_clip only", "--variant", variant)
    missing = missing_in_transformers(model)
    if form == "transformers" and missing:
        what = f"CLIPModel of transformers cannot hold this model, because it lacks {', '.join(missing)}"
        remedy = "Train with recipe clip, or use --to open_clip or --to onnx."
        raise ConfigError(what, "--to transformers", remedy=remedy)
    if form == "onnx":
        onnx_models.check_packages()
    return ""


def choose_variant(model: Model, requested: str = "") -> str:
    """``requested``, or else native or extra-block. Raises ConfigError if the variant cannot hold the model."""
    if model.image.pool == "all":
        natural = "extra-block"
    else:
        natural = "native"
    kind = tower_kinds.declared(model.image.tower)
    if kind.why_not_exported(model.image, natural):
        natural = "timm-tower"
    variant = requested or natural
    if variant not in VARIANTS:
        raise ConfigError("no such variant", "variant", variant, f"There are: {', '.join(VARIANTS)}.")
    lacking = kind.why_not_exported(model.image, variant)
    if lacking:
        raise ConfigError(f"the variant {variant} of open_clip cannot hold {lacking}", "variant", remedy=_OTHER_FORM)
    if variant not in (natural, "timm-tower"):
        what = f"cannot hold this pooling (model.image.pool: {model.image.pool})"
        raise ConfigError(what, "variant", variant, f"Use {natural}, timm-tower.")
    if fold_padding.applies(model.text) and not model.text.prepend_cls:
        what = "without [CLS] an empty caption is nothing but padding, which open_clip cannot leave out"
        raise ConfigError(what, "model.text.padding", model.text.padding)
    if variant == "extra-block" and model.embed >= model.image.width:
        remedy = "Use the variant timm-tower."
        raise ConfigError("extra-block needs model.embed < model.image.width", "variant", model.embed, remedy)
    return variant


def export(
    loaded: TrainedModel, out: str | os.PathLike[str], variant: str = "", replace: bool = False, form: str = "open_clip"
) -> dict[str, Any]:
    """Write ``loaded`` to the folder ``out`` atomically and return its export.json.

    ``variant``: one of VARIANTS, for open_clip; empty: native, or extra-block if the class token is in the mean.
    ``replace``: replace an existing export. ``form``: one of FORMATS. Raises ConfigError if ``out`` exists or the
    format or variant cannot hold the model, StorageError or OSError if it cannot be written.
    """
    target = Path(out).resolve()
    variant = choose_format(loaded.config.model, form, variant)
    if export_record.is_export(target) and not replace:
        remedy = "Replace it (--replace), or name another folder."
        raise ConfigError("an export exists already", target, remedy=remedy)
    if target.exists() and not export_record.is_export(target):
        raise ConfigError("exists already, and is no export", target, remedy="Name another folder.")
    _refuse_other_files(target)
    output_folder(target.parent)
    temporary = target.with_name(f"{target.name}.tmp.{secrets.token_hex(8)}")
    new_output_folder(temporary)
    try:
        record = _write_files(temporary, target, loaded, form, variant)
        publish_folder(temporary)
        if target.exists():
            previous = target.with_name(f"{target.name}.old.{secrets.token_hex(8)}")
            os.replace(target, previous)
            os.replace(temporary, target)
            deletion.delete_own_folder(previous)
        else:
            os.replace(temporary, target)
        fsync_path(target.parent)
    finally:
        deletion.discard_own_folder(temporary)
    return record


def _refuse_other_files(target: Path) -> None:
    """Raise ConfigError if an export that is to be replaced has files that it does not list: they would be deleted."""
    listed = {export_record.EXPORT_FILE, *load_record(target / export_record.EXPORT_FILE).get("files", {})}
    files = (path for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    others = sorted({path.relative_to(target).as_posix() for path in files} - listed)
    if others:
        what = f"the export has files that no export has written, for example {others[0]}"
        raise ConfigError(what, target, remedy="Move them away, or name another folder.")


def _write_files(folder: Path, target: Path, loaded: TrainedModel, form: str, variant: str) -> dict[str, Any]:
    """Write all files to ``folder``, which is renamed to ``target`` later; export.json last."""
    config = loaded.config
    fields: dict[str, Any] = {"variant": variant}
    if form == "open_clip":
        _write_open_clip(folder, target, loaded, variant)
    else:
        fields = {"format": form, **_logit_parameters(loaded.model)}
        if form == "onnx":
            _write_onnx(folder, loaded)
        else:
            _write_transformers(folder, loaded)
        _json(folder / "preprocessor_config.json", format.preprocessor_config(config.model, config.augment))
    normalized = form != "open_clip"  # which cleans texts itself
    write_text(folder / export_record.TOKENIZER, loaded.tokenizer.to_json(normalized))
    _json(folder / "tokenizer_config.json", format.tokenizer_config(config.model))
    write_text(folder / export_record.CONFIG, configuration.dump(_strip_local_paths(config)))
    fields = {**fields, "differences": differences(config, form), **provenance(loaded)}
    record = {"form": EXPORT_NUMBER, **fields}
    write_text(folder / "README.md", format.model_card(record, config))
    record["files"] = _fsync_and_hash(folder)
    write_json(folder / export_record.EXPORT_FILE, record)
    return record


def _write_open_clip(folder: Path, target: Path, loaded: TrainedModel, variant: str) -> None:
    config = loaded.config
    model = loaded.model
    state = _state(model)
    positions = model.image.positions.detach().cpu()
    shape = config.model
    eps = config.model.norm_eps
    if fold_padding.applies(shape.text):
        state, text, factor = fold_padding.fold_padding_mask(state, shape.text)
        shape = dataclasses.replace(shape, text=text)
        eps *= factor
    tracked = weights.TrackedState(state)
    if variant == "native":
        image = weights.image_to_native(tracked, positions)
    elif variant == "extra-block":
        image = weights.image_to_extra_block(tracked, positions, config.model.image.layers)
    else:
        image = weights.image_to_timm_tower(tracked, positions)
    tensors = image | weights.text_to_open_clip(tracked, model.max_logit_scale)
    _refuse_unread(tracked, loaded, "open_clip")
    tracked = weights.TrackedState(state)
    tower = weights.to_timm(tracked, positions)
    _refuse_unread(tracked, loaded, "timm", ("text.", "image.projection.", *model.first_values))
    new_output_folder(folder / "timm")
    _save(tensors, folder / export_record.OPEN_CLIP)
    _save(tower, folder / export_record.TIMM)
    described = format.open_clip_config(shape, config.augment, variant, target / "timm", eps)
    if loaded.tokenizer.is_published:  # open_clip's own, which needs no other package
        del described["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    _json(folder / "open_clip_config.json", described)
    _json(folder / "timm" / "config.json", format.timm_config(config.model, config.augment))
    publish_folder(folder / "timm")


def _write_transformers(folder: Path, loaded: TrainedModel) -> None:
    # the start and the end token, then padding
    model = loaded.model
    tokens = loaded.tokenizer([""])[0]
    tracked = weights.TrackedState(_state(model))
    native = weights.image_to_native(tracked, model.image.positions.detach().cpu())
    native |= weights.text_to_open_clip(tracked, model.max_logit_scale)
    _refuse_unread(tracked, loaded, "transformers")
    _save(weights.to_transformers(native), folder / "model.safetensors")
    _json(folder / "config.json", format.transformers_config(loaded.config.model, int(tokens[0]), int(tokens.max())))


def _write_onnx(folder: Path, loaded: TrainedModel) -> None:
    """The graphs hold the parameters that they compute with, and export.json those of the logits."""
    tracked = weights.TrackedState(_state(loaded.model))
    used = onnx_models.write(folder, loaded)
    tracked.mark_read([*used, *loaded.model.first_values])
    _refuse_unread(tracked, loaded, "onnx")


def _state(model: CLIPModel) -> dict[str, Tensor]:
    return {name: value.detach().cpu().float() for name, value in model.state_dict().items()}


def _refuse_unread(
    tracked: weights.TrackedState, loaded: TrainedModel, form: str, left_out: tuple[str, ...] = ()
) -> None:
    """Raise ConfigError if the model has parameters for which the format has no place."""
    what = f"the model has parameters that the export to {form} does not know"
    remedy = "Add them to flip/export/weights.py, or export to another format (--to)."
    tracked.refuse_unread(what, loaded.source.path, remedy, left_out)


def _logit_parameters(model: CLIPModel) -> dict[str, float]:
    """The factor of the cosine, clamped as in training, and the learned parameters of the loss."""
    scale = {"logit_scale": model.logit_scale.detach().clamp(0.0, model.max_logit_scale).exp().item()}
    return scale | {name: value.item() for name, value in model.loss_parameters().items()}


def provenance(loaded: TrainedModel) -> dict[str, Any]:
    """Origin of a model: run, checkpoint, data set, identity, code, and its scores at that checkpoint."""
    source = loaded.source
    origin = {name: source.record[name] for name in _OF_CHECKPOINT if name in source.record}
    if "variant" in source.record:  # an export that is exported again
        return origin | {name: source.record[name] for name in ("run", "identity", "code", "evaluations")}
    run = RunDir(source.path.parents[2])
    identity = load_record(run.identity)
    scores = shown(read_scores(run, at=(source.stage, source.samples_seen)))
    fields = (
        "name", "task", "role", "n", "top1", "top5", "interval", "chance", "classes", "precision", "metric", "score",
    )  # fmt: skip
    return origin | {
        "run": f"{run.sweep}/{run.name}", "identity": identity.get("hash"), "code": identity.get("code"),
        "evaluations": [{key: score[key] for key in fields if key in score} for score in scores],
    }  # fmt: skip


def _strip_local_paths(config: Config) -> Config:
    data = dataclasses.replace(
        config.data, manifest="", tokenizer=export_record.TOKENIZER, cache="", token_table="", weights="",
        sets=[dataclasses.replace(item, manifest="") for item in config.data.sets],
    )  # fmt: skip
    sets = [dataclasses.replace(item, manifest="", classes="", train="") for item in config.evaluate.sets]
    return dataclasses.replace(
        config, data=data, evaluate=dataclasses.replace(config.evaluate, sets=sets),
        init=dataclasses.replace(config.init, run="", export=""),
        checkpoint=dataclasses.replace(config.checkpoint, url=""),
        resources=dataclasses.replace(config.resources, cluster=""),
    )  # fmt: skip


def _json(path: Path, value: Any) -> None:
    """Write JSON with its keys in the given order, for readers."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_tensors(tensors, path)
    except SafetensorError as error:  # safetensors' error for I/O errors
        remedy = "Free space, or choose another folder."
        raise StorageError(f"cannot be written: {error}", path, remedy=remedy) from error


def _fsync_and_hash(folder: Path) -> dict[str, dict[str, Any]]:
    """Sync all files and folders; return sizes and checksums of files by name."""
    files = {}
    for path in sorted(folder.rglob("*")):
        fsync_path(path)  # files too
        if path.is_file():
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return files
