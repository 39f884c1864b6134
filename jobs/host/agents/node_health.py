"""Judges the health checks of all nodes of an allocation together: ``judge``, a pure function.

``jobs.runtime.health`` checks one node and reports a ``NodeCheck`` per check. One node alone cannot tell a broken disk
from a storage that is away: what fails on most nodes is the storage, the network or a setting, not the nodes.
Standard library, Python >= 3.6.
"""

from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

OK = "ok"
FAILED = "failed"
UNKNOWN = "not known"

SHARED_FOLDER = "shared folder"
"""The check of what all nodes share: if the only node fails it, the storage is to blame."""

SLOW = 0.7
"""A GPU below this share of the median rate of its peers is slow. Healthy ones of a model differ by a tenth."""


class NodeCheck(NamedTuple):
    """Result of one check of one node."""

    check: str
    result: str
    """OK, FAILED or UNKNOWN."""
    evidence: str
    """What was measured or read, as a sentence without the node's name."""
    rates: Mapping[str, float] = {}
    """Of the matrix product: "MODEL, GPU number" -> operations per second."""


class NodeVerdict(NamedTuple):
    """``excluded``: node -> evidence. ``common``: check -> evidence, of checks that fail on most nodes."""

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
    for node, rows in results.items():
        for row in rows:
            known[row.check] = known.get(row.check, 0) + (row.result != UNKNOWN)
            if row.result == FAILED:
                failures.setdefault(row.check, {})[node] = row.evidence
    for node, evidence in _slow(results).items():
        failures.setdefault("speed", {})[node] = evidence
    excluded: Dict[str, List[str]] = {}
    common = {}
    for check, nodes in failures.items():
        if _is_common(check, len(nodes), known.get(check, len(results))):
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


def _slow(results: Mapping[str, Sequence[NodeCheck]]) -> Dict[str, str]:
    """Node -> evidence, of nodes with a GPU that is slow among all GPUs of its model."""
    models: Dict[str, List[Tuple[float, str, str]]] = {}
    for node, rows in results.items():
        for row in rows:
            for device, rate in row.rates.items():
                models.setdefault(device.rpartition(", ")[0], []).append((rate, node, device))
    slow = {}
    for devices in models.values():
        rates = sorted(rate for rate, _, _ in devices)
        median = rates[len(rates) // 2]
        for rate, node, device in devices:
            if rate < SLOW * median:
                text = "%s: %.3g TFLOP/s in a matrix product; the median of its peers is %.3g"
                slow[node] = text % (device, rate / 1e12, median / 1e12)
    return slow
