"""Judges the health checks of all nodes of an allocation together: ``judge``, a pure function.

``jobs.runtime.health`` checks a node and reports the rows; ``jobs.runtime.network_check`` adds that of the network. On
one node alone, a broken disk looks like a storage that is away: what fails on most nodes is the storage, the network or
a setting, not the nodes. A full shared disk is no node's fault, however many nodes notice it.
Standard library, Python >= 3.6.
"""

import statistics
from typing import Callable, Dict, List, Mapping, NamedTuple, Sequence, Set, Tuple

from flip.runs.checks import FAILS, FAILS_FOR_ALL, OK, UNKNOWN, Check

SHARED_FOLDER = "shared folder"
"""The check of what all nodes share: if the only node fails it, the storage is to blame."""

PRODUCT = "matrix product"
NETWORK = "network"
"""The check of the links between nodes, which all nodes measure together."""

SLOW = 0.7
"""A GPU, or a link, below this share of the median rate of its peers is slow. Healthy GPUs of a model differ by a
tenth."""
MOST_REASONS = 3
"""In a line of the log, why the network was not measured."""


class RateComparison(NamedTuple):
    """How rates of a check are compared. ``evidence``: of the device, its rate and the median, in ``unit``."""

    verdict: str
    unit: float
    evidence: str
    median: Callable[[Sequence[float]], float]


COMPARISONS = {
    PRODUCT: RateComparison(
        "speed",
        1e12,
        "%s: %.3g TFLOP/s in a matrix product; the median of its peers is %.3g",
        statistics.median_high,
    ),
    # A link alone does not show which of its nodes is slow, so that the faster of its two links counts for a node.
    # Half of the nodes prove nothing: the links of the other half may be the special ones.
    NETWORK: RateComparison(
        NETWORK,
        1e9,
        "%s: %.3g GB/s over the faster one; the median of all nodes is %.3g",
        statistics.median_low,
    ),
}


class NodeVerdict(NamedTuple):
    """``excluded``: node -> evidence. ``common``: check -> evidence, of checks that fail on most nodes, or for all."""

    excluded: Dict[str, str]
    common: Dict[str, str]


def judge(results: Mapping[str, Sequence[Check]]) -> NodeVerdict:
    """Which nodes are excluded. ``results``: node -> the rows of its checks.

    Rates are, of the matrix product, ("MODEL, GPU number", operations per second); of the network, ("links, to ...",
    bytes per second of the faster one).
    """
    failures: Dict[str, Dict[str, str]] = {}
    results_by_check: Dict[str, int] = {}
    shared: Set[str] = set()
    for node, rows in results.items():
        for row in rows:
            results_by_check[row.name] = results_by_check.get(row.name, 0) + (row.state != UNKNOWN)
            if row.state in (FAILS, FAILS_FOR_ALL):
                failures.setdefault(row.name, {})[node] = row.text
            if row.state == FAILS_FOR_ALL:
                shared.add(row.name)
    failures.update(_slow(results))
    excluded: Dict[str, List[str]] = {}
    common = {}
    for check, nodes in failures.items():
        if check in shared or _is_common(check, len(nodes), results_by_check.get(check, len(results))):
            node, evidence = next(iter(nodes.items()))
            common[check] = "%s on %d of %d nodes, as %s: %s" % (check, len(nodes), len(results), node, evidence)
            continue
        for node, evidence in nodes.items():
            excluded.setdefault(node, []).append("%s: %s" % (check, evidence))
    return NodeVerdict({node: "; ".join(texts) for node, texts in excluded.items()}, common)


def _is_common(check: str, failed: int, results: int) -> bool:
    """Whether a check fails on most nodes. An only node is to blame for its own parts, not for the shared folder."""
    if results == 1:
        return check == SHARED_FOLDER
    return 2 * failed > results


def _slow(results: Mapping[str, Sequence[Check]]) -> Dict[str, Dict[str, str]]:
    """Name of a verdict -> node -> evidence, of nodes that are slow among all that are comparable."""
    peers: Dict[Tuple[str, str], List[Tuple[float, str, str]]] = {}
    for node, rows in results.items():
        for row in rows:
            if row.name not in COMPARISONS:
                continue
            for device, rate in row.rates:
                peers.setdefault((row.name, device.rpartition(", ")[0]), []).append((rate, node, device))
    slow: Dict[str, Dict[str, str]] = {}
    for (check, _), devices in peers.items():
        comparison = COMPARISONS[check]
        median = comparison.median([rate for rate, _, _ in devices])
        for rate, node, device in devices:
            if rate < SLOW * median:
                text = comparison.evidence % (device, rate / comparison.unit, median / comparison.unit)
                slow.setdefault(comparison.verdict, {})[node] = text
    return slow


def network_summary(nodes: Sequence[str], results: Mapping[str, Sequence[Check]]) -> str:
    """What the nodes that measured the network together have found, as a line of a log."""
    rows = {node: row for node in nodes for row in results.get(node, ()) if row.name == NETWORK}
    silent = [node for node in nodes if node not in rows]
    failed = {node: row.text for node, row in rows.items() if row.state != OK}
    if not silent and not failed:
        return "network: %s" % rows[nodes[0]].text
    reasons = ["%s: %s" % (node, failed[node]) for node in sorted(failed)[:MOST_REASONS]]
    if silent:
        reasons.insert(0, "no answer of %s" % ", ".join(silent))
    return "network: not measured: %s" % "; ".join(reasons)
