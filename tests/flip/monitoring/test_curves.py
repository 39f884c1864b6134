"""Tests of the tags and descriptions of TensorBoard curves, and of the page that lists them."""

import ast
import inspect
import re
import textwrap

from flip.data.storage.client import IOStats
from flip.loss_kinds import all_parameters
from flip.monitoring import curves
from flip.monitoring.collector import PARTS, MetricsCollector
from flip.monitoring.curves import CurvePoints
from flip.monitoring.utilisation import Utilisation
from flip.training.metrics_callback import MetricLines
from flip.training.user_callbacks import UserCallbacks
from lab.documentation import metrics


def line():
    """Return a metric line with a value in every field that has a curve."""
    nested = {"storage": dict.fromkeys(IOStats().flat(), 1.0), "shares": dict.fromkeys(PARTS, 0.1)}
    nested["callback"] = {"GradNoise/noise": 1.0}
    return dict.fromkeys(curves.CURVES, 1.0) | nested | {"step": 1, "samples": 8, "verdict": "compute-bound"}


def test_curve_tags_of_metric_line_have_descriptions():
    tags = CurvePoints().of(line())
    assert {"batch/loss", "system/storage/retries_slowdown", "system/storage/cap"} <= set(tags)
    assert "system/time/communication_share" in tags
    assert "callback/GradNoise/noise" in tags
    missing = [tag for tag in tags if not curves.describe(tag)]
    assert not missing, f"{missing}: describe each in flip/monitoring/curves.py"
    assert curves.describe("system/storage/other") == curves.describe("system/other") == ""


def test_score_tags_have_descriptions():
    (tag,) = curves.scores([{"name": "val-text", "task": "retrieval", "top1": 0.5}])
    assert (tag, curves.describe(tag)) == ("scores/val-text_top1", "Top-1 score on val-text.")


def written_fields():
    """Return the fields of the metric lines that training writes: the keys of the dictionaries in its functions."""
    functions = (
        MetricsCollector.collect, MetricsCollector._compiled, Utilisation.of,
        MetricLines._report, UserCallbacks.reduced,
    )  # fmt: skip
    fields = set(all_parameters())
    for function in functions:
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Dict):
                fields |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                fields.add(ast.literal_eval(node.slice))
    assert {"loss", "mfu", "logit_bias", "seconds", "compiled_graphs", "step"} <= fields
    return fields


def test_every_metric_is_a_curve_or_exempt():
    known = {*curves.CURVES, *curves.WITHOUT_CURVE, *curves.NESTED}
    missing = sorted(written_fields() - known)
    assert not missing, f"{missing}: add each to CURVES, or to WITHOUT_CURVE, in flip/monitoring/curves.py"
    stale = sorted(known - written_fields())
    assert not stale, f"{stale}: no metric line has these: remove them from flip/monitoring/curves.py"
    page = metrics.metrics_page()
    absent = [field for field in sorted(known) if not re.search(rf"^\| `{field}` \|", page, re.MULTILINE)]
    assert not absent, f"{absent}: lab/documentation/metrics.py lists each"


def test_every_counter_of_storage_has_a_description():
    missing = [name for name in IOStats().flat() if not curves.describe(f"system/storage/{name}")]
    assert not missing, f"{missing}: add each to STORAGE in flip/monitoring/curves.py"


def test_page_of_metrics_states_description_of_each_curve():
    rows = [f"| `{field}` | {tag} | {text} " for field, (tag, text) in curves.CURVES.items()]
    assert not [row for row in rows if row not in metrics.metrics_page()]


def test_counter_curve_starts_at_first_nonzero_count():
    points = CurvePoints()
    counts = [points.of({"replaced": replaced}).get("system/replaced_samples") for replaced in (0, 2, 0)]
    assert counts == [None, 2, 0]
