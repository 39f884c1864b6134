"""A training step as a function of a batch in memory, as the trainer does it with one process."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from flip.config import schema
from flip.config.derived import patches, visible_patch_count
from flip.config.schema import MODEL_PRESETS

OURS = "ours"
LEFT_OUT = "ours, padding left out"
RATE = 2e-5
"""Learning rate: 50 steps with the same batch change the weights and the loss, but do not learn the batch by heart."""


class Case(NamedTuple):
    """Work of a process: a form of a step of one model, at one or several mask ratios."""

    form: str
    size: str
    batch: int
    masks: tuple[str, ...]


def model(size: str, padding: str = "attend") -> schema.Model:
    """A model size in recipe portable."""
    row = MODEL_PRESETS[size]
    image = schema.ImageTower(**row["image"])
    text = schema.TextTower(**row["text"], padding=padding)
    return schema.Model(size, row["embed"], image, text)


def lengths(batch: int, seed: int) -> Any:
    """Tokens per caption, [CLS] included: log-normal around ten words, as alternative texts on the web."""
    drawn = np.random.default_rng(seed).lognormal(np.log(10), 0.55, batch)
    return 1 + drawn.round().clip(1, 31).astype(np.int64)


def tokens_of(batch: int, text: schema.TextTower, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, text.vocabulary, (batch, text.length), dtype=np.int32)
    tokens[np.arange(text.length) >= lengths(batch, seed)[:, None]] = 0
    return tokens


def flip_steps(torch: Any, case: Case, chosen: argparse.Namespace, world: Any = None) -> list[Callable[[], Any]]:
    """Steps of one model at each mask of the case, as flip.training.trainer. Each returns its loss.

    ``world``: this rank, which has its share of the batch and returns the loss of that; by default a single process.
    """
    from flip.common.host import Host
    from flip.config.resolve import _resolve_compute
    from flip.distributed import parallel
    from flip.models import clip as towers
    from flip.training import grad_cache, parameter_groups

    config = schema.Config(model=model(case.size, "mask" if case.form == LEFT_OUT else "attend"))
    config.compute = schema.Compute(chosen.device, chosen.precision, threads=chosen.threads)
    config.resources.gpus = int(chosen.device == "cuda")
    _resolve_compute(config, Host(1, 0))
    if chosen.compile:
        parallel.set_compile_caches()
    if config.compute.deterministic == "yes":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # as flip.distributed.parallel does
    image = config.model.image
    here = world or parallel.World(0, 1, torch.device(chosen.device), None, None)
    config.compute.compile = "yes" if chosen.compile else "no"
    with torch.device("meta"):
        pair = towers.CLIPModel(config.model, config.augment, config.compute.attention)
    parallel.apply_parallelism(pair, here, config.compute)
    towers.init_weights(pair, chosen.seed)
    optimizer = parameter_groups.build(pair.named_parameters(), config.optim)
    for group in optimizer.param_groups:
        group["lr"] = RATE

    def at(mask: str) -> Callable[[], Any]:
        fields = _inputs(torch, config, case.batch, visible_patch_count(image, mask), chosen)
        inputs = tuple(field.chunk(here.size)[here.rank] for field in fields)

        def run() -> Any:
            optimizer.zero_grad(set_to_none=True)
            loss, _ = grad_cache.grad_cache_backward(
                pair, inputs, 1, here.device, parallel.autocast(config.compute, here)
            )
            optimizer.step()
            return loss

        return run

    return [at(mask) for mask in case.masks]


def _inputs(torch: Any, config: schema.Config, batch: int, visible: int, chosen: argparse.Namespace) -> tuple[Any, ...]:
    """A batch as our loader yields it: pixels [b, visible, 3 p p] uint8, patch indices [b, visible], tokens [b,
    length]."""
    from flip.data.masking import visible_patches

    image = config.model.image
    rng = np.random.default_rng(chosen.seed)
    fields = (
        torch.from_numpy(rng.integers(0, 256, (batch, visible, 3 * image.patch**2), dtype=np.uint8)),
        torch.from_numpy(
            visible_patches(chosen.seed, np.zeros(batch, np.int64), np.arange(batch), patches(image), visible)
        ),
        torch.from_numpy(tokens_of(batch, config.model.text, chosen.seed)),
    )
    if chosen.device == "cuda":
        return tuple(field.pin_memory() for field in fields)
    return fields
