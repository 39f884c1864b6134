"""Tests which nodes are excluded after the health checks of an allocation."""

import pytest

from jobs.host.agents.node_health import (
    FAILED,
    OK,
    PRODUCT,
    SHARED_FAULT,
    SHARED_FOLDER,
    UNKNOWN,
    NodeCheck,
    judge,
    parse,
)


def nodes(check, *results):
    """Results of one check on nodes n0, n1, ..."""
    return {f"n{i}": [NodeCheck(check, result, f"evidence of n{i}")] for i, result in enumerate(results)}


def rated(*rates, model="H100"):
    return {
        f"n{i}": [NodeCheck(PRODUCT, OK, "", {f"{model}, GPU {j}": 1e12 * rate for j, rate in enumerate(row)})]
        for i, row in enumerate(rates)
    }


@pytest.mark.parametrize(
    ("check", "results", "excluded", "common"),
    [
        ("GPUs", (OK, OK), [], []),
        ("GPUs", (OK, FAILED, OK), ["n1"], []),
        ("GPUs", (OK, FAILED), ["n1"], []),  # half of the nodes are not most
        ("GPUs", (FAILED, FAILED, OK), [], ["GPUs"]),
        ("GPUs", (FAILED,), ["n0"], []),
        ("GPUs", (FAILED, UNKNOWN, UNKNOWN), ["n0"], []),
        (SHARED_FOLDER, (OK, OK, FAILED), ["n2"], []),
        (SHARED_FOLDER, (FAILED, FAILED, FAILED, OK), [], [SHARED_FOLDER]),
        (SHARED_FOLDER, (FAILED,), [], [SHARED_FOLDER]),  # the only node shows nothing about the storage
        (SHARED_FOLDER, (SHARED_FAULT, OK), [], [SHARED_FOLDER]),  # a full disk, which n0 was the first to notice
        (SHARED_FOLDER, (FAILED, SHARED_FAULT, OK, OK, OK), [], [SHARED_FOLDER]),
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
    rows = {"n0": [NodeCheck("GPUs", FAILED, "3 of 4"), NodeCheck("memory", FAILED, "1 MiB")], "n1": []}
    rows["n1"] = [NodeCheck("GPUs", OK, ""), NodeCheck("memory", OK, "")]
    assert judge(rows).excluded == {"n0": "GPUs: 3 of 4; memory: 1 MiB"}


def test_judge_excludes_node_with_slow_gpu():
    verdict = judge(rated([400, 410], [390, 200], [405, 395]))
    assert list(verdict.excluded) == ["n1"]
    assert "H100, GPU 1: 200 TFLOP/s" in verdict.excluded["n1"] and "is 400" in verdict.excluded["n1"]
    assert not judge(rated([400, 410], [390, 300], [405, 395])).excluded


def test_judge_compares_only_gpus_of_same_model():
    rows = {**rated([400]), "n9": rated([60], model="A100")["n0"]}
    assert not judge(rows).excluded


def test_parse_refuses_message_that_is_no_result():
    assert parse({"check": "GPUs", "result": OK, "evidence": "4 of 4"}) == NodeCheck("GPUs", OK, "4 of 4")
    for wrong in ({}, {"check": "GPUs", "result": 1, "evidence": ""}, {"check": "a", "result": OK}):
        with pytest.raises(ValueError, match="not a result"):
            parse(wrong)


def test_rates_of_unknown_check_are_ignored():
    """Code of a run may be newer than its coordinator."""
    results = {f"n{i}": [NodeCheck("copies", OK, "", {"link": rate})] for i, rate in enumerate((1.0, 9.0, 9.0))}
    assert not judge(results).excluded
