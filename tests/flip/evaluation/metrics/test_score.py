"""Tests of the score by which results are shown and compared."""

import pytest

from flip.evaluation.datasets import catalog
from flip.evaluation.metrics.measures import METRICS
from flip.evaluation.metrics.score import LABELS, Score, score_of

TOP_1 = {"name": "a", "task": "zeroshot", "top1": 0.5, "interval": [0.4, 0.6], "chance": 0.1}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Score(0.5, "top-1", 0.1, (0.4, 0.6))),
        ({"task": "probe"}, Score(0.5, "top-1", 0.1, (0.4, 0.6))),
        ({"task": "retrieval"}, Score(0.5, "R@1", 0.1, (0.4, 0.6))),
        ({"metric": "worst_group_top5", "score": 0.3}, Score(0.3, "worst-group top-5")),
        ({"metric": "macro_f1", "score": 0.5}, Score(0.5, "macro F1")),
        ({"metric": "mean_per_class", "score": 0.3}, Score(0.3, "mean per class", 0.1)),
        ({"metric": "jaccard", "score": 0.5, "chance": 0.0}, Score(0.5, "Jaccard index", None, (0.4, 0.6))),
        ({"metric": "mean_average", "score": 0.3}, Score(0.3, "mean average")),
    ],
)
def test_score_has_name_chance_and_interval_of_its_metric(fields, expected):
    assert score_of(TOP_1 | fields) == expected


def test_score_without_chance_and_interval_is_its_value():
    assert score_of({"name": "a", "top1": 0.5}) == Score(0.5, "top-1")


def test_every_metric_has_label():
    published = {entry["metric"] for entry in catalog.entries().values() if "metric" in entry}
    assert set(METRICS) | published <= set(LABELS)
