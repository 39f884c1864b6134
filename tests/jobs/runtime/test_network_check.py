"""Tests the measurement of the network between ranks with real processes over gloo, and which nodes it excludes."""

import json
import os
import time

import pytest

from flip.runs.checks import OK, UNKNOWN, Check
from jobs.host.agents.node_health import NETWORK, judge, network_summary
from jobs.runtime import network_check
from jobs.runtime.check_process import END
from jobs.runtime.network_check import NetworkSettings
from tests.harness.common import free_port
from tests.harness.ranks import run_ranks


def settings_of(node, names, local=1, port=0, device="cuda"):
    environ = {
        "WORLD_SIZE": str(local * len(names)), "LOCAL_WORLD_SIZE": str(local), "NODE_RANK": str(node),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = range(local * node, local * (node + 1))
    environments = [{**environ, "RANK": str(rank), "LOCAL_RANK": str(rank % local)} for rank in ranks]
    return NetworkSettings(environments, device, names)


def measured(*gigabytes, device="cuda"):
    """The results of nodes n0, n1, ... with these speeds of the links to the next node."""
    count = len(gigabytes)
    links = [{"between": [i, (i + 1) % count], "rate": 1e9 * rate} for i, rate in enumerate(gigabytes)]
    if count == 2:
        links = links[:1]
    names = [f"n{i}" for i in range(count)]
    results = {}
    for node, name in enumerate(names):
        found = network_check.finding([{"reduce": 5e9, "links": links}], settings_of(node, names, device=device))
        results[name] = [found._replace(name=NETWORK)]
    return results


@pytest.mark.parametrize(
    ("links", "excluded"),
    [
        ((10, 10, 10, 10), []),
        ((10, 1, 1, 10, 10), ["n2"]),
        ((1, 10, 10, 10, 1), ["n0"]),
        ((10, 6.9, 6.9, 10, 10), ["n2"]),
        ((10, 7.1, 6.9, 10, 10), []),  # of both links, one is fast enough
        ((10, 1, 10, 10, 10), []),  # a link alone does not show which of its nodes is slow
        ((10, 10, 1, 1, 1), ["n3", "n4"]),  # neighbours
        ((10, 1, 1), ["n2"]),
        ((10, 1, 1, 1, 1), []),  # most links are slow: the network
        ((1, 1, 1, 1, 1), []),
        ((10, 1, 1, 1), []),  # two of four nodes are no majority
        ((10, 10), []),  # two nodes have only one link
        ((1, 1), []),
    ],
)
def test_node_with_two_slow_links_is_excluded(links, excluded):
    verdict = judge(measured(*links))
    assert list(verdict.excluded) == excluded and not verdict.common


def test_evidence_names_both_links_and_the_median():
    reason = judge(measured(10, 1, 2, 10, 10)).excluded["n2"]
    assert reason.startswith("network: links, to n1 (1 GB/s) and n3 (2 GB/s): 2 GB/s ")
    assert reason.endswith("the median of all nodes is 10")


def test_nodes_without_gpus_are_not_compared():
    """Processes on CPUs share cores."""
    results = measured(10, 1, 1, 10, 10, device="cpu")
    assert not judge(results).excluded and not results["n2"][0].rates
    assert "links to n1 (1 GB/s) and n3 (1 GB/s)" in results["n2"][0].text


def test_summary_says_what_was_measured_or_why_nothing_was():
    results = measured(10, 1)
    summary = network_summary(["n0", "n1"], results)
    assert summary.startswith("network: all-reduce of 2 ranks: 5 GB/s; slowest link: 10 GB/s, fastest: 10 GB/s; ")
    assert summary.endswith("; links to n1 (10 GB/s)")
    results["n1"] = [Check(UNKNOWN, "no answer in 8 s", name=NETWORK)]
    results["n2"] = []
    summary = network_summary(["n0", "n1", "n2"], results)
    assert summary == "network: not measured: no answer of n2; n1: no answer in 8 s"


def report(settings, work=None):
    """(seconds, the result that the process of a node reports)."""
    output, inner = os.pipe()
    start_time = time.monotonic()
    network_check.run(settings, inner, work)
    seconds = time.monotonic() - start_time
    os.close(inner)
    with os.fdopen(output) as file:
        row, end = map(json.loads, file)
    assert end == END
    return seconds, row


def report_of(node, names, local, port, device="cpu"):
    """``report``, without the limits, which a busy machine may exceed."""
    network_check.SECONDS = 100.0
    network_check.JOIN_SECONDS = 90.0
    return report(settings_of(node, names, local, port, device))


@pytest.mark.long
def test_three_nodes_measure_all_reduce_and_links():
    names = ["n0", "n1", "n2"]
    rows = [row for _, row in run_ranks(report_of, 3, names, 1, free_port())]
    assert [row["state"] for row in rows] == [OK] * 3, rows
    assert all("all-reduce of 3 ranks: " in row["text"] for row in rows)
    assert "links to n1 (" in rows[0]["text"] and "and n2 (" in rows[0]["text"]


@pytest.mark.long
def test_ranks_of_an_only_node_measure_links_between_them():
    ((_, row),) = run_ranks(report_of, 1, ["n0"], 2, free_port())
    assert row["state"] == OK and row["text"].startswith("all-reduce of 2 ranks: ")
    assert "links to" not in row["text"]


@pytest.mark.long
def test_two_nodes_of_two_ranks_measure_links_between_nodes():
    rows = [row for _, row in run_ranks(report_of, 2, ["n0", "n1"], 2, free_port())]
    assert [row["state"] for row in rows] == [OK] * 2, rows
    assert "all-reduce of 4 ranks: " in rows[0]["text"] and "links to n1 (" in rows[0]["text"]


def report_alone(node, present, names, port):
    if node not in present:
        return None
    return report(settings_of(node, names, 1, port, "cpu"))


@pytest.mark.long
@pytest.mark.parametrize("present", [(0,), (1,)])
def test_group_without_a_member_ends_by_its_limit(present):
    """With and without the node that has the store."""
    answers = run_ranks(report_alone, 2, present, ["n0", "n1"], free_port())
    seconds, row = answers[present[0]]
    assert row["state"] == UNKNOWN and row["text"] and not row["rates"]
    assert seconds < 30.0, "it ends by itself"


def hang(node):
    return report(settings_of(node, ["n0", "n1"], 1, 1, "cpu"), lambda device: time.sleep(600))


def crash(node):
    return report(settings_of(node, ["n0", "n1"], 1, 1, "cpu"), lambda device: os._exit(3))


def fail(node):
    def work(device):
        raise RuntimeError("NCCL error\nmore of it")

    return report(settings_of(node, ["n0", "n1"], 1, 1, "cpu"), work)


@pytest.mark.long
@pytest.mark.parametrize(
    ("work", "evidence"),
    [(hang, "no answer in 8 s"), (crash, "a process ended early"), (fail, "RuntimeError: NCCL error")],
)
def test_rank_that_hangs_or_fails_leaves_the_network_unknown(work, evidence):
    ((seconds, row),) = run_ranks(work, 1)
    assert (row["state"], row["text"]) == (UNKNOWN, evidence)
    assert seconds < 30.0, "it ends by itself"


@pytest.mark.gpu
def test_gpus_of_this_machine_measure_links_between_them():
    import torch

    gpus = torch.cuda.device_count()
    if gpus < 2:
        pytest.skip("a single GPU has no peer")
    ((_, row),) = run_ranks(report_of, 1, ["n0"], gpus, free_port(), "cuda")
    assert row["state"] == OK and f"all-reduce of {gpus} ranks: " in row["text"], row["text"]
