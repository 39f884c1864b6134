"""Tests of the tags and descriptions of TensorBoard curves, and of their table in docs/monitoring.md."""

from pathlib import Path

from flip.config.schema import Config, Evaluate, EvaluationSet
from flip.data.storage.client import IOStats
from flip.monitoring import curves
from flip.monitoring.collector import PARTS
from flip.monitoring.curves import CurvePoints

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "monitoring.md").read_text(encoding="utf-8")


def line():
    """Return a metric line with a value in every field that has a curve."""
    nested = {"storage": dict.fromkeys(IOStats().flat(), 1.0), "shares": dict.fromkeys(PARTS, 0.1)}
    return dict.fromkeys(curves.CURVES, 1.0) | nested | {"step": 1, "samples": 8, "verdict": "compute-bound"}


def test_curve_tags_of_metric_line_have_descriptions():
    tags = CurvePoints().of(line())
    assert {"train/loss", "storage/retries_slowdown", "storage/cap", "time/communication_share"} <= set(tags)
    assert [tag for tag in tags if not curves.describe(tag)] == []
    assert curves.describe("storage/other") == curves.describe("train/other") == ""


def test_score_tags_have_descriptions():
    sets = [EvaluationSet(name="val", task=task) for task in ("zeroshot", "retrieval", "probe")]
    tags = curves.score_tags(Config(evaluate=Evaluate(sets=sets)))
    assert [curves.describe(tag) for tag in tags] == [
        "Top-1 score on val, task zeroshot.", "Top-1 score on val-text, task retrieval.",
        "Top-1 score on val-image, task retrieval.", "Top-1 score on val-probe, task probe.",
    ]  # fmt: skip


def test_monitoring_page_states_description_of_each_curve():
    rows = [f"| `{field}` | {tag} | {text} " for field, (tag, text) in curves.CURVES.items()]
    assert [row for row in rows if row not in PAGE] == []


def test_counter_curve_starts_at_first_nonzero_count():
    points = CurvePoints()
    counts = [points.of({"replaced": replaced}).get("data/replaced_samples") for replaced in (0, 2, 0)]
    assert counts == [None, 2, 0]
