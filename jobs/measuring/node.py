"""The work of the process of one node of a measuring job: rows between nodes, then those of each node, then the result.

Records of jobs name this module: ``python -m jobs.measuring.node RUN_DIR``.
Each node writes its rows to RUN/nodes/<node>.json, so that a job that was preempted continues. The first node merges
them into RUN/measured.json.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flip import environment
from flip.files.creation import run_folder
from flip.runs.rundir import RunDir, exists, load_record, write_json
from jobs.host import slurm_cli
from jobs.measuring import compare, machine
from jobs.measuring.limited import MeasurementStopped
from jobs.measuring.rendezvous import Rendezvous
from jobs.measuring.rows import NODES_ROW, SCHEDULED_FAULTS, RowPlan, local_rows, network_row
from jobs.planning.measurement import (
    FAILED,
    MEASURED,
    SKIPPED,
    MeasuredRow,
    Measurement,
    node_name,
    parsed,
    read_measurement,
)

if TYPE_CHECKING:
    from flip.common.shutdown import StopFlag

PRELOAD = ("jobs.runtime.rank_process", "jobs.measuring.node")
"""What a node agent imports before it forks ranks (``jobs.runtime.node_agent``). None of these starts a thread."""
REQUEST = "measure.json"
"""Of the run directory: minutes, manifests, rows and whether names may be written."""
RESULT = "measured.json"
RENDEZVOUS_SECONDS = 120.0
"""Seconds in which all nodes must start."""
SCHEDULED = tuple(f"fault_{kind}" for kind in SCHEDULED_FAULTS)
"""Rows that the submit host runs in jobs of their own."""
PEER_SHARE = 0.9
"""Speed as a share of the median of all nodes below which a node is named."""


def measure_node(run: RunDir, attempt: int, flag: StopFlag) -> tuple[str, str]:
    """Measure this node; returns (cause, reason), as ``jobs.runtime.rank_process`` records it."""
    request = load_record(run.path / REQUEST)
    node = int(os.environ["RANK"])
    rendezvous = Rendezvous(
        run_folder(run.path / "rendezvous") / str(attempt), node, int(os.environ["WORLD_SIZE"]), lambda: bool(flag),
        _scheduled_names,
    )  # fmt: skip
    try:
        result = _measure(run, request, rendezvous, lambda: bool(flag))
    except MeasurementStopped:
        return "stopped", flag.reason
    if result is not None:
        write_json(run.path / RESULT, result.as_dict())
        write_json(run.result, {"run": run.name, "samples": 0})
    return "complete", ""


def _measure(run: RunDir, request: Mapping[str, Any], rendezvous: Rendezvous, stopped: Any) -> Measurement | None:
    """The merged measurement on the first node; None on others."""
    end = time.monotonic() + 60 * float(request["minutes"])
    path = run_folder(run.path / "nodes") / f"{rendezvous.node}.json"
    gpus = machine.gpu_names()
    device = "cuda" if gpus else "cpu"
    this_machine = machine.describe_machine(gpus)
    earlier = {}
    if exists(path):
        earlier = {row.name: row for row in read_measurement(str(path)).rows if row.status == MEASURED}
    of_this_node = {"earlier": sorted(earlier), "environment": environment.environment(), "host": socket.gethostname()}
    of_nodes = rendezvous.exchange("start", of_this_node, RENDEZVOUS_SECONDS)
    names = [each["host"] for each in of_nodes] if request["names"] else []
    rendezvous.names = lambda: names  # from here on, errors become rows of the measurement
    together = _missing_gpus(int(request["gpus"]), len(gpus))
    together += _between_nodes(
        run, rendezvous, set(of_nodes[0]["earlier"]), earlier, device, end, request["only"], stopped
    )
    rows = [
        row
        for row in local_rows(device, len(gpus), this_machine.cores, request["manifests"], request["share"])
        if row.name not in ("link_network", *SCHEDULED, *(each.name for each in together))
        and _is_wanted(row, request["only"])
    ]
    left = (end - time.monotonic()) / 60
    own = machine.measure(
        rows, this_machine, run.path, left, request["names"], earlier,
        lambda so_far: write_json(path, _joined(together, so_far).as_dict()), stopped,
    )  # fmt: skip
    own = _joined(together, own)
    write_json(path, own.as_dict())
    return _gathered(rendezvous, own, [each["environment"] for each in of_nodes], max(60.0, end - time.monotonic()))


def _scheduled_names() -> list[str]:
    """The names of the job's nodes in Slurm, for an error that only the run directory has; none without Slurm."""
    if "SLURM_JOB_NODELIST" not in os.environ:
        return []
    try:
        return slurm_cli.host_names(os.environ["SLURM_JOB_NODELIST"])
    except slurm_cli.SlurmUnavailable:
        return []


def _missing_gpus(asked: int, shown: int) -> list[MeasuredRow]:
    """A failed row if the node shows fewer GPUs than its job has asked for."""
    if shown >= asked:
        return []
    detail = f"the profile asks for {asked} GPUs of a node, and its driver shows {shown}"
    return [MeasuredRow("gpus", "GPUs of a node", FAILED, {}, detail)]


def _is_wanted(row: RowPlan, only: Sequence[str] | None) -> bool:
    return not only or row.name in only


def _joined(rows: Sequence[MeasuredRow], measurement: Measurement) -> Measurement:
    return dataclasses.replace(measurement, rows=(*rows, *measurement.rows))


def _between_nodes(
    run: RunDir, rendezvous: Rendezvous, done: set[str], earlier: Mapping[str, MeasuredRow], device: str, end: float,
    only: Sequence[str] | None, stopped: Any,
) -> list[MeasuredRow]:  # fmt: skip
    """The rows that all nodes run together, unless the first one has them from an attempt before."""
    rows = [earlier[name] for name in ("nodes", "link_network") if name in earlier]
    if rendezvous.nodes == 1:
        return rows
    if NODES_ROW.name not in done and _is_wanted(NODES_ROW, only):
        rows.append(_nodes_row(rendezvous, run.path))
    network = network_row(device)
    if "link_network" not in done and _is_wanted(network, only):
        rows.append(_network_row(network, rendezvous, run.path, end, stopped))
    return rows


def _network_row(plan: RowPlan, rendezvous: Rendezvous, root: Path, end: float, stopped: Any) -> MeasuredRow:
    """The collectives between nodes; a failed row if one of them has gone."""
    try:
        rendezvous.exchange("network", None, RENDEZVOUS_SECONDS)
    except TimeoutError as error:
        return MeasuredRow(plan.name, plan.what, FAILED, {}, str(error))
    return machine.run_row(plan, root, end, stopped)


def _nodes_row(rendezvous: Rendezvous, root: Path) -> MeasuredRow:
    """Visibility of files and locks between nodes."""
    start_time = time.monotonic()
    try:
        visible = rendezvous.visible_milliseconds(RENDEZVOUS_SECONDS)
        excluded = rendezvous.locks_exclude(RENDEZVOUS_SECONDS)
    except (OSError, ValueError) as error:
        detail = machine.private(str(error), root) or type(error).__name__
        return MeasuredRow(NODES_ROW.name, NODES_ROW.what, FAILED, {}, detail, round(time.monotonic() - start_time, 1))
    values = {"nodes": rendezvous.nodes, "visible_milliseconds": visible, "locks_exclude": excluded}
    return MeasuredRow(NODES_ROW.name, NODES_ROW.what, MEASURED, values, "", round(time.monotonic() - start_time, 1))


def _gathered(
    rendezvous: Rendezvous, own: Measurement, environments: Sequence[Mapping[str, Any]], seconds: float
) -> Measurement | None:
    """The measurements of all nodes as one; those of nodes that do not answer are missing."""
    if rendezvous.node:
        rendezvous.leave("end", own.as_dict())
        return None
    try:
        contents = rendezvous.exchange("end", own.as_dict(), seconds)
    except TimeoutError as error:
        lost = MeasuredRow("peers", "nodes compared", FAILED, {}, f"{error.args[0]}")
        names = rendezvous.names() or own.names
        return dataclasses.replace(own, nodes=rendezvous.nodes, rows=(*own.rows, lost), names=names)
    names = rendezvous.names()
    return merged([parsed(content, node_name(names, node)) for node, content in enumerate(contents)], environments)


def merged(nodes: Sequence[Measurement], environments: Sequence[Mapping[str, Any]]) -> Measurement:
    """One measurement of several nodes: the rows of the first one, failures of others, and the nodes compared.

    ``environments``: the environment of each node.
    """
    first = nodes[0]
    rows = list(first.rows)
    names = [name for each in nodes for name in each.names]
    for number, each in enumerate(nodes[1:], 1):
        for row in each.rows:
            known_here = {other.name for other in first.rows if other.status == row.status}
            if row.status not in (MEASURED, SKIPPED) and row.name not in known_here:
                name = f"node{number}_{row.name}"
                rows.append(dataclasses.replace(row, name=name, what=f"{row.what}, {node_name(names, number)}"))
    if len(nodes) > 1:
        differences = [
            f"{node_name(names, number)}: {', '.join(changed)}"
            for number, each in enumerate(environments[1:], 1)
            if (changed := environment.changes(environments[0], each))
        ]
        values = {"slow": slow_nodes(nodes), "versions": [{"difference": text} for text in differences]}
        rows.append(MeasuredRow("peers", "nodes compared", MEASURED, values))
    load = max(each.load for each in nodes)
    return dataclasses.replace(first, nodes=len(nodes), rows=tuple(rows), names=names, load=load)


def slow_nodes(nodes: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Speeds of a node that are below those of its peers: row, number, node, value, the median of all nodes, and
    the cores of the node that other processes used."""
    slow = []
    for row in nodes[0].rows:
        speeds = [compare.numbers(each) if (each := measured.row(row.name)) else {} for measured in nodes]
        for key in speeds[0]:
            values = {number: each[key] for number, each in enumerate(speeds) if key in each}
            # single sizes are noisy, and links have verdicts of their own
            if not compare.is_speed(key) or key.startswith(("rows ", "links ", "stages ")) or len(values) < 2:
                continue
            middle = statistics.median_high(values.values())
            for number, value in values.items():
                if value < PEER_SHARE * middle:
                    entry = {"node": number, "row": row.name, "number": key, "value": value, "peers": middle}
                    matmul = nodes[number].row("matmul")
                    stopped = matmul.values.get("throttled_seconds", 0.0) if matmul else 0.0
                    slow.append(entry | {"load": nodes[number].load, "throttled_seconds": stopped})
    return slow


if __name__ == "__main__":
    import sys

    from jobs.runtime import rank_process

    rank_process.exit_process(rank_process.main(sys.argv[1], measure_node))
