"""Retrieval between images and captions: R@1, R@5 and R@10 in both directions, with several captions per image.

R@k of images is the share of captions whose image is among the k nearest. R@k of texts is the share of images that have
any of their captions among the k nearest (as papers on CLIP count it).
"""

from typing import Any

import torch
from torch import Tensor

from flip.evaluation.metrics.measures import accuracy, check_finite, digest_of_predictions, rank_targets
from flip.runs.errors import DataError

TILE = 1024
"""Rows of the score matrix in memory at a time."""
KS = (1, 5, 10)


def retrieve(images: Tensor, texts: Tensor, owners: Tensor, name: str) -> dict[str, dict[str, Any]]:
    """Results by what is searched, ``text`` or ``image``. Images (N, E), captions (M, E); caption m is of
    ``owners[m]``.

    The lower number of equal scores is better. Raises DataError if an image has no caption, Diverged if a feature is
    not finite.
    """
    check_finite(images, name)
    check_finite(texts, name, "captions")
    captions = torch.bincount(owners, minlength=len(images))
    if len(captions) and int(captions.min()) == 0:
        raise DataError("an image has no caption", name, int((captions == 0).nonzero()[0]), "Take it out.")

    def best_caption(rows: slice, scores: Tensor) -> Tensor:
        own = owners[None, :] == torch.arange(rows.start, rows.start + len(scores))[:, None]
        return scores.masked_fill(~own, -torch.inf).argmax(dim=1)

    ranks, nearest = rank_targets(images, texts, best_caption, TILE)
    text = accuracy(ranks, KS, 0.0) | {"predictions": digest_of_predictions(nearest)}
    text["chance"] = float((captions / len(texts)).mean())
    ranks, nearest = rank_targets(texts, images, lambda rows, _: owners[rows], TILE)
    image = accuracy(ranks, KS, 1 / len(images)) | {"predictions": digest_of_predictions(nearest)}
    counts = {"images": len(images), "captions": len(texts)}
    return {"text": text | counts, "image": image | counts}
