"""Zero-shot classification: an image gets the class whose prompts are nearest (docs/recipe.md, Zero-shot)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flip.distributed.collectives import SINGLE_RANK, RankGroup
from flip.evaluation.datasets.prompts import fill_templates
from flip.evaluation.encoding.encoders import Encoder
from flip.evaluation.encoding.features import embed_texts, no_op
from flip.evaluation.metrics.measures import accuracy, check_finite, digest_of_predictions, rank_targets
from flip.runs.errors import DataError

TILE = 4096
"""Images scored at a time."""
SCALES = (0.0, *(10 ** (i / 6) for i in range(13)))
"""Factors of cosine similarities: 0, which has the loss of chance, and 1 to 100."""


def class_embeddings(
    encoder: Encoder, names: Sequence[str], templates: Sequence[str], batch: int = 256,
    ranks: RankGroup = SINGLE_RANK, progress: Callable[[int, int], None] = no_op,
) -> Tensor | None:  # fmt: skip
    """(C, E) fp32 on rank 0, None on others: embeddings of prompts, averaged over templates, of norm 1. Collective."""
    texts = [prompt for name in names for prompt in fill_templates(name, templates)]
    prompts = embed_texts(encoder, texts, batch, ranks, progress)
    if prompts is None:
        return None
    return torch.nn.functional.normalize(prompts.unflatten(0, (len(names), len(templates))).mean(dim=1), dim=-1)


def classify(features: Tensor, labels: Tensor, classes: Tensor, name: str) -> dict[str, Any]:
    """The result of image features (N, E) with labels (N,) and class embeddings (C, E).

    The lower class of equal scores is better. Raises DataError if a label has no class, Diverged if a feature is not
    finite; ``name``: the data set.
    """
    check_finite(classes, name, "classes")
    check_finite(features, name)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        raise DataError(f"a label has no class name: there are {len(classes)}", name, int(labels.max()))
    ranks, predicted = rank_targets(features, classes, lambda rows, _: labels[rows], TILE)
    result = accuracy(ranks, (1, 5), 1 / len(classes)) | {"loss": class_loss(features, labels, classes)}
    return result | {"classes": len(classes), "predictions": digest_of_predictions(predicted)}


def class_loss(features: Tensor, labels: Tensor, classes: Tensor) -> float | None:
    """The contrastive loss of images against the classes at the best of SCALES, so that it depends on features alone.

    Every image counts, where top-1 counts the few that are right: it chooses learning rates. None without images.
    """
    if not len(labels):
        return None
    totals = torch.zeros(len(SCALES), dtype=torch.float64)
    for start in range(0, len(features), TILE):
        rows = slice(start, start + TILE)
        scores = features[rows] @ classes.T
        for i, scale in enumerate(SCALES):
            totals[i] += torch.nn.functional.cross_entropy(scores * scale, labels[rows], reduction="sum").double()
    return round(float(totals.min()) / len(labels), 4)


def nearest_classes(features: Tensor, classes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(N, k) classes nearest to image features (N, E), and their scores; the lower class of equal scores is first.

    ``classes``: embeddings (C, E). With fewer than k classes, all are returned.
    """
    scores = []
    nearest = []
    for start in range(0, len(features), TILE):
        ordered = (features[start : start + TILE] @ classes.T).sort(dim=1, descending=True, stable=True)
        scores.append(ordered.values[:, :k])
        nearest.append(ordered.indices[:, :k])
    return torch.cat(nearest), torch.cat(scores)
