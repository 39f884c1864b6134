"""Zero-shot classification: exact counts over all ranks, every image once (docs/recipe.md, Zero-shot)."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from flip.config import schema
from flip.config.stages import patches as patch_count
from flip.data.loader import evaluation
from flip.data.manifest import Manifest
from flip.data.retry import Patience
from flip.evaluate import prompts
from flip.exitcodes import DataError, Diverged
from flip.model import Pair
from flip.tokenizer import Tokenizer

PLAIN: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


@torch.no_grad()
def class_embeddings(
    pair: Pair,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[str],
    batch: int = 256,
    device: torch.device | str = "cpu",
    autocast: contextlib.AbstractContextManager[Any] = PLAIN,
) -> Tensor:
    """(C, E) fp32 on ``device``: prompts normalised, averaged over the templates, normalised again.

    ``batch`` prompts are encoded at a time.
    """
    texts = [prompt for name in names for prompt in prompts.fill(name, templates)]
    parts = []
    for start in range(0, len(texts), batch):
        tokens = torch.from_numpy(tokenizer(texts[start : start + batch])).to(device)
        with autocast:
            parts.append(pair.encode_text(tokens))
    mean = torch.cat(parts).unflatten(0, (len(names), len(templates))).mean(dim=1)
    return torch.nn.functional.normalize(mean, dim=-1)


@torch.no_grad()
def zeroshot(
    pair: Pair,
    item: schema.ZeroShot,
    tokenizer: Tokenizer,
    image: schema.ImageTower,
    batch: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    autocast: contextlib.AbstractContextManager[Any] = PLAIN,
    group: Any = None,
    progress: Callable[[], None] = lambda: None,
    patience: Patience | None = None,
) -> dict[str, Any]:
    """Score one data set with all patches visible. Collective: call it on all ranks, ``group`` reduces CPU tensors.

    ``progress`` is called after every batch of images. ``patience``: with the storage that they are read from.

    The result, equal on all ranks but for the seconds: name, role, top1 and top5 (shares), n, correct1, correct5,
    classes, chance (of top1), interval ([lo, hi] of top1, Wilson 95 %), seconds, and the manifest's digest. Of equal
    scores the class with the lower number counts as better. Raises ConfigError, DataError, and on all ranks Diverged
    where a score is not finite.
    """
    begin = time.perf_counter()
    wording, manifest = prompts.read(item.classes), Manifest.load(item.manifest)
    classes = class_embeddings(pair, tokenizer, wording.names, wording.templates, batch, device, autocast)
    counts = torch.zeros(4, dtype=torch.int64)
    source = evaluation(manifest, image, rank, world, batch, patience=patience)
    for pixels, labels in _together(source, image, world, group):
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise DataError("a label has no class name", f"{item.name}: {item.classes}", int(labels.max()))
        with autocast:
            features = pair.encode_image(pixels.to(device))
        counts += _correct((features[: len(labels)] @ classes.T).cpu(), labels)
        progress()
    if world > 1:
        distributed.all_reduce(counts, group=group)
    n, correct1, correct5, broken = counts.tolist()
    if broken:
        remedy = "The weights have diverged: evaluate an earlier checkpoint, or train with a lower base_lr."
        raise Diverged(f"the scores of {broken} of {n} images are not finite", item.name, remedy=remedy)
    return {
        "name": item.name, "role": item.role, "n": n, "correct1": correct1, "correct5": correct5,
        "top1": correct1 / max(n, 1), "top5": correct5 / max(n, 1), "classes": len(classes), "chance": 1 / len(classes),
        "interval": wilson(correct1, n), "seconds": time.perf_counter() - begin, "manifest": manifest.digest,
    }  # fmt: skip


def _together(
    source: Iterator[tuple[Any, Any, Any]], image: schema.ImageTower, world: int, group: Any
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's (patches, labels), as many times as the rank with most has: encoding is collective under sharding.

    A rank that has run out gives one grey image without a label.
    """
    filler = torch.full((1, patch_count(image), 3 * image.patch**2), 127, dtype=torch.uint8)
    while True:
        part = next(source, None)
        going = torch.tensor([int(part is not None)])
        if world > 1:
            distributed.all_reduce(going, op=distributed.ReduceOp.MAX, group=group)
        if not going:
            return
        if part is None:
            yield filler, torch.zeros(0, dtype=torch.int64)
        else:
            yield torch.from_numpy(part[0]), torch.from_numpy(part[1])


def _correct(scores: Tensor, labels: Tensor) -> Tensor:
    """(n, C) and (n,) -> [n, right at first, right among five, rows not finite], int64. NaN is never right."""
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1]) < labels[:, None]
    better = (~(scores <= own) | ((scores == own) & earlier)).sum(dim=1)
    right = [int((better < k).sum()) for k in (1, 5)]
    return torch.tensor([len(labels), *right, int((~scores.isfinite()).any(dim=1).sum())])


def wilson(correct: int, n: int, z: float = 1.959964) -> list[float]:
    """The 95 % score interval of a share (Wilson 1927) as [lo, hi]; [0, 1] of nothing."""
    if n == 0:
        return [0.0, 1.0]
    share, slack = correct / n, z * z / n
    centre = (share + slack / 2) / (1 + slack)
    half = z / (1 + slack) * math.sqrt(share * (1 - share) / n + slack / (4 * n))
    return [max(centre - half, 0.0), min(centre + half, 1.0)]
