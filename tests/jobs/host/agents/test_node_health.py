"""Tests which nodes are excluded after the health checks of an allocation."""

import pytest

from flip.runs.checks import FAILS, FAILS_FOR_ALL, OK, UNKNOWN, Check, check_of
from jobs.host.agents.node_health import PRODUCT, SHARED_FOLDER, judge


def nodes(check, *results):
    """Results of one check on nodes n0, n1, ..."""
    return {f"n{i}": [Check(result, f"evidence of n{i}", name=check)] for i, result in enumerate(results)}


def speeds(model, row):
    return tuple((f"{model}, GPU {j}", 1e12 * rate) for j, rate in enumerate(row))


def rated(*rates, model="H100"):
    return {f"n{i}": [Check(OK, "", name=PRODUCT, rates=speeds(model, row))] for i, row in enumerate(rates)}


@pytest.mark.parametrize(
    ("check", "results", "excluded", "common"),
    [
        ("GPUs", (OK, OK), [], []),
        ("GPUs", (OK, FAILS, OK), ["n1"], []),
        ("GPUs", (OK, FAILS), ["n1"], []),  # half of the nodes are not most
        ("GPUs", (FAILS, FAILS, OK), [], ["GPUs"]),
        ("GPUs", (FAILS,), ["n0"], []),
        ("GPUs", (FAILS, UNKNOWN, UNKNOWN), ["n0"], []),
        (SHARED_FOLDER, (OK, OK, FAILS), ["n2"], []),
        (SHARED_FOLDER, (FAILS, FAILS, FAILS, OK), [], [SHARED_FOLDER]),
        (SHARED_FOLDER, (FAILS,), [], [SHARED_FOLDER]),  # the only node shows nothing about the storage
        (SHARED_FOLDER, (FAILS_FOR_ALL, OK), [], [SHARED_FOLDER]),  # a full disk, which n0 was the first to notice
        (SHARED_FOLDER, (FAILS, FAILS_FOR_ALL, OK, OK, OK), [], [SHARED_FOLDER]),
    ],
)
def test_judge_excludes_node_but_not_most_nodes(check, results, excluded, common):
    verdict = judge(nodes(check, *results))
    assert list(verdict.excluded) == excluded
    assert list(verdict.common) == common
    for node, evidence in verdict.excluded.items():
        assert evidence == f"{check}: evidence of {node}"
    for evidence in verdict.common.values():
        assert "evidence of n0" in evidence and f"of {len(results)} nodes" in evidence


def test_judge_names_every_failed_check_of_node():
    rows = {"n0": [Check(FAILS, "3 of 4", name="GPUs"), Check(FAILS, "1 MiB", name="memory")], "n1": []}
    rows["n1"] = [Check(OK, "", name="GPUs"), Check(OK, "", name="memory")]
    assert judge(rows).excluded == {"n0": "GPUs: 3 of 4; memory: 1 MiB"}


def test_judge_excludes_node_with_slow_gpu():
    verdict = judge(rated([400, 410], [390, 200], [405, 395]))
    assert list(verdict.excluded) == ["n1"]
    assert "H100, GPU 1: 200 TFLOP/s" in verdict.excluded["n1"] and "is 400" in verdict.excluded["n1"]
    assert not judge(rated([400, 410], [390, 300], [405, 395])).excluded


def test_judge_compares_only_gpus_of_same_model():
    rows = {**rated([400]), "n9": rated([60], model="A100")["n0"]}
    assert not judge(rows).excluded


def test_check_of_refuses_message_that_is_no_result():
    row = Check(OK, "4 of 4", name="GPUs", rates=(("H100, GPU 0", 1.5),))
    assert check_of(row.as_json()) == row
    for wrong in ({}, {"name": "GPUs", "state": 1, "text": ""}, {"name": "a", "state": OK}):
        with pytest.raises(ValueError, match="not the result of a check"):
            check_of(wrong)


def test_rates_of_unknown_check_are_ignored():
    """Code of a run may be newer than its coordinator."""
    results = {
        f"n{i}": [Check(OK, "", name="copies", rates=(("link", rate),))] for i, rate in enumerate((1.0, 9.0, 9.0))
    }
    assert not judge(results).excluded
