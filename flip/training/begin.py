"""A model that begins with the weights of another: a run's commit or an export, of another image or patch size too."""

from __future__ import annotations

import os
from typing import Any

import torch
from timm.layers.patch_embed import resample_patch_embed
from torch import Tensor

from flip.config.schema import Config
from flip.export import weights
from flip.export.load import load
from flip.models import clip
from flip.runs.errors import ConfigError
from flip.tokenizer import Tokenizer
from flip.training.agree import agree


@torch.no_grad()
def begin_from(pair: clip.Pair, config: Config, source: str | os.PathLike[str], at: str = "") -> dict[str, Any]:
    """Fill ``pair``, built for ``config``, with the weights of a run or an export, verified. Each rank reads it.

    ``source``, ``at``: as ``flip.load`` takes them. Positions are computed from ``config``, so another image size or
    patch needs nothing there; patch weights of another side are resampled. Returns a record of it: source, run, stage,
    samples, manifest, and ``differs``: key -> [there, here] of what is another function of the same weights.
    Raises ConfigError where model or tokenizer do not fit, DataError where the source is damaged.
    """
    other = load(source, at=at, url=config.checkpoint.url)
    differs = agree(config, other.config, str(source))
    own = Tokenizer.of(config.data.tokenizer, config.model.text)
    if own.to_json() != Tokenizer.of(other.tokenizer.path, config.model.text).to_json():
        remedy = f"Use that model's own, {other.tokenizer.path}: its embedding knows no other ids."
        raise ConfigError(f"is not the tokenizer of {source}", "data.tokenizer", config.data.tokenizer, remedy)
    theirs = dict(other.pair.named_parameters())
    for name, parameter in pair.named_parameters():
        if name in theirs:  # one that lacks it leaves us our logit_bias
            value = theirs[name].detach()
            if name == "image.patch.weight":
                value = resampled(value, config.model.image.patch)
            parameter.copy_(clip.part(value, parameter))
    found = other.source.record
    return {"source": str(source), "differs": differs} | {
        name: found.get(name) for name in ("run", "stage", "samples", "attempt", "manifest")
    }


def resampled(weight: Tensor, patch: int) -> Tensor:
    """Patch weights (D, q*q*3) -> (D, p*p*3), p = ``patch``: what they make of a patch that is resized from q to p.

    That is the pseudo-inverse of the resize (FlexiViT, arXiv 2212.08013, section 3.4), exact where p > q.
    """
    return weights.as_matrix(resample_patch_embed(weights.as_convolution(weight), [patch, patch]))
