"""A training step, ours and open_clip's, as a function of a batch in memory."""

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
PEER = "open_clip"


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


def _tokens(batch: int, text: schema.TextTower, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, text.vocabulary, (batch, text.length), dtype=np.int32)
    tokens[np.arange(text.length) >= lengths(batch, seed)[:, None]] = 0
    return tokens


def flip_steps(torch: Any, case: Case, chosen: argparse.Namespace) -> list[Callable[[], Any]]:
    """Steps of one model at each mask of the case, as flip.training.trainer with one process."""
    from flip.config.host import Host
    from flip.config.resolve import _resolve_compute
    from flip.distributed import parallel
    from flip.models import clip as towers
    from flip.training import grad_cache
    from flip.training import optimizer as optim

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
    device = torch.device(chosen.device)
    pair = towers.CLIPModel(config.model, config.augment, config.compute.attention)
    towers.init_weights(pair, chosen.seed)
    here = parallel.World(0, 1, device, None, None)
    config.compute.compile = "yes" if chosen.compile else "no"
    parallel.apply_parallelism(pair, here, config.compute)
    optimizer = optim.build(pair.named_parameters(), config.optim)

    def at(mask: str) -> Callable[[], None]:
        inputs = _inputs(torch, config, case.batch, visible_patch_count(image, mask), chosen)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            grad_cache.grad_cache_backward(pair, inputs, 1, device, parallel.autocast(config.compute, here))
            optimizer.step()

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
        torch.from_numpy(_tokens(batch, config.model.text, chosen.seed)),
    )
    if chosen.device == "cuda":
        return tuple(field.pin_memory() for field in fields)
    return fields


def peer(torch: Any, case: Case, chosen: argparse.Namespace) -> list[Callable[[], Any]]:
    """open_clip's modules, combined as in its trainer; one mask ratio, as it is part of its model."""
    from open_clip import CLIP, ClipLoss

    config = model(case.size)
    device = torch.device(chosen.device)
    image = config.image
    text = config.text
    more = {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}}
    vision = {"image_size": image.size, "patch_size": image.patch, "width": image.width, "layers": image.layers}
    vision |= {"head_width": image.width // image.heads, "no_ln_pre": True, "pool_type": "avg"}
    vision |= {"pos_embed_type": "sin_cos_2d", "patch_dropout": float(case.masks[0])}
    words = {"context_length": text.length, "vocab_size": text.vocabulary, "width": text.width, "heads": text.heads}
    words |= {"layers": text.layers, "no_causal_mask": True, "pool_type": "first"}
    pair = CLIP(config.embed, vision | more, words | more, output_dict=True).to(device).train()
    spared = []
    decayed = []
    for name, p in pair.named_parameters():
        if p.requires_grad:
            (spared if p.ndim < 2 or "ln" in name or "logit_scale" in name else decayed).append(p)
    groups = [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), eps=1e-8)
    encode = torch.compile(pair) if chosen.compile else pair
    loss = ClipLoss()
    bf16 = chosen.precision == "bf16"
    pixels = torch.randn(case.batch, 3, image.size, image.size)
    tokens = torch.from_numpy(_tokens(case.batch, text, chosen.seed)).long()
    if chosen.device == "cuda":
        pixels = pixels.pin_memory()
        tokens = tokens.pin_memory()

    def run() -> None:
        optimizer.zero_grad()
        images = pixels.to(device, non_blocking=True)
        texts = tokens.to(device, non_blocking=True)
        with torch.autocast(chosen.device, torch.bfloat16, enabled=bf16):
            loss(**encode(images, texts)).backward()
        optimizer.step()
        with torch.no_grad():
            pair.logit_scale.clamp_(0, float(np.log(100)))

    return [run]
