"""Judges the health checks of all nodes of an allocation together: ``judge``, a pure function.

``jobs.runtime.health`` checks one node and reports a ``NodeCheck`` per check; ``jobs.runtime.network_check`` adds that
of the network. On one node alone, a broken disk looks like a storage that is away: what fails on most nodes is the
storage, the network or a setting, not the nodes. A full shared disk is no node's fault, however many nodes notice it.
Standard library, Python >= 3.6.
"""

import statistics
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence, Set, Tuple

OK = "ok"
FAILED = "failed"
SHARED_FAULT = "failed for all nodes"
"""What all nodes share has failed, in a way that cannot be the fault of the node that meets it first: a full disk."""
UNKNOWN = "not known"

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


class NodeCheck(NamedTuple):
    """Result of one check of one node."""

    check: str
    result: str
    """OK, FAILED, SHARED_FAULT or UNKNOWN."""
    evidence: str
    """What was measured or read, as a sentence without the node's name."""
    rates: Mapping[str, float] = {}
    """Of the matrix product: "MODEL, GPU number" -> operations per second. Of the network: "links, to ..." -> bytes per
    second of the faster one."""


class NodeVerdict(NamedTuple):
    """``excluded``: node -> evidence. ``common``: check -> evidence, of checks that fail on most nodes, or for all."""

    excluded: Dict[str, str]
    common: Dict[str, str]


def parse(message: Mapping[str, Any]) -> NodeCheck:
    """A result from a line of JSON. Raises ValueError if a process of this run did not write it."""
    check = message.get("check")
    result = message.get("result")
    evidence = message.get("evidence")
    rates = message.get("rates", {})
    is_text = isinstance(check, str) and isinstance(result, str) and isinstance(evidence, str)
    if not is_text or not isinstance(rates, dict):
        raise ValueError("not a result of a health check: %r" % (message,))
    return NodeCheck(str(check), str(result), str(evidence), {str(name): float(rate) for name, rate in rates.items()})


def judge(results: Mapping[str, Sequence[NodeCheck]]) -> NodeVerdict:
    """Which nodes are excluded. ``results``: node -> the results of its checks."""
    failures: Dict[str, Dict[str, str]] = {}
    known: Dict[str, int] = {}
    shared: Set[str] = set()
    for node, rows in results.items():
        for row in rows:
            known[row.check] = known.get(row.check, 0) + (row.result != UNKNOWN)
            if row.result in (FAILED, SHARED_FAULT):
                failures.setdefault(row.check, {})[node] = row.evidence
            if row.result == SHARED_FAULT:
                shared.add(row.check)
    failures.update(_slow(results))
    excluded: Dict[str, List[str]] = {}
    common = {}
    for check, nodes in failures.items():
        if check in shared or _is_common(check, len(nodes), known.get(check, len(results))):
            node, evidence = next(iter(nodes.items()))
            common[check] = "%s on %d of %d nodes, as %s: %s" % (check, len(nodes), len(results), node, evidence)
            continue
        for node, evidence in nodes.items():
            excluded.setdefault(node, []).append("%s: %s" % (check, evidence))
    return NodeVerdict({node: "; ".join(texts) for node, texts in excluded.items()}, common)


def _is_common(check: str, failed: int, known: int) -> bool:
    """Whether a check fails on most nodes. An only node is to blame for its own parts, not for the shared folder."""
    if known == 1:
        return check == SHARED_FOLDER
    return 2 * failed > known


def _slow(results: Mapping[str, Sequence[NodeCheck]]) -> Dict[str, Dict[str, str]]:
    """Name of a verdict -> node -> evidence, of nodes that are slow among all that are comparable."""
    peers: Dict[Tuple[str, str], List[Tuple[float, str, str]]] = {}
    for node, rows in results.items():
        for row in rows:
            if row.check not in COMPARISONS:
                continue
            for device, rate in row.rates.items():
                peers.setdefault((row.check, device.rpartition(", ")[0]), []).append((rate, node, device))
    slow: Dict[str, Dict[str, str]] = {}
    for (check, _), devices in peers.items():
        comparison = COMPARISONS[check]
        median = comparison.median([rate for rate, _, _ in devices])
        for rate, node, device in devices:
            if rate < SLOW * median:
                text = comparison.evidence % (device, rate / comparison.unit, median / comparison.unit)
                slow.setdefault(comparison.verdict, {})[node] = text
    return slow


def network_summary(nodes: Sequence[str], results: Mapping[str, Sequence[NodeCheck]]) -> str:
    """What the nodes that measured the network together have found, as a line of a log."""
    rows = {node: row for node in nodes for row in results.get(node, ()) if row.check == NETWORK}
    silent = [node for node in nodes if node not in rows]
    failed = {node: row.evidence for node, row in rows.items() if row.result != OK}
    if not silent and not failed:
        return "network: %s" % rows[nodes[0]].evidence
    reasons = ["%s: %s" % (node, failed[node]) for node in sorted(failed)[:MOST_REASONS]]
    if silent:
        reasons.insert(0, "no answer of %s" % ", ".join(silent))
    return "network: not measured: %s" % "; ".join(reasons)
