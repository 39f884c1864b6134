"""A trained model, ready for use: ``flip.load(run)``, or an exported one: ``flip.load(folder)``."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from flip.checkpoint import export_record
from flip.checkpoint.remote import at_hand
from flip.checkpoint.safetensors_io import CheckpointFiles, read_tensors
from flip.checkpoint.saver import model_state
from flip.config import merge as configuration
from flip.config.schema import Config
from flip.data import decode
from flip.data.view import EvaluationView
from flip.evaluation import prompts
from flip.evaluation.encoders import PairEncoder
from flip.evaluation.zero_shot import class_embeddings
from flip.export import fold_padding, weights
from flip.export.preprocess import Picture, Preprocess, as_pictures, as_texts
from flip.models import clip
from flip.runs import commit
from flip.runs.errors import ConfigError, DataError
from flip.runs.rundir import RunDir
from flip.tokenizer import Tokenizer


class Loaded:
    """The pair of a run's commit on one device, in fp32, with the run's own tokenizer and view of an image."""

    def __init__(self, pair: clip.CLIPModel, config: Config, source: commit.Commit, device: str) -> None:
        self.pair, self.config, self.source, self.device = pair.to(device).eval(), config, source, device
        self.tokenizer = Tokenizer.of(config.data.tokenizer, config.model.text)
        self.preprocess = Preprocess(EvaluationView.of(config))
        """The transform of one picture to what ``encode_image`` takes, for a ``torch.utils.data.DataLoader``."""

    @torch.no_grad()
    def encode_image(self, images: Picture | Iterable[Picture], batch: int = 64) -> Tensor:
        """Features (n, E), fp32 on the CPU, of norm 1; one picture gives one row, (1, E).

        Args:
            images: one or many of what ``flip.export.preprocess.Picture`` lists (path, PIL image, array, tensor), or an
            array
                (n, height, width, 3) or a tensor (n, 3, height, width) of them.
            batch: pictures that are encoded at a time.

        Raises:
            DataError: a picture cannot be read or has another form.
        """
        given, patch = as_pictures(images), self.config.model.image.patch
        features = [torch.empty(0, self.config.model.embed)]
        for start in range(0, len(given), batch):
            pixels = [self.preprocess.pixels(picture) for picture in given[start : start + batch]]
            views = np.stack([decode.patches(view, patch) for view in pixels])
            features.append(self.pair.encode_image(torch.from_numpy(views).to(self.device)).cpu())
        return torch.cat(features)

    @torch.no_grad()
    def encode_text(self, texts: str | Iterable[str], batch: int = 256) -> Tensor:
        """Features (n, E), fp32 on the CPU, of norm 1; one text gives one row, (1, E). Raises DataError: not a str."""
        given = as_texts(texts)
        features = [torch.empty(0, self.config.model.embed)]
        for start in range(0, len(given), batch):
            tokens = torch.from_numpy(self.tokenizer(given[start : start + batch]))
            features.append(self.pair.encode_text(tokens.to(self.device)).cpu())
        return torch.cat(features)

    @torch.no_grad()
    def classify(
        self, images: Picture | Iterable[Picture], labels: str | Iterable[str], templates: str | Iterable[str] = "{}"
    ) -> Tensor:
        """Probabilities (n, number of labels): softmax of the scaled cosines, at the temperature of training.

        ``images`` as in ``encode_image``. ``templates``: prompts with {} in the place of the label; a label's
        embedding is the mean over them. Raises DataError, ConfigError.
        """
        labels, templates = as_texts(labels), as_texts(templates)
        prompts.check_prompts(prompts.Prompts(labels, templates), "labels")
        tower = self.config.model.image
        encoder = PairEncoder(self.pair, self.tokenizer, tower, self.device, view=self.preprocess.view)
        classes = class_embeddings(encoder, labels, templates)
        assert classes is not None  # a single process
        scale = self.pair.logit_scale.cpu().clamp(0.0, self.pair.max_logit_scale).exp()
        return (scale * self.encode_image(images) @ classes.T).softmax(dim=-1)


def load(source: str | os.PathLike[str], device: str = "cpu", at: str = "", url: str = "") -> Loaded:
    """A commit of a run directory (its weights alone), or an exported folder, verified before it is read.

    ``at``: the commit, as ``pretrain/64`` (stage and samples seen; with ``-n`` behind, that of attempt n); empty: the
    newest. ``url``: the address below which checkpoints of another user's run may be read (``checkpoint.url``). Raises
    ConfigError if there is no run, no such commit or device, DataError if the commit is damaged, PermissionDenied if
    another user's record leads to an address that is not below ``url``.
    """
    where = RunDir(source)
    exists(device)
    if export_record.is_export(where.path):
        if at:
            raise ConfigError("an export holds one commit, none can be chosen", str(where.path), at)
        return Loaded(*_exported(where.path), device)
    if not where.config.is_file():
        remedy = "Give the folder of a run, such as runs/quickstart/mask50, or an exported one."
        raise ConfigError("no run here: config.yaml is missing", str(where.path), remedy=remedy)
    config, found = configuration.read_config(where.config), chosen(where, at)
    pair = clip.build(config.model, config.augment, "sdpa")
    try:
        with at_hand(found, url=url) as folder:
            read_tensors(CheckpointFiles(folder, found.record["files"]), model_state(pair))
    except commit.CorruptCheckpoint as error:
        remedy = "Move that folder away to use the commit before it."
        raise DataError(f"the checkpoint is damaged: {error}", str(found.path), remedy=remedy) from error
    return Loaded(pair, config, found, device)


def _exported(folder: Path) -> tuple[clip.CLIPModel, Config, commit.Commit]:
    """The model of an exported folder, verified before it is read. Raises DataError, ConfigError.

    It is the one that was written, bit for bit, but for the logit scale, which is clamped there. A text encoder that
    sees no padding is the same function, if not the same bits (``flip.export.fold_padding``).
    """
    source = export_record.mark(folder)
    try:
        commit.verify(source)
    except commit.CorruptCheckpoint as error:
        remedy = "Copy the folder again, all files of it, or export again."
        raise DataError(f"the export is damaged: {error}", folder, remedy=remedy) from error
    found = export_record.config(folder)
    pair = clip.build(found.model, found.augment, "sdpa")
    for name in (export_record.OPEN_CLIP, export_record.TIMM):
        export_record.check_header(folder / name)
    tensors, tower = load_file(folder / export_record.OPEN_CLIP), load_file(folder / export_record.TIMM)
    state = weights.from_timm(tower) | weights.text_from_open_clip(tensors)
    state |= weights.projection_from_open_clip(tensors, found.model.image.layers, found.model.embed)
    if found.model.text.padding == "mask":
        state = fold_padding.without(state, found.model.text)
    pair.load_state_dict(state)
    return pair, found, source


def exists(device: str) -> None:
    """Raises ConfigError where this machine has no such device."""
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if str(device) not in ("cpu", *cards, *(["cuda"] if cards else [])):
        remedy = f"There are: {', '.join(['cpu', *cards])}."
        raise ConfigError("this machine has no such device", "device", device, remedy)


def chosen(run: RunDir, at: str = "") -> commit.Commit:
    """The commit of a run that ``at`` means (as in ``load``). Raises ConfigError that names those there are."""
    found = commit.commits(run)
    if not found:
        raise ConfigError("this run has no checkpoint yet", str(run.checkpoints), remedy="Let it train to its first.")
    names = [f"{one.stage}/{one.samples}" for one in found]
    meant = [one for one, name in zip(found, names, strict=True) if at in ("", name, f"{name}-{one.attempt}")]
    if not meant:
        remedy = f"There are: {', '.join(dict.fromkeys(names))}."
        raise ConfigError("this run has no such checkpoint", str(run.checkpoints), at, remedy)
    return meant[-1]
