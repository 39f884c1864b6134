"""Scores of an evaluation: how often the right answer is among the best k, with confidence intervals.

``METRICS`` are those of data sets whose published score is not the accuracy over all images (``metric`` in
datasets.yaml): of DataComp's evaluation (Gadre et al. 2023, arXiv 2304.14108, appendix N). No value is weighted.
"""

import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flip.data.chunk_reader import Sample
from flip.data.decode import DecodeError
from flip.data.manifest import npy_header
from flip.data.sample_members import label_of
from flip.evaluation.metrics.score import score_of
from flip.runs.errors import Diverged

Integers = NDArray[np.integer[Any]]


def accuracy(ranks: Tensor, ks: Sequence[int], chance: float) -> dict[str, Any]:
    """Fields of a result: n, correctK and topK (the share) for each k, chance and interval of top1 (Wilson, 95 %).

    ``ranks`` (n,): number of answers that scored better than the right one.
    """
    n = len(ranks)
    correct = {k: int((ranks < k).sum()) for k in ks}
    shares = {f"top{k}": count / max(n, 1) for k, count in correct.items()}
    counts = {f"correct{k}": count for k, count in correct.items()}
    return {"n": n, **counts, **shares, "chance": chance, "interval": wilson(correct[1], n)}


def format_result(result: Mapping[str, Any]) -> str:
    """A result as a line of the log."""
    score = score_of(result)
    if result["task"] == "retrieval" and result["name"].endswith("-image"):
        of = "captions"
    else:
        of = "images"
    return f"{result['name']}: {score.label} {score.value:.2%} of {result['n']:,} {of}"


def rank_of_target(scores: Tensor, target: Tensor) -> Tensor:
    """Number of columns in each row that score better than column ``target`` (n,); the lower of equal ones is better.

    A comparison with NaN counts as better, so NaN is never right.
    """
    own = scores.gather(1, target[:, None])
    earlier = torch.arange(scores.shape[1]) < target[:, None]
    return (~(scores <= own) | ((scores == own) & earlier)).sum(dim=1)


def rank_targets(
    queries: Tensor, candidates: Tensor, target: Callable[[slice, Tensor], Tensor], tile: int
) -> tuple[Tensor, Tensor]:
    """For each query (n, E) the rank of its target among the candidates (m, E), and the number of the best candidate.

    Scores are computed for ``tile`` queries at a time; ``target`` maps the slice of queries and their scores to
    columns.
    """
    ranks = []
    best = []
    for start in range(0, len(queries), tile):
        rows = slice(start, start + tile)
        scores = queries[rows] @ candidates.T
        ranks.append(rank_of_target(scores, target(rows, scores)))
        best.append(scores.argmax(dim=1))
    return torch.cat(ranks), torch.cat(best)


def check_finite(features: Tensor, dataset: str, what: str = "images") -> None:
    """Raises Diverged if a feature is not finite."""
    broken = int((~features.isfinite()).any(dim=1).sum())
    if broken:
        remedy = "The weights have diverged: evaluate an earlier checkpoint, or train with a lower base_lr."
        raise Diverged(f"the features of {broken} of {len(features)} {what} are not finite", dataset, remedy=remedy)


def digest_of_predictions(predictions: Tensor) -> str:
    """SHA-256 of integers in order, as int32 little-endian."""
    return hashlib.sha256(np.ascontiguousarray(predictions.numpy(), dtype="<i4").tobytes()).hexdigest()


def wilson(correct: int, n: int, z: float = 1.959964) -> list[float]:
    """The 95 % score interval of a share (Wilson 1927) as [low, high]; [0, 1] for n = 0."""
    if n == 0:
        return [0.0, 1.0]
    share = correct / n
    slack = z * z / n
    centre = (share + slack / 2) / (1 + slack)
    half = z / (1 + slack) * math.sqrt(share * (1 - share) / n + slack / (4 * n))
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


class Answers(NamedTuple):
    """What a model answered for the images of a data set."""

    labels: Integers
    """(N,) the right class."""
    nearest: Integers
    """(N, k) classes from the best on."""
    groups: Integers | None
    """(N,) the region or income group of an image; None if the data set has none."""


def mean_per_class(answers: Answers) -> float:
    """Mean over the classes that occur of the share of right images, as scikit-learn's balanced_accuracy_score."""
    right = answers.nearest[:, 0] == answers.labels
    return float(np.mean([right[answers.labels == label].mean() for label in np.unique(answers.labels)]))


def macro_f1(answers: Answers) -> float:
    """Mean F1 over the classes that occur, as scikit-learn's f1_score with average macro and those labels."""
    scores = []
    for label in np.unique(answers.labels):
        own = answers.labels == label
        predicted = answers.nearest[:, 0] == label
        scores.append(2 * (own & predicted).sum() / (own.sum() + predicted.sum()))
    return float(np.mean(scores))


def worst_group(answers: Answers, k: int = 1) -> float:
    """The lowest top-k accuracy of a group, among the groups that occur."""
    assert answers.groups is not None
    right = (answers.nearest[:, :k] == answers.labels[:, None]).any(axis=1)
    return float(min(right[answers.groups == group].mean() for group in np.unique(answers.groups)))


#: ``metric`` of datasets.yaml -> function of the answers.
METRICS: Mapping[str, Callable[[Answers], float]] = {
    "mean_per_class": mean_per_class,
    "macro_f1": macro_f1,
    "worst_group": worst_group,
    "worst_group_top5": partial(worst_group, k=5),
}


def label_and_group(column: int, sample: Sample) -> list[int]:
    """[label, group] of a sample; the group is a column of its metadata, the member ``npy``. Raises DecodeError."""
    try:
        data = bytes(sample["npy"])
        npy_header.check_header(io.BytesIO(data), len(data))
        values = np.load(io.BytesIO(data), allow_pickle=False)
        return [label_of(sample), int(values[column])]
    except KeyError:
        raise DecodeError(f"no metadata 'npy' among its members {sorted(sample)}") from None
    except (ValueError, IndexError, TypeError, EOFError, OverflowError) as error:  # the last: an infinite group
        raise DecodeError(f"its metadata cannot be read: {error}") from error
