"""The first weights of a run, if not from its seed: those of another run's commit or an export (``init``).

``apply`` does what ``flip.training.warm_start`` has found. An image or patch size may differ: patch weights are
resampled.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flip.checkpoint.restorer import CheckpointRestorer
from flip.checkpoint.saver import model_state
from flip.config import merge
from flip.config.schema import Config
from flip.distributed.watchdog import LONG, Watchdog
from flip.models import clip
from flip.runs import commit
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir
from flip.tokenizer import Tokenizer
from flip.training.warm_start import agree, as_they_are, open_commit, open_export

log = logging.getLogger(__name__)


def apply(pair: clip.Pair, config: Config, restorer: CheckpointRestorer, watchdog: Watchdog) -> commit.Commit | None:
    """Fill the weights of a run without commits as ``init`` says, if it says anything. Collective.

    Returns the commit of another run to continue from if ``init.extend`` is set, else None.
    """
    init = config.init
    if init.export:
        _convert(pair, config, restorer, watchdog, open_export(init))
    elif init.run:
        source = restorer.open_other(lambda: open_commit(init), init.run)
        if init.extend:
            return source
        if as_they_are(config, merge.read(RunDir(init.run).config)):
            restorer.load(source, model_state(pair))
        else:
            _convert(pair, config, restorer, watchdog, Path(init.run), f"{source.stage}/{source.path.name}")
    return None


def _convert(
    pair: clip.Pair, config: Config, restorer: CheckpointRestorer, watchdog: Watchdog, source: Path, at: str = ""
) -> None:
    """Fill the weights with those of another model, converted by each rank for itself."""
    watchdog.beat(f"beginning from {source}", times=LONG)
    made = begin_from(pair, config, source, at)
    restorer.parent = f"{source}/checkpoints/{at}" if at else str(source)
    differs = "; ".join(f"{key}: {there} there, {here} here" for key, (there, here) in made["differs"].items())
    if restorer.world.first:
        log.info("begins with the weights of %s; %s", source, differs or "it is the same model")


@torch.no_grad()
def begin_from(pair: clip.Pair, config: Config, source: str | os.PathLike[str], at: str = "") -> dict[str, Any]:
    """Fill ``pair``, built for ``config``, with the weights of a run or an export, verified. Each rank reads it.

    ``source``, ``at``: as ``flip.load`` takes them. Positions are computed from ``config``, so another image size or
    patch needs nothing there; patch weights of another side are resampled. Returns a record of it: source, run, stage,
    samples, manifest, and ``differs``: key -> [there, here] of what is another function of the same weights.
    Raises ConfigError where model or tokenizer do not fit, DataError where the source is damaged.
    """
    from flip.export.load import load

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
    from timm.layers.patch_embed import resample_patch_embed

    from flip.export import weights

    return weights.as_matrix(resample_patch_embed(weights.as_convolution(weight), [patch, patch]))
