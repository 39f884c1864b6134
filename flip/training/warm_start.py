"""Initial weights of a run if ``init`` names another run's checkpoint or an export, instead of the run's seed.

A warm start takes the weights alone and starts at S = 0. A run that extends another continues at the S of its
checkpoint with its whole state. Submission resolves ``init`` without torch; the trainer fills the weights (``apply``),
which may convert them to another image size, patch or objective.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flip.checkpoint import export_record
from flip.common.plain_data import flatten
from flip.config import merge
from flip.config.derived import for_stage, stage_at, stage_spans, weights_config
from flip.config.identity import file_digest
from flip.config.merge import lookup
from flip.config.resolve import resolve_path
from flip.config.schema import Config, Init
from flip.evaluation.encoding.open_clip_folder import verified_digest
from flip.export import timm_source
from flip.export.open_clip_source import is_open_clip, source_config
from flip.export.timm_source import is_timm
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError, DataError, PermissionDenied
from flip.runs.rundir import RunDir, load_record

if TYPE_CHECKING:
    from flip.checkpoint.restorer import CheckpointRestorer
    from flip.common.shutdown import Watchdog
    from flip.models.clip import CLIPModel

log = logging.getLogger(__name__)
_RESTORE = "Restore it, or name another one: that makes another run."


class SourceMissing(ConfigError):
    """The run, the checkpoint or the export that ``init`` names does not exist (yet, or any more)."""


#: If these differ, the weights do not fit, or mean something else.
_EQUAL = (
    "model.embed", "model.image.width", "model.image.layers", "model.image.heads", "model.text.width",
    "model.text.layers", "model.text.heads", "model.text.vocabulary", "model.text.causal", "model.image.positions",
    "model.image.norm_pre", "model.image.tower", "model.image.registers", "model.image.qk_norm",
)  # fmt: skip
#: If these differ, the weights are converted; the moments of the optimiser cannot be.
_CONVERTED = ("model.image.patch", "model.text.length", "model.objective")
#: If these differ, the weights fit, but compute another function: training has to make up for it.
_WARNED = (
    "model.image.size", "model.image.pool", "model.text.prepend_cls", "model.text.repair", "model.text.padding",
    "model.activation", "model.norm_eps", "model.max_logit_scale", "augment.mean", "augment.std", "data.to_rgb",
    "data.exif", "evaluate.preprocess",
)  # fmt: skip


def check_compatible(config: Config, source: Config, where: str, extend: bool = False) -> dict[str, list[object]]:
    """Key -> [source's value, own value] of permitted differences. Raises ConfigError for others.

    Image size, patch and text length may differ: weights are converted (``flip.training.conversion``). With ``extend``
    only the image size may, because moments are loaded too. ``where``: the name of the source in errors.
    """
    converted = list(_CONVERTED)
    if config.model.image.positions == "learned":
        converted.append("model.image.size")
    for key in (*_EQUAL, *converted * extend):
        if lookup(config, key) != lookup(source, key):
            if extend:
                free = "image size, pool and texts"
            else:
                free = "image size, patch, text length, pool, objective"
            remedy = f"Use {lookup(source, key)!r}, the value of the source. These may differ: {free}."
            raise ConfigError(f"cannot start from {where}", key, lookup(config, key), remedy)
    pools = lookup(config, "model.image.pool"), lookup(source, "model.image.pool")
    if pools[0] != pools[1] and "attention" in pools:  # which has parameters of its own, and no class token
        remedy = f"Use {pools[1]!r}, the value of the source."
        raise ConfigError(f"cannot start from {where}", "model.image.pool", pools[0], remedy)
    keys = (*_CONVERTED, *_WARNED)
    return {
        key: [lookup(source, key), lookup(config, key)] for key in keys if lookup(config, key) != lookup(source, key)
    }


def digest(source: checkpoint_folder.SavedCheckpoint) -> str:
    """16 hex digits over a checkpoint's stage, S and the checksums of its files, independent of its path."""
    identifying = [
        source.stage,
        source.samples_seen,
        sorted((n, f["sha256"]) for n, f in source.record["files"].items()),
    ]
    return hashlib.sha256(json.dumps(identifying).encode()).hexdigest()[:16]


def resolve_init(config: Config, folders: Sequence[Path]) -> Init:
    """``config.init`` with the path of its run, stage, samples and digest filled in; path and digest for an export.

    ``folders``: searched for a name that is not a path: the sweep's folder, RUNS_ROOT. Raises ConfigError if the
    checkpoint (not yet) or the export does not exist (SourceMissing), or if its weights do not fit ``config``.
    """
    init = config.init
    if init.export and init.run:
        remedy = "Give only one: run for a checkpoint, export for an exported folder."
        raise ConfigError("init: run and export are given", value=f"{init.run}, {init.export}", remedy=remedy)
    if init.export:
        return _resolve_export(config, folders)
    run = _find_run(init.run, folders)
    try:
        source = merge.read_config(run.config)
        stage, samples_seen = _stage_and_samples(init, source)
    except (OSError, ValueError) as error:
        raise ConfigError("init.run: its config.yaml cannot be read", str(run.path), str(error)) from error
    checkpoints = checkpoint_folder.checkpoints(run)
    matches = [c for c in checkpoints if c.samples_seen == samples_seen and c.stage == (stage or c.stage)]
    if not matches:
        present = ", ".join(f"{c.stage} {c.samples_seen}" for c in checkpoints) or "none"
        remedy = f"Its checkpoints: {present}. A later checkpoint can be named once it exists (--only, until then)."
        of_stage = f" of stage {stage}" if stage else ""
        raise SourceMissing(f"init: no checkpoint at S = {samples_seen}{of_stage}", str(run.path), remedy=remedy)
    if init.extend:
        own_stage = stage_at(config, samples_seen)
    else:
        own_stage = config.stages[0]
    has_head = any(each.classification for each in source.stages if each.name == matches[-1].stage)
    if init.extend and has_head != bool(own_stage.classification):
        remedy = "Give both stages a text classification head, or neither; a warm start (extend: false) may differ."
        raise ConfigError("cannot continue from " + str(run.path), "stages.classification", has_head, remedy)
    compared = for_stage(config, own_stage), weights_config(source, matches[-1].stage)
    check_compatible(*compared, str(run.path), init.extend)
    tokenizer = flatten(load_record(run.identity).get("config", {})).get("data.tokenizer")
    digested = isinstance(tokenizer, str) and tokenizer.startswith("sha256:")
    if digested and not Path(resolve_path(config.data.tokenizer)).is_file():
        remedy = "Give the tokenizer of the run that init names. A relative path starts at the current folder."
        raise ConfigError("data.tokenizer: no such file", resolve_path(config.data.tokenizer), remedy=remedy)
    if digested and file_digest(config.data.tokenizer) != tokenizer:
        what = "data.tokenizer: not the tokenizer of the run that init names"
        raise ConfigError(what, str(run.path), config.data.tokenizer)
    key = digest(matches[-1])
    if init.commit not in ("", key):
        raise SourceMissing("init.commit: this checkpoint has another digest", str(matches[-1].path), key)
    return replace(init, run=str(run.path), stage=matches[-1].stage, samples=samples_seen, commit=key)


def _find_run(name: str, folders: Sequence[Path]) -> RunDir:
    own = Path(resolve_path(name) if name.startswith("~") else name)
    for path in [own, *(folder / name for folder in folders)]:
        if path.is_absolute() and (path / "config.yaml").is_file():
            return RunDir(path)
    remedy = "Give SWEEP/RUN, RUN of the same sweep, or the full path of its directory."
    raise SourceMissing("init.run: no such run", ", ".join(map(str, folders)), name, remedy)


def _stage_and_samples(init: Init, source: Config) -> tuple[str, int]:
    """(stage, S); without samples the end of the stage, without a stage the end of the run."""
    ends = {span.stage.name: span.end for span in stage_spans(source)}
    if init.stage and init.stage not in ends:
        raise ConfigError("init.stage: the run has no such stage", init.run, init.stage, f"Stages: {', '.join(ends)}.")
    stage = init.stage or ("" if init.samples else list(ends)[-1])
    return stage, init.samples or ends[stage]


def _resolve_export(config: Config, folders: Sequence[Path]) -> Init:
    """Its files are verified when they are read."""
    init = config.init
    paths = list(dict.fromkeys([Path(resolve_path(init.export)), *(folder / init.export for folder in folders)]))
    folder = next((path for path in paths if _is_source(path)), None)
    if folder is None:
        remedy = "Give the folder that `flip export` wrote, or a model of open_clip or timm (docs/export.md)."
        existing = next((path for path in paths if path.exists()), None)
        if existing is not None:
            what = "init.export: neither an export nor weights of open_clip or timm in safetensors"
            raise SourceMissing(what, str(existing), remedy=remedy)
        raise SourceMissing("init.export: no such export", ", ".join(map(str, paths)), init.export, remedy)
    first = for_stage(config, config.stages[0])
    check_compatible(first, _config_of(folder, first), str(folder))
    key = _digest_of(folder)
    if init.commit not in ("", key):
        raise SourceMissing("init.commit: this export has another digest", str(folder), key)
    return replace(init, export=str(folder), commit=key)


def _is_source(path: Path) -> bool:
    return export_record.is_export(path) or is_open_clip(path) or is_timm(path)


def _config_of(folder: Path, like: Config) -> Config:
    """The configuration of an export, or of a model of open_clip or timm in our terms (other fields as in ``like``)."""
    if export_record.is_export(folder):
        return export_record.config(folder)
    if is_open_clip(folder):
        return source_config(folder, like)
    return timm_source.source_config(folder, like)


def _digest_of(folder: Path) -> str:
    """16 hex digits over the weights of an export, or over all files of a model of open_clip or timm."""
    if export_record.is_export(folder):
        return export_record.digest(export_record.read_export(folder))
    if not is_open_clip(folder):
        return timm_source.digest(folder)
    return verified_digest(str(folder))[:16]


def stored_init(init: Init, run: RunDir) -> Init | None:
    """The resolved ``init`` of a run that was submitted with ``init`` and has checkpoints, so needs no source; else
    None."""
    if not (run.config.is_file() and (checkpoint_folder.ever_had_checkpoint(run) or run.is_complete())):
        return None
    stored = merge.read_config(run.config).init
    for old, new in ((stored.run, init.run), (stored.export, init.export)):
        name = Path(resolve_path(new) if new.startswith(("~", "cache:")) else new).parts
        if bool(old) != bool(new) or Path(old).parts[len(Path(old).parts) - len(name) :] != name:
            return None
    same = (
        stored.extend == init.extend
        and init.commit in ("", stored.commit)
        and init.stage in ("", stored.stage)
        and init.samples in (0, stored.samples)
    )
    return stored if same else None


def pin(init: Init, by: RunDir) -> None:
    """Pin the checkpoint for the run ``by``. Raises DataError if it is gone, PermissionDenied if it may be deleted.

    The run may belong to another user if it is complete: nothing is deleted from it any more.
    """
    run = RunDir(init.run)
    if os.access(run.path, os.W_OK | os.X_OK):
        checkpoint_folder.pin(run, by, init.stage, init.samples)
    elif not run.is_complete():
        remedy = "Wait until that run is complete, or ask its owner."
        raise PermissionDenied("init: the checkpoint cannot be pinned", str(run.path), f"{init.stage}/", remedy)
    open_checkpoint(init)


def open_checkpoint(init: Init) -> checkpoint_folder.SavedCheckpoint:
    """The checkpoint that a resolved ``init`` names. Raises DataError if it is gone or has changed."""
    run = RunDir(init.run)
    for source in reversed(checkpoint_folder.checkpoints(run)):
        if (source.stage, source.samples_seen) == (init.stage, init.samples) and digest(source) == init.commit:
            return source
    where = f"{run.path}, stage {init.stage}, S = {init.samples}"
    raise DataError("the checkpoint that init names no longer exists", where, init.commit, _RESTORE)


def open_export(init: Init) -> Path:
    """The folder of the export that a resolved ``init`` names. Raises DataError if it is gone or has changed."""
    folder = Path(init.export)
    exists = _is_source(folder)
    if not exists or _digest_of(folder) != init.commit:
        raise DataError("the export that init names no longer exists", str(folder), init.commit, _RESTORE)
    return folder


def extended_checkpoint(init: Init, restorer: CheckpointRestorer) -> checkpoint_folder.SavedCheckpoint | None:
    """The checkpoint of another run that a run without checkpoints continues from (``init.extend``), or None.
    Collective."""
    if init.extend:
        return restorer.open_other(lambda: open_checkpoint(init), init.run)
    return None


def apply(model: CLIPModel, config: Config, restorer: CheckpointRestorer, watchdog: Watchdog) -> None:
    """Fill the weights of a warm start from the source that ``init`` names, if any. Collective.

    ``config``: of the first stage (``flip.config.derived.for_stage``).
    """
    from flip.common.shutdown import LONG_OPERATION_FACTOR
    from flip.training.conversion import load_weights

    init = config.init
    if init.extend or not (init.run or init.export):
        return
    watchdog.heartbeat(f"starting from {init.run or init.export}", times=LONG_OPERATION_FACTOR)
    if init.export:
        restorer.parent = init.export
        differs = load_converted(model, config, open_export(init))
    else:
        source = restorer.open_other(lambda: open_checkpoint(init), init.run)
        other = weights_config(merge.read_config(RunDir(init.run).config), source.stage)
        differs = check_compatible(config, other, init.run)
        load_weights(other, model, partial(restorer.load, source))
    if restorer.world.is_rank0:
        text = "; ".join(f"{key}: {old} in the source, {new} here" for key, (old, new) in differs.items())
        log.info("starts with the weights of %s; %s", restorer.parent, text or "no setting of the model differs")


def load_converted(model: CLIPModel, config: Config, source: str | os.PathLike[str]) -> dict[str, list[object]]:
    """Fill ``model``, built for ``config``, with the verified weights of a run or an export. Each rank reads them.

    ``source``: as in ``flip.load``, or a model of open_clip, or one of timm, of which the image encoder is taken.
    Weights are converted as between two stages (``flip.training.conversion``).
    Returns key -> [source's value, own value] of differences that change the function of the weights. Raises
    ConfigError if model or tokenizer do not fit, DataError if the source is damaged.
    """
    from flip.export.load import load
    from flip.tokenizer import Tokenizer
    from flip.training.conversion import copy_weights

    if not export_record.is_export(Path(source)):
        if is_open_clip(Path(source)):
            return _load_open_clip(model, config, Path(source))
        if is_timm(Path(source)):
            return _load_timm(model, config, Path(source))
    other = load(source, url=config.checkpoint.url)
    differs = check_compatible(config, other.config, str(source))
    own = Tokenizer.of(config.data.tokenizer, config.model.text)
    if own.to_json() != Tokenizer.of(other.tokenizer.path, config.model.text).to_json():
        remedy = f"Use that model's own, {other.tokenizer.path}: its embedding knows no other ids."
        raise ConfigError(f"is not the tokenizer of {source}", "data.tokenizer", config.data.tokenizer, remedy)
    copy_weights(other.model, model)
    return differs


def _load_open_clip(model: CLIPModel, config: Config, folder: Path) -> dict[str, list[object]]:
    """``load_converted`` for a model folder of open_clip."""
    from safetensors.torch import load_file

    from flip.evaluation.encoding.open_clip_folder import FILES
    from flip.export import weights
    from flip.models import clip
    from flip.tokenizer import Tokenizer
    from flip.training.conversion import copy_weights

    source = source_config(folder, config)
    differs = check_compatible(config, source, str(folder))
    own = Tokenizer.of(config.data.tokenizer, config.model.text)
    file = folder / export_record.TOKENIZER
    same = own.is_published
    if file.is_file():
        same = own.to_json() == Tokenizer.of(file, config.model.text).to_json()
    if not same:
        if file.is_file():
            expected = str(file)
        else:
            expected = "CLIP's published byte pairs (docs/reproduce.md)"
        remedy = f"Use that model's own, {expected}: its embedding knows no other ids."
        raise ConfigError(f"is not the tokenizer of {folder}", "data.tokenizer", config.data.tokenizer, remedy)
    tensors = weights.TrackedState({name: tensor.float() for name, tensor in load_file(folder / FILES[1]).items()})
    state = weights.image_from_native(tensors, source.model.image.norm_pre) | weights.text_from_open_clip(tensors)
    what = "init.export: cannot start from this model, because it has parameters that the toolkit does not know"
    remedy = "A ViT of open_clip with learned positions and CLIP's text encoder fits: docs/export.md."
    tensors.refuse_unread(what, folder / FILES[1], remedy)
    other = clip.CLIPModel(source.model, source.augment, "sdpa")
    other.load_state_dict(state)
    copy_weights(other, model)
    return differs


def _load_timm(model: CLIPModel, config: Config, path: Path) -> dict[str, list[object]]:
    """``load_converted`` for a model of timm: the image encoder without its projection."""
    import torch
    from safetensors.torch import load_file

    from flip.export import weights
    from flip.models import clip
    from flip.training.conversion import copy_weights

    source = timm_source.source_config(path, config)
    differs = check_compatible(config, source, str(path))
    tensors = {name: tensor.float() for name, tensor in load_file(timm_source.weights_file(path)).items()}
    learned = source.model.image.positions == "learned"
    state = weights.from_timm(tensors, learned)
    other = clip.CLIPModel(source.model, source.augment, "sdpa")
    rows = 0
    if learned:
        rows = dict(other.named_parameters())["image.positions"].shape[0]
    if learned and len(state["image.positions"]) < rows:  # timm's no_embed_class: the class token has no position
        positions = state["image.positions"]
        state["image.positions"] = torch.cat([torch.zeros_like(positions[:1]), positions])
    other.load_state_dict(state, strict=False)
    copy_weights(other, model, state)
    log.info("%s: %s", path, timm_source.FRESH)
    return differs
