"""A trained model, ready for use: ``flip.load(run)``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.distributed import checkpoint as dcp

from flip import commit, model
from flip.checkpoint import model_state
from flip.config import load as configuration
from flip.config.schema import Config
from flip.data import decode
from flip.evaluate import prompts
from flip.evaluate.encoder import PairEncoder
from flip.evaluate.zeroshot import class_embeddings
from flip.exitcodes import ConfigError, DataError
from flip.remote import at_hand
from flip.rundir import RunDir
from flip.tokenizer import Tokenizer

Picture = Image.Image | str | os.PathLike[str]


class Loaded:
    """The pair of a run's commit on one device, in fp32, with the run's own tokenizer and view of an image."""

    def __init__(self, pair: model.Pair, config: Config, source: commit.Commit, device: str) -> None:
        self.pair, self.config, self.source, self.device = pair.to(device).eval(), config, source, device
        self.tokenizer = Tokenizer.of(config.data.tokenizer, config.model.text)

    @torch.no_grad()
    def encode_image(self, images: Sequence[Picture], batch: int = 64) -> Tensor:
        """(n, E) fp32 on the CPU, of norm 1. ``images``: PIL images or paths. Raises DataError, naming the image."""
        features = [torch.empty(0, self.config.model.embed)]
        for start in range(0, len(images), batch):
            views = np.stack([self._patches(picture) for picture in images[start : start + batch]])
            features.append(self.pair.encode_image(torch.from_numpy(views).to(self.device)).cpu())
        return torch.cat(features)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """(n, E) fp32 on the CPU, of norm 1."""
        features = [torch.empty(0, self.config.model.embed)]
        for start in range(0, len(texts), batch):
            tokens = torch.from_numpy(self.tokenizer(texts[start : start + batch]))
            features.append(self.pair.encode_text(tokens.to(self.device)).cpu())
        return torch.cat(features)

    @torch.no_grad()
    def classify(self, images: Sequence[Picture], labels: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """(n, len(labels)) probabilities: softmax of the scaled cosines, at the temperature of training."""
        prompts.check(prompts.Prompts(list(labels), list(templates)), "labels")
        encoder = PairEncoder(self.pair, self.tokenizer, self.config.model.image, self.device)
        classes = class_embeddings(encoder, labels, templates)
        assert classes is not None  # a single process
        scale = self.pair.logit_scale.cpu().clamp(0.0, self.pair.max_logit_scale).exp()
        return (scale * self.encode_image(images) @ classes.T).softmax(dim=-1)

    def _patches(self, picture: Picture) -> decode.Pixels:
        """All patches (P, p*p*3) uint8 of the central square, as evaluation sees them."""
        tower = self.config.model.image
        if isinstance(picture, Image.Image):
            ground = Image.new("RGBA", picture.size, "white")
            ground.alpha_composite(picture.convert("RGBA"))
            pixels = np.asarray(ground.convert("RGB"))
        else:
            try:
                pixels = decode.decode(Path(picture).read_bytes())
            except OSError as error:
                raise DataError(f"cannot be read: {error.strerror}", str(picture)) from error
            except decode.Undecodable as error:
                raise DataError("is no image that can be decoded", str(picture)) from error
        return decode.patches(decode.evaluation_view(pixels, tower.size), tower.patch)


def load(run: str | os.PathLike[str], device: str = "cpu") -> Loaded:
    """The newest commit of a run directory (its weights alone), verified before it is read.

    Raises ConfigError where there is no run, no commit or no such device, DataError where the commit is damaged.
    """
    where = RunDir(run)
    if not where.config.is_file():
        remedy = "Give the folder of a run, such as runs/quickstart/mask50."
        raise ConfigError("no run here: config.yaml is missing", str(where.path), remedy=remedy)
    cards = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if str(device) not in ("cpu", *cards, *(["cuda"] if cards else [])):
        remedy = f"There are: {', '.join(['cpu', *cards])}."
        raise ConfigError("this machine has no such device", "device", device, remedy)
    config, found = configuration.read(where.config), commit.commits(where)
    if not found:
        raise ConfigError("this run has no checkpoint yet", str(where.checkpoints), remedy="Let it train to its first.")
    source = found[-1]
    pair = model.build(config.model, config.augment, "sdpa")
    try:
        with at_hand(source) as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(model_state(pair), storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    except commit.Damaged as error:
        remedy = "Move that folder away to use the commit before it."
        raise DataError(f"the newest checkpoint is damaged: {error}", str(source.path), remedy=remedy) from error
    return Loaded(pair, config, source, device)
