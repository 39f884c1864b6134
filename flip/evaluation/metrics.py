"""The one shape of a result: how often what is right was among the first 1, 5, 10, of how many."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flip.runs.errors import Diverged


def verdict(places: Tensor, among: Sequence[int], chance: float) -> dict[str, Any]:
    """``places`` (n,): how many answers were thought better than the best right one; ``among``: 1, 5, ...

    n, and for each k correctK and topK (their share), interval ([lo, hi] of top1, Wilson 95 %), chance (of top1).
    """
    n = len(places)
    correct = {k: int((places < k).sum()) for k in among}
    shares = {f"top{k}": count / max(n, 1) for k, count in correct.items()}
    counts = {f"correct{k}": count for k, count in correct.items()}
    return {"n": n, **counts, **shares, "chance": chance, "interval": wilson(correct[1], n)}


def told(result: Mapping[str, Any]) -> str:
    """A result as a line of a log. Of captions that look for their image, the number is that of captions."""
    retrieval = result["task"] == "retrieval"
    of = "captions" if retrieval and result["name"].endswith("-image") else "images"
    share = f"{'R@1' if retrieval else 'top-1'} {result['top1']:.2%}"
    return f"{result['name']}: {share} of {result['n']:,} {of}"


def places(scores: Tensor, own: Tensor) -> Tensor:
    """How many columns of each row are better than column ``own`` (n,); of equal ones the lower number is better.

    NaN is never right: any comparison with it counts as better.
    """
    mine = scores.gather(1, own[:, None])
    earlier = torch.arange(scores.shape[1]) < own[:, None]
    return (~(scores <= mine) | ((scores == mine) & earlier)).sum(dim=1)


def finite(features: Tensor, of: str, what: str = "images") -> Tensor:
    """The features, which must be numbers. Raises Diverged."""
    broken = int((~features.isfinite()).any(dim=1).sum())
    if broken:
        remedy = "The weights have diverged: evaluate an earlier checkpoint, or train with a lower base_lr."
        raise Diverged(f"the features of {broken} of {len(features)} {what} are not finite", of, remedy=remedy)
    return features


def fingerprint(predictions: Tensor) -> str:
    """SHA-256 of whole numbers in order, as int32 little-endian: equal for equal predictions, image by image."""
    return hashlib.sha256(np.ascontiguousarray(predictions.numpy(), dtype="<i4").tobytes()).hexdigest()


def wilson(correct: int, n: int, z: float = 1.959964) -> list[float]:
    """The 95 % score interval of a share (Wilson 1927) as [lo, hi]; [0, 1] of nothing."""
    if n == 0:
        return [0.0, 1.0]
    share, slack = correct / n, z * z / n
    centre = (share + slack / 2) / (1 + slack)
    half = z / (1 + slack) * math.sqrt(share * (1 - share) / n + slack / (4 * n))
    return [max(centre - half, 0.0), min(centre + half, 1.0)]
