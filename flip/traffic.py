"""Collectives of a training step, and their seconds that arithmetic does not hide. No torch, like ``flip.costs``.

Counts and bytes follow FSDP's units (``flip.distributed.parallel``) and are held against a step on a fake process group
(tests/flip/distributed/rehearsal.py). Seconds are those of rings with NCCL's own constants: nothing was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flip.config.schema import Compute, Model
from flip.costs import forward_passes, parameters, value_bytes

CALL, NVLINK_HOP, NETWORK_HOP = 14e-6, 1.9e-6, 4e-6
"""Seconds of a call and of each hop of a ring, protocol LL128: the constants of NCCL's cost model (src/graph/tuning.cc,
baseLatencies and hwLatencies of NCCL 2.27)."""
PAYLOAD = 120 / 128
"""Share of the bytes of LL128 that are data: 120 of 128."""


class Links(NamedTuple):
    """``node_ranks``: ranks of a node. Speeds in Gbit/s per GPU and direction: inside a node, and of its network."""

    node_ranks: int
    nvlink_gbps: float
    network_gbps: float


class Collective(NamedTuple):
    """Calls of one kind: ``gather`` (all-gather), ``scatter`` (reduce-scatter), ``reduction`` (all-reduce).

    ``ranks``: of the group, neighbours ``stride`` ranks apart. ``bytes``: of the full tensors of all calls on a rank.
    """

    kind: str
    ranks: int
    stride: int
    calls: int
    bytes: int

    @property
    def is_sum(self) -> bool:
        return self.kind != "gather"

    def nodes(self, links: Links) -> int:
        """Nodes over which the group extends."""
        return -(-self.ranks // min(self.ranks, max(1, links.node_ranks // self.stride)))

    def seconds(self, links: Links) -> float:
        """Of all calls, one after the other, in rings through all GPUs of a node in turn.

        Each GPU's network adapter carries its own ring, so that a group with m ranks a node has m adapters.
        """
        nodes, turns = self.nodes(links), 2 if self.kind == "reduction" else 1
        members = self.ranks // nodes
        speed = links.nvlink_gbps
        if nodes > 1:
            network = members * links.network_gbps
            speed = min(network, links.nvlink_gbps) if members > 1 else network
        between = nodes - 1
        hops = between * NETWORK_HOP + (self.ranks - 1 - between) * NVLINK_HOP
        moved = self.bytes * (self.ranks - 1) / self.ranks
        return turns * moved / (PAYLOAD * speed * 1e9 / 8) + self.calls * (CALL + turns * hops)


class Phase(NamedTuple):
    """A part of a step, run ``times`` times: collectives during ``share`` of the arithmetic of the step each time."""

    times: int
    share: float
    collectives: Sequence[Collective]


def step_phases(model: Model, compute: Compute, local: int, ranks: int) -> list[Phase]:
    """The phases of a step of ``local`` pairs on each of ``ranks`` ranks.

    Full weights are gathered for the first forward pass, and with ``reshard`` again for each further pass, except that
    a micro-batch finds those of the backward pass before it. The last micro-batch sums gradients over the shards of a
    copy, then over the copies. Features of all texts are exchanged in fp32.
    """
    passes, micro, shards = forward_passes(compute), compute.accumulate, ranks // compute.replicate
    forward, backward = 1 / passes / micro, (2 + (compute.recompute == "block")) / passes / micro
    count, size = parameters(model)["total"], value_bytes(compute)
    units = model.image.layers + model.text.layers + 4  # two projections, two rests of towers; and the root
    weights = size * count + (4 - size) * model.embed * (model.image.width + model.text.width)
    gather = Collective("gather", shards, 1, units, weights)
    once, again = [gather._replace(calls=units + 1)], [gather] if compute.reshard != "no" else []
    sums = [
        Collective("scatter", shards, 1, units + 1, 4 * count),
        Collective("reduction", compute.replicate, shards, units + 1, 4 * count // shards),
    ]
    batch, features = local * ranks, 4 * local * ranks * model.embed
    reductions, values = (1, 2) if model.objective == "siglip" else (3, 2 * batch + 2)
    loss = [
        Collective("gather", ranks, 1, 1, features),
        Collective("scatter", ranks, 1, 1, features),
        Collective("reduction", ranks, 1, reductions, 4 * values),
    ]
    phases = [Phase(1, forward, once), Phase(1, 0.0, loss)]
    if micro > 1:  # features of all micro-batches first, without a graph
        phases += [Phase(micro - 1, forward, again), Phase(1, forward, again), Phase(micro - 1, forward, [])]
    phases += [Phase(micro - 1, backward, again), Phase(1, backward, [*again, *sums])]
    return [
        Phase(times, share, [each for each in collectives if each.ranks > 1])
        for times, share, collectives in phases
        if times
    ]


def exposed_seconds(phases: Sequence[Phase], arithmetic: float, links: Links) -> float:
    """Seconds of a step's collectives that its ``arithmetic`` seconds do not hide.

    A phase hides the collectives of neighbouring units behind its share of the arithmetic, so that it exposes
    max(0, communication - arithmetic). Nothing hides the gather of the first unit, the sums of the last one, and the
    loss. Kernels of collectives slow others down, which is not counted.
    """
    exposed = 0.0
    for times, share, collectives in phases:
        seconds = sum(each.seconds(links) for each in collectives)
        exposed += times * max(0.0, seconds - share * arithmetic)
    ends = [each for each in phases[0].collectives if not each.is_sum]
    ends += [each for each in phases[-1].collectives if each.is_sum]
    return exposed + sum(each.seconds(links) / each.calls for each in ends)
