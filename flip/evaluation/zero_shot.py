"""Zero-shot classification: each image gets the class whose prompts are nearest (docs/recipe.md, Zero-shot)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flip.distributed.collectives import SINGLE_RANK, RankGroup
from flip.evaluation import prompts
from flip.evaluation.encoders import Encoder
from flip.evaluation.features import embed_texts, nothing
from flip.evaluation.metrics import fingerprint, finite, places, verdict
from flip.runs.errors import DataError

TILE = 4096
"""Images scored at a time."""


def class_embeddings(
    encoder: Encoder, names: Sequence[str], templates: Sequence[str], batch: int = 256, ranks: RankGroup = SINGLE_RANK,
    progress: Callable[[], None] = nothing,
) -> Tensor | None:  # fmt: skip
    """(C, E) fp32 on rank 0, None elsewhere: prompts normalised, averaged over the templates, normalised again.

    ``batch`` prompts are encoded at a time. Collective.
    """
    texts = [prompt for name in names for prompt in prompts.fill(name, templates)]
    found = embed_texts(encoder, texts, batch, ranks, progress)
    if found is None:
        return None
    return torch.nn.functional.normalize(found.unflatten(0, (len(names), len(templates))).mean(dim=1), dim=-1)


def classify(features: Tensor, labels: Tensor, classes: Tensor, name: str) -> dict[str, Any]:
    """Score image features (N, E) with labels (N,) against classes (C, E): a verdict, classes, predictions.

    Of equal scores the class with the lower number counts as better. ``name``: of the data set, for messages. Raises
    DataError where a label has no class, Diverged where a feature is not finite.
    """
    finite(classes, name, "classes"), finite(features, name)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise DataError(f"a label has no class name: there are {len(classes)}", name, int(labels.max()))
    behind, predicted = [], []
    for start in range(0, len(features), TILE):
        scores = features[start : start + TILE] @ classes.T
        behind.append(places(scores, labels[start : start + TILE]))
        predicted.append(scores.argmax(dim=1))
    found = verdict(torch.cat(behind), (1, 5), 1 / len(classes))
    return found | {"classes": len(classes), "predictions": fingerprint(torch.cat(predicted))}
