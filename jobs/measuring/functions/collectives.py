"""All-reduce, all-gather and reduce-scatter between processes, by size: the speed of the link that they share; and the
speed between each process and the next one.

NCCL between the GPUs of a node or of several nodes, gloo between processes on CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from flip.config import schema
from flip.distributed import link_speed, parallel
from flip.traffic import PAYLOAD
from jobs.measuring.functions.ranks import run_ranks
from jobs.measuring.functions.timing import rounded

SIZES = {"cuda": (1 << 16, 1 << 22, 1 << 26, 1 << 28), "cpu": (1 << 14, 1 << 20, 1 << 24)}
"""Bytes of the full tensor."""
ROUNDS = {"cuda": 10, "cpu": 5}
LINK_BYTES = {"cuda": 1 << 26, "cpu": 1 << 22}
"""Bytes that two neighbours send to each other."""
TURNS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}
"""How often a ring passes the data."""


def in_node(device: str, ranks: int = 0) -> dict[str, Any]:
    """Measure between ``ranks`` processes of this machine: by default one per GPU, or two on CPUs."""
    if not ranks:
        ranks = torch.cuda.device_count() if device == "cuda" else 2
    if ranks < 2:
        raise SystemExit("a single GPU has no peer")
    return run_ranks("collective_rank", {"device": device}, ranks)


def rank(device: str) -> dict[str, Any]:
    """The part of one process: the same on all ranks, whose place is in the environment."""
    compute = schema.Compute(device=device, threads=1, deterministic="no", compile="no")
    world = parallel.start(compute, hang_minutes=1.0)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    rows = []
    for size in SIZES[device]:
        for kind in TURNS:
            seconds = _seconds(kind, size, world)
            moved = TURNS[kind] * size * (world.size - 1) / world.size
            row = {"kind": kind, "bytes": size, "milliseconds": rounded(1000 * seconds)}
            rows.append(row | {"gbytes": rounded(moved / seconds / 1e9)})
    links = _links(world, local)
    parallel.stop()
    return {
        "device": device,
        "ranks": world.size,
        "nodes": world.size // local,
        "gbps": link_gbps(rows, world.size, local),
        "rows": rows,
        "links": links,
    }


def link_gbps(rows: list[dict[str, Any]], ranks: int, local: int) -> float:
    """Gbit/s of the link of one rank and direction, by the fastest all-reduce: as plans count it, with NCCL's flags.

    Between nodes each adapter carries a ring of its own, so that the link of a rank is a part of the node's.
    """
    fastest = max(float(row["gbytes"]) for row in rows if row["kind"] == "all-reduce")
    share = local if local < ranks else 1
    return rounded(8 * fastest / PAYLOAD / share)


def _seconds(kind: str, size: int, world: parallel.World) -> float:
    """Seconds of a collective."""
    count = size // 4 // world.size * world.size
    full = torch.ones(count, device=world.device)
    part = torch.ones(count // world.size, device=world.device)
    calls: dict[str, Callable[[], Any]] = {
        "all-reduce": lambda: distributed.all_reduce(full),
        "all-gather": lambda: distributed.all_gather_into_tensor(full, part),
        "reduce-scatter": lambda: distributed.reduce_scatter_tensor(part, full),
    }
    return float(link_speed.collective_seconds(calls[kind], world.device, ROUNDS[world.device.type]).median())


def _links(world: parallel.World, local: int) -> list[dict[str, Any]]:
    """GB/s in each direction between neighbours, both at once, pair after pair; if there are nodes, between these."""
    size = LINK_BYTES[world.device.type]
    rows = []
    for pair in link_speed.neighbours(world.size, local):
        (seconds,) = link_speed.link_seconds([pair], size, world.device, ROUNDS[world.device.type])
        numbers = [rank // local if world.size > local else rank for rank in pair]
        rows.append({"between": numbers, "gbytes": rounded(size / float(seconds.median()) / 1e9)})
    return rows
