"""Loads a trained model from a run or an export: ``flip.load(path)``."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flip.checkpoint import export_record
from flip.checkpoint.remote import local_copy
from flip.checkpoint.safetensors_io import CheckpointFiles, read_tensors
from flip.checkpoint.saver import TRAINING_ONLY, model_state
from flip.config import merge as configuration
from flip.config.derived import weights_config
from flip.config.schema import Config
from flip.data import decode
from flip.data.view import EvaluationView
from flip.evaluation.datasets import prompts
from flip.evaluation.encoding.encoders import ModelEncoder
from flip.evaluation.encoding.features import no_op
from flip.evaluation.tasks.zero_shot import class_embeddings
from flip.export import fold_padding, weights
from flip.export.preprocess import ImageInput, Preprocess, as_images, as_texts
from flip.models import clip
from flip.runs import checkpoint_folder, command_record
from flip.runs.errors import ConfigError, DataError
from flip.runs.rundir import RunDir
from flip.tokenizer import Tokenizer


class TrainedModel:
    """The model of a run's checkpoint on one device, in fp32, with the run's tokenizer and image view."""

    def __init__(
        self, model: clip.CLIPModel, config: Config, source: checkpoint_folder.SavedCheckpoint, device: str
    ) -> None:
        self.model = model.to(device).eval()
        self.config = config
        self.source = source
        self.device = device
        self.tokenizer = Tokenizer.of(config.data.tokenizer, config.model.text)
        self.preprocess = Preprocess(EvaluationView.of(config))
        """The transform of an image to input of ``encode_image``, for a ``torch.utils.data.DataLoader``."""

    def __repr__(self) -> str:
        size = self.config.model.size
        return f"<TrainedModel {size}, S = {self.source.samples_seen:,}, on {self.device}, from {self.source.path}>"

    @torch.no_grad()
    def encode_image(
        self,
        images: ImageInput | Iterable[ImageInput],
        batch: int = 64,
        progress: Callable[[int, int], object] = no_op,
    ) -> Tensor:
        """Features (n, E), fp32 on the CPU, of norm 1; one image gives one row, (1, E).

        Args:
            images: one or many images (``flip.export.preprocess.ImageInput``: path, PIL image, array or tensor), or an
                array (n, height, width, 3) or tensor (n, 3, height, width) of them.
            batch: images encoded at a time.
            progress: called after each batch with the number of images so far, and in all.

        Raises:
            ConfigError, StorageError: the file of an image cannot be read.
            DataError: an image has another form.
        """
        given = as_images(images)
        patch = self.config.model.image.patch
        features = [torch.empty(0, self.config.model.embed)]
        for start in range(0, len(given), batch):
            pixels = [self.preprocess.pixels(image) for image in given[start : start + batch]]
            views = np.stack([decode.patches(view, patch) for view in pixels])
            features.append(self.model.encode_image(torch.from_numpy(views).to(self.device)).cpu())
            progress(min(start + batch, len(given)), len(given))
        return torch.cat(features)

    @torch.no_grad()
    def encode_text(self, texts: str | Iterable[str], batch: int = 256) -> Tensor:
        """Features (n, E), fp32 on the CPU, of norm 1; one text gives one row, (1, E). Raises DataError: not a str."""
        given = as_texts(texts)
        features = [torch.empty(0, self.config.model.embed)]
        for start in range(0, len(given), batch):
            tokens = torch.from_numpy(self.tokenizer(given[start : start + batch]))
            features.append(self.model.encode_text(tokens.to(self.device)).cpu())
        return torch.cat(features)

    @torch.no_grad()
    def classify(
        self,
        images: ImageInput | Iterable[ImageInput],
        labels: str | Iterable[str],
        templates: str | Iterable[str] = "{}",
        progress: Callable[[int, int], object] = no_op,
    ) -> Tensor:
        """Probabilities (n, number of labels): softmax of the cosines, scaled as in training.

        ``images`` as in ``encode_image``. ``templates``: prompts with {} for the label; the embedding of a label is
        their mean. ``progress``: called after each batch of images with their number so far, and in all. Raises
        DataError, ConfigError, StorageError.
        """
        labels = as_texts(labels)
        templates = as_texts(templates)
        prompts.check_prompts(prompts.Prompts(labels, templates), "labels")
        tower = self.config.model.image
        encoder = ModelEncoder(self.model, self.tokenizer, tower, self.device, view=self.preprocess.view)
        classes = class_embeddings(encoder, labels, templates)
        assert classes is not None  # a single process
        scale = self.model.logit_scale.cpu().clamp(0.0, self.model.max_logit_scale).exp()
        return (scale * self.encode_image(images, progress=progress) @ classes.T).softmax(dim=-1)


def load(source: str | os.PathLike[str], device: str = "cpu", at: str = "", url: str = "") -> TrainedModel:
    """Load a checkpoint of a run directory, or an exported folder; files are verified first.

    Args:
        at: the checkpoint, STAGE/SAMPLES (``pretrain/64``) or STAGE/SAMPLES-ATTEMPT; empty: the newest.
        url: URL below which checkpoints of another user's run may be read (``checkpoint.url``).

    Raises:
        ConfigError: there is no such run, checkpoint or device.
        DataError: the files are damaged.
        PermissionDenied: another user's record names a URL that is not below ``url``.
    """
    run = RunDir(source)
    check_device(device)
    if export_record.is_export(run.path):
        if at:
            raise ConfigError("an export holds one checkpoint, none can be chosen", str(run.path), at)
        return TrainedModel(*_load_export(run.path), device)
    command_record.refuse(run, "Only trainings are exported and loaded.")
    if not run.config.is_file():
        if run.path.is_dir():
            what = "no run here: the folder has neither config.yaml nor export.json"
        else:
            what = "no such folder"
        remedy = "Give the folder of a run, such as runs/quickstart/masked, or an exported one."
        raise ConfigError(what, str(run.path), remedy=remedy)
    selected = select_checkpoint(run, at)
    config = weights_config(configuration.read_config(run.config), selected.stage)
    model = clip.CLIPModel(config.model, config.augment, "sdpa")
    try:
        with local_copy(selected, url=url) as folder:
            files = CheckpointFiles(folder, selected.record["files"])
            read_tensors(files, model_state(model), left_out=(TRAINING_ONLY,))
    except checkpoint_folder.CorruptCheckpoint as error:
        remedy = "Move that folder away to use the checkpoint before it."
        raise DataError(f"the checkpoint is damaged: {error}", str(selected.path), remedy=remedy) from error
    return TrainedModel(model, config, selected, device)


def _load_export(folder: Path) -> tuple[clip.CLIPModel, Config, checkpoint_folder.SavedCheckpoint]:
    """The model of a verified export. Raises DataError, ConfigError.

    Weights have the bits of the exported model, except for the logit scale, which is clamped, and for a text encoder
    without padding, which is the same function with other bits (``flip.export.fold_padding``).
    """
    source = export_record.read_export(folder)
    try:
        checkpoint_folder.verify(source)
    except checkpoint_folder.CorruptCheckpoint as error:
        remedy = "Copy the folder again, all files of it, or export again."
        raise DataError(f"the export is damaged: {error}", folder, remedy=remedy) from error
    config = export_record.config(folder)
    model = clip.CLIPModel(config.model, config.augment, "sdpa")
    for name in (export_record.OPEN_CLIP, export_record.TIMM):
        export_record.check_header(folder / name)
    try:
        _fill(model, config, folder)
    except (SafetensorError, KeyError, IndexError, ValueError, RuntimeError) as error:  # the last: of load_state_dict
        what = f"its weights are not those of its configuration: {type(error).__name__} {str(error)[:300]}"
        raise DataError(what, folder, remedy="Copy the folder again, or export again.") from error
    return model, config, source


def _fill(model: clip.CLIPModel, config: Config, folder: Path) -> None:
    """Load the weights of an export into the model. Raises what a file of other tensors causes."""
    tensors = weights.TrackedState(load_file(folder / export_record.OPEN_CLIP))
    tower = weights.TrackedState(load_file(folder / export_record.TIMM))
    learned = config.model.image.positions == "learned"
    state = weights.from_timm(tower, learned) | weights.text_from_open_clip(tensors)
    state |= weights.projection_from_open_clip(tensors, config.model.image.layers, config.model.embed)
    what = "the export has parameters that this version does not know"
    remedy = "Use the version of the toolkit that wrote it."
    tensors.refuse_unread(what, folder / export_record.OPEN_CLIP, remedy, ("visual.",))  # these are in the other file
    tower.refuse_unread(what, folder / export_record.TIMM, remedy, () if learned else ("pos_embed",))
    if fold_padding.applies(config.model.text):
        state = fold_padding.unfold_padding_mask(state, config.model.text)
    model.load_state_dict(state)


def check_device(device: str) -> None:
    """Raises ConfigError if this machine has no such device."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if str(device) not in ("cpu", *gpus, *(["cuda"] if gpus else [])):
        remedy = f"There are: {', '.join(['cpu', *gpus])}."
        raise ConfigError("this machine has no such device", "device", device, remedy)


def select_checkpoint(run: RunDir, at: str = "") -> checkpoint_folder.SavedCheckpoint:
    """The checkpoint ``at`` of a run (as in ``load``). Raises ConfigError, which lists the checkpoints, if it is
    absent."""
    checkpoints = checkpoint_folder.checkpoints(run)
    if not checkpoints:
        raise checkpoint_folder.no_checkpoint(run)
    names = [f"{saved.stage}/{saved.samples_seen}" for saved in checkpoints]
    matches = [
        saved for saved, name in zip(checkpoints, names, strict=True) if at in ("", name, f"{name}-{saved.attempt}")
    ]
    if not matches:
        remedy = f"There are: {', '.join(dict.fromkeys(names))}."
        raise ConfigError("this run has no such checkpoint", str(run.checkpoints), at, remedy)
    return matches[-1]
