"""The score by which a result of an evaluation is shown and compared: value, name, chance level and interval.

Tables, reports, figures, logs and model cards read results through ``score_of``. Most data sets are compared by top-1,
retrieval by R@1, and some by another metric (``metric`` in datasets.yaml). No torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOP_1 = "top-1"
RECALL = "R@1"
LABELS = {
    "mean_per_class": "mean per class",
    "macro_f1": "macro F1",
    "worst_group": "worst-group top-1",
    "worst_group_top5": "worst-group top-5",
    "jaccard": "Jaccard index",
}
"""Metric of a result -> its name for readers."""

_OWN_INTERVAL = ("", "jaccard")
"""Metrics to which the interval of a result belongs. For all others it is that of top-1."""
_OWN_CHANCE = ("", "mean_per_class")
"""Metrics whose value for random answers is that of top-1: the recorded chance level. It is unknown for the others."""


@dataclass(frozen=True)
class Score:
    """A score, 0..1. ``interval``: 95 %, None if none was computed. ``chance``: None if unknown."""

    value: float
    label: str
    chance: float | None = None
    interval: tuple[float, float] | None = None


def score_of(result: Mapping[str, Any]) -> Score:
    """The score of one result. Without a metric of its own it is accuracy or recall."""
    metric = str(result.get("metric", ""))
    chance = None
    interval = None
    if metric in _OWN_CHANCE:
        chance = result.get("chance")
    if metric in _OWN_INTERVAL and result.get("interval"):
        low, high = result["interval"]
        interval = low, high
    return Score(result.get("score", result["top1"]), _label(result, metric), chance, interval)


def _label(result: Mapping[str, Any], metric: str) -> str:
    if metric:
        return LABELS.get(metric, metric.replace("_", " "))
    if result.get("task") == "retrieval":
        return RECALL
    return TOP_1
