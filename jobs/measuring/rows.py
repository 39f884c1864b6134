"""The rows of a measurement: what is run, with which limit, and why a row is skipped on this machine.

The order is that of value: what a plan uses comes first. Each row has its own process and its own limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

NO_GPU = "no GPU on this machine: its CPU form is measured"
NO_PEER = "one GPU has no peer"
NO_TIME = "no time was left: give it more --minutes"
ONE_NODE = "one node: there is no network between nodes"
MODELS = {"B/16": 256, "L/16": 64, "H/14": 32}
"""Models of the rows on GPUs -> pairs of a step."""
MASKS = ("0.5", "0.75")
SMALL = {"emoji": 64}
"""The same on CPUs."""
FAULTS = {"rank": "a killed rank", "agent": "a killed agent of a node", "preemption": "a preemption"}
SCHEDULED_FAULTS = ("agent", "preemption")
"""Faults that are caused in jobs if there is a scheduler."""
INPUT_SECONDS = 5.0
SAVE_MEGABYTES = {"cuda": 2000, "cpu": 100}


@dataclass(frozen=True)
class RowPlan:
    """A row to run. ``function``: of ``functions/``; ``limit``: seconds; ``skipped``: why it is not run."""

    name: str
    what: str
    function: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    limit: float = 60.0
    skipped: str = ""


NODES_ROW = RowPlan("nodes", "files and locks between nodes")
"""Run by the process of each node itself (``jobs.measuring.node``)."""


def local_rows(device: str, gpus: int, cores: int, manifests: Sequence[str], share: float = 1.0) -> list[RowPlan]:
    """The rows of one machine.

    ``manifests``: of the data sets whose input is measured; without them synthetic photographs are.
    ``share``: of the usual seconds of each measurement. Above 1, limits grow, too: a busy machine needs more time.
    """
    steps = _step_rows(device, share)
    rows = [
        RowPlan("matmul", "products of matrices", "matmul", {"device": device, "seconds": 0.5 * share}, 60),
        RowPlan("copies", "copies from host to device", "copies", {"device": device, "seconds": 0.5 * share}, 40),
        *steps,
        _trace_row(steps),
        _link_row(device, gpus),
        RowPlan("link_network", "collectives between nodes", skipped=ONE_NODE),
        *_input_rows(manifests or [""], share),
        RowPlan("disk", "files in the folder of runs", "disk", {}, 30),
        RowPlan(
            "save", "save and restore", "saves", {"device": device, "megabytes": SAVE_MEGABYTES[device]}, 90
        ),
        RowPlan("losses", "losses in other arithmetic", "losses", _loss_options(device, gpus), 180),
        *fault_rows(device, max(1, min(2, gpus or cores))),
        RowPlan("reads", "reads of shards", "reads", _read_options(manifests, cores, share), 60),
    ]  # fmt: skip
    return [replace(row, limit=row.limit * max(1.0, share)) for row in rows]


def _input_rows(manifests: Sequence[str], share: float) -> list[RowPlan]:
    """A row for each data set: ``input_cost``, ``input_cost_2``, ..."""
    rows = []
    for number, manifest in enumerate(manifests, 1):
        name = "input_cost"
        what = "cost of a sample on a core"
        if number > 1:
            name += f"_{number}"
            what += f", data set {number}"
        rows.append(RowPlan(name, what, "input", {"manifest": manifest, "seconds": INPUT_SECONDS * share}, 60))
    return rows


def _read_options(manifests: Sequence[str], cores: int, share: float) -> dict[str, Any]:
    """Of the row that reads shards of the first data set."""
    manifest = next(iter(manifests), "")
    return {"manifest": manifest, "seconds": share, "processes": cores}


def fault_rows(device: str, ranks: int) -> list[RowPlan]:
    """The rows of faults on this machine, with two ranks if it can hold them."""
    return [
        RowPlan(f"fault_{kind}", what, "fault", {"device": device, "ranks": ranks, "kind": kind}, 180)
        for kind, what in FAULTS.items()
    ]


def scheduled_faults(device: str, nodes: int, gpus: int, profile: Mapping[str, Any]) -> list[RowPlan]:
    """The same in jobs of a cluster. ``profile``: the fields of its profile. A requeue may wait for two minutes."""
    options = {"device": device, "ranks": max(1, min(2, gpus)), "nodes": min(2, nodes), "profile": profile}
    return [
        RowPlan(f"fault_{kind}", FAULTS[kind], "fault", options | {"kind": kind}, limit)
        for kind, limit in zip(SCHEDULED_FAULTS, (240, 360), strict=True)
    ]


def _loss_options(device: str, gpus: int) -> dict[str, Any]:
    """``ranks``: one per GPU, or two on CPUs; their shares of the batch are equal."""
    if device == "cuda":
        return {"device": device, "size": "B/16", "batch": gpus * max(1, 64 // gpus), "steps": 50, "ranks": gpus}
    return {"device": device, "size": "tiny", "batch": 16, "steps": 50, "ranks": 2}


def _trace_row(steps: Sequence[RowPlan]) -> RowPlan:
    """The kernels of the first step that is measured."""
    step = next(row for row in steps if not row.skipped)
    options = {name: value for name, value in step.options.items() if name != "seconds"}
    return RowPlan("trace", "kernels of a step", "trace", options, 90)


def _step_rows(device: str, share: float) -> list[RowPlan]:
    rows = []
    for size, batch in MODELS.items():
        for mask in MASKS:
            skipped = NO_GPU if device == "cpu" else ""
            rows.append(_step_row("cuda", size, mask, batch, 4 * share, 150, skipped))
    if device == "cpu":
        rows += [_step_row(device, size, mask, batch, 2 * share, 60) for size, batch in SMALL.items() for mask in MASKS]
    return rows


def _step_row(
    device: str, size: str, mask: str, batch: int, seconds: float, limit: float, skipped: str = ""
) -> RowPlan:
    compiled = device == "cuda"
    options = {
        "device": device,
        "size": size,
        "mask": mask,
        "batch": batch,
        "precision": "bf16" if compiled else "fp32",
        "compiled": compiled,
        "seconds": seconds,
    }
    name = f"step_{size.replace('/', '').lower()}_{mask}"
    what = f"step of {size}, {batch} pairs, mask {mask}, {'compiled' if compiled else 'eager'}"
    return RowPlan(name, what, "step", options, limit, skipped)


def _link_row(device: str, gpus: int) -> RowPlan:
    what = "collectives in a node"
    if gpus == 1:
        return RowPlan("link_node", what, skipped=NO_PEER)
    return RowPlan("link_node", what, "collectives", {"device": device}, 90)


def network_row(device: str) -> RowPlan:
    """The row of which each node of a job runs a part."""
    return RowPlan("link_network", "collectives between nodes", "collective_rank", {"device": device}, 90)
