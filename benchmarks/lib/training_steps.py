"""A training step of open_clip, as a function of a batch in memory.

Ours is in ``jobs.measuring.functions.training_step``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

from jobs.measuring.functions.training_step import Case, model, tokens_of

PEER = "open_clip"


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
    tokens = torch.from_numpy(tokens_of(case.batch, text, chosen.seed)).long()
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
