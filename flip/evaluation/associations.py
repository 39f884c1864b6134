"""Task ``association``: which of several images belong to a cue (WinoGAViL, Bitton et al. 2022, arXiv 2207.12576).

The folder of the data set has ``associations.jsonl``, an instance per line, and the images below ``images/``:

    {"cue": "pogonophile", "candidates": ["bison.jpg", ...], "associations": ["bison.jpg", ...]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flip.evaluation.images import File
from flip.runs.errors import DataError
from flip.runs.files import read_regular

if TYPE_CHECKING:
    from torch import Tensor

FILE = "associations.jsonl"
LIMIT = 64 << 20
"""Largest file of instances that is read, bytes."""
LARGE = 10
"""The published score is the mean over instances with at least so many candidates (10 or 12)."""


class Association(NamedTuple):
    """One instance: a cue, and the numbers of its candidate images; the first ``right`` of them belong to the cue."""

    cue: str
    candidates: list[int]
    right: int


def read(folder: str) -> tuple[list[File], list[Association]]:
    """The images of all instances, each once, and the instances. Raises DataError."""
    path, numbers, instances = Path(folder) / FILE, dict[str, int](), list[Association]()
    try:
        lines = read_regular(path, LIMIT).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        remedy = "Write it from the published data: docs/evaluation.md, Suites."
        raise DataError("the instances cannot be read", str(path), str(error), remedy) from error
    for n, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            right = list(row["associations"])
            names = [*right, *(name for name in row["candidates"] if name not in right)]
            if not right or not set(right) <= set(row["candidates"]):
                raise ValueError("its associations are not among its candidates")
            candidates = [numbers.setdefault(str(name), len(numbers)) for name in names]
            instances.append(Association(str(row["cue"]), candidates, len(right)))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"line {n} is no instance: {type(error).__name__} {error}", str(path)) from error
    return [File(str(path.parent / "images" / name), number) for name, number in numbers.items()], instances


def prompt(cue: str) -> str:
    """The text of a cue."""
    return f"{'An' if cue[:1].lower() in 'aeiou' else 'A'} {cue.lower()}"


def score(instances: Sequence[Association], images: Tensor, cues: Tensor) -> dict[str, Any]:
    """The mean Jaccard index of the nearest images and the right ones, over the instances with 10 or 12 candidates.

    ``images`` (N, E), ``cues`` (instances, E). As many images are chosen as belong to the cue. ``interval`` is that of
    a mean (95 %, normal).
    """
    import torch  # submission reads the instances without it

    values = []
    for instance, cue in zip(instances, cues, strict=True):
        near = (images[instance.candidates] @ cue).argsort(descending=True, stable=True)[: instance.right]
        common = int((near < instance.right).sum())
        values.append(common / (2 * instance.right - common))
    large = [v for v, instance in zip(values, instances, strict=True) if len(instance.candidates) >= LARGE]
    chosen = torch.tensor(large or values, dtype=torch.float64)
    mean, half = float(chosen.mean()), 1.96 * float(chosen.std()) / math.sqrt(len(chosen)) if len(chosen) > 1 else 1.0
    interval = [max(0.0, mean - half), min(1.0, mean + half)]
    return {"n": len(chosen), "top1": mean, "interval": interval, "all": float(torch.tensor(values).mean())}
