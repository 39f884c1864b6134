"""Task ``association``: which of several images belong to a cue (WinoGAViL, Bitton et al. 2022, arXiv 2207.12576)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flip.evaluation.datasets.associations import Association

LARGE = 10
"""The published score is the mean over instances with at least so many candidates (10 or 12)."""


def prompt(cue: str) -> str:
    """The text of a cue."""
    return f"{'An' if cue[:1].lower() in 'aeiou' else 'A'} {cue.lower()}"


def score(instances: Sequence[Association], images: Tensor, cues: Tensor) -> dict[str, Any]:
    """The mean Jaccard index of the nearest images and the right ones, over the instances with 10 or 12 candidates.

    ``images`` (N, E), ``cues`` (instances, E). As many images are chosen as belong to the cue. ``interval`` is that of
    a mean (95 %, normal).
    """
    values = []
    for instance, cue in zip(instances, cues, strict=True):
        near = (images[instance.candidates] @ cue).argsort(descending=True, stable=True)[: instance.right]
        common = int((near < instance.right).sum())
        values.append(common / (2 * instance.right - common))
    large = [v for v, instance in zip(values, instances, strict=True) if len(instance.candidates) >= LARGE]
    chosen = torch.tensor(large or values, dtype=torch.float64)
    mean = float(chosen.mean())
    half = 1.96 * float(chosen.std()) / math.sqrt(len(chosen)) if len(chosen) > 1 else 1.0
    interval = [max(0.0, mean - half), min(1.0, mean + half)]
    return {"n": len(chosen), "top1": mean, "interval": interval, "all": float(torch.tensor(values).mean())}
