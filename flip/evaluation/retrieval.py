"""Retrieval between images and their captions: R@1, R@5 and R@10 in both directions, several captions per image.

R@k of images: the share of captions whose image is among the k nearest images. R@k of texts: the share of images that
have at least one of their captions among the k nearest captions (as papers on CLIP count it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flip.evaluation.metrics import fingerprint, finite, places, verdict
from flip.runs.errors import DataError

TILE = 1024
"""Rows of the matrix of scores that are held at a time."""
AMONG = (1, 5, 10)


def retrieve(images: Tensor, texts: Tensor, owners: Tensor, name: str) -> dict[str, dict[str, Any]]:
    """What is looked for (``text``, ``image``) -> a verdict. Images (N, E), captions (M, E); m is of ``owners[m]``.

    Of equal scores the one with the lower number counts as better. Raises DataError where an image has no caption,
    Diverged where a feature is not finite.
    """
    finite(images, name), finite(texts, name, "captions")
    own = torch.bincount(owners, minlength=len(images))
    if len(own) and int(own.min()) == 0:
        raise DataError("an image has no caption", name, int((own == 0).nonzero()[0]), "Take it out.")
    found = {
        "text": _texts_of(images, texts, owners, own) | {"chance": float((own / len(texts)).mean())},
        "image": _images_of(images, texts, owners),
    }
    for one in found.values():
        one |= {"images": len(images), "captions": len(texts)}
    return found


def _images_of(images: Tensor, texts: Tensor, owners: Tensor) -> dict[str, Any]:
    behind, first = [], []
    for start in range(0, len(texts), TILE):
        scores = texts[start : start + TILE] @ images.T
        behind.append(places(scores, owners[start : start + TILE]))
        first.append(scores.argmax(dim=1))
    found = verdict(torch.cat(behind), AMONG, 1 / len(images))
    return found | {"predictions": fingerprint(torch.cat(first))}


def _texts_of(images: Tensor, texts: Tensor, owners: Tensor, own: Tensor) -> dict[str, Any]:
    behind, first = [], []
    for start in range(0, len(images), TILE):
        scores = images[start : start + TILE] @ texts.T
        ours = owners[None, :] == torch.arange(start, start + len(scores))[:, None]
        best = scores.masked_fill(~ours, -torch.inf).argmax(dim=1)
        behind.append(places(scores, best))
        first.append(scores.argmax(dim=1))
    return verdict(torch.cat(behind), AMONG, 0.0) | {"predictions": fingerprint(torch.cat(first))}
