"""Metrics of data sets whose published score is not the accuracy over all images (``metric`` in datasets.yaml).

They are those of DataComp's evaluation (Gadre et al. 2023, arXiv 2304.14108, appendix N). No value is weighted.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.data.chunk_reader import Sample
from flip.data.decode import DecodeError, label_of

Integers = NDArray[np.integer[Any]]


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
        own, predicted = answers.labels == label, answers.nearest[:, 0] == label
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
        values = np.load(io.BytesIO(bytes(sample["npy"])), allow_pickle=False)
        return [label_of(sample), int(values[column])]
    except KeyError:
        raise DecodeError(f"no metadata 'npy' among its members {sorted(sample)}") from None
    except (ValueError, IndexError, TypeError, EOFError) as error:
        raise DecodeError(f"its metadata cannot be read: {error}") from error
