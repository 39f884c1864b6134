"""Collectives of a training step, and their seconds that arithmetic does not hide. No torch, like ``flip.model_costs``.

Counts and bytes follow FSDP's units (``flip.distributed.parallel``) and are held against a step on a fake process group
(tests/flip/distributed/rehearsal.py). Seconds are those of rings with NCCL's own constants: nothing was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flip import loss_kinds
from flip.config.schema import Compute, Model
from flip.model_costs import (
    block_matrices,
    forward_passes,
    head_parameters,
    optimizer_flops,
    parameters,
    trained_parameters,
    value_bytes,
)

CALL = 14e-6
NVLINK_HOP = 1.9e-6
NETWORK_HOP = 4e-6
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
    """Calls of one kind: ``gather`` (all-gather), ``scatter`` (reduce-scatter), ``reduction`` (all-reduce),
    ``exchange`` (all-to-all).

    ``ranks``: of the group, neighbours ``stride`` ranks apart. ``bytes``: of the full tensors of all calls on a rank.
    """

    kind: str
    ranks: int
    stride: int
    calls: int
    bytes: int

    def nodes(self, links: Links) -> int:
        """Nodes over which the group extends."""
        return -(-self.ranks // min(self.ranks, max(1, links.node_ranks // self.stride)))

    def seconds(self, links: Links) -> float:
        """Of all calls, one after the other, in rings through all GPUs of a node in turn, also where NCCL prefers
        trees.

        Each GPU's network adapter carries its own ring, so that a group with m ranks a node has m adapters.
        """
        if self.ranks == 1:
            return 0.0
        nodes = self.nodes(links)
        turns = 2 if self.kind == "reduction" else 1
        members = self.ranks // nodes
        speed = links.nvlink_gbps
        if nodes > 1:
            network = members * links.network_gbps
            if members > 1:
                speed = min(network, links.nvlink_gbps)
            else:
                speed = network
        between = nodes - 1
        hops = between * NETWORK_HOP + (self.ranks - 1 - between) * NVLINK_HOP
        moved = self.bytes * (self.ranks - 1) / self.ranks
        return turns * moved / (PAYLOAD * speed * 1e9 / 8) + self.calls * (CALL + turns * hops)


class Phase(NamedTuple):
    """A part of a step, run ``times`` times: collectives during ``share`` of the arithmetic of the step each time.

    ``ends``: those of the first or last unit among them, which nothing hides.
    """

    times: int
    share: float
    collectives: Sequence[Collective]
    ends: Sequence[Collective] = ()


def step_phases(
    model: Model, compute: Compute, local: int, ranks: int, optimizer: str = "adamw", head: bool = False,
    locked: Sequence[str] = (),
) -> list[Phase]:  # fmt: skip
    """The phases of a step of ``local`` pairs on each of ``ranks`` ranks.

    Full weights are gathered for the first forward pass, and with ``reshard`` those of all units but the root again for
    each further pass, except that a micro-batch uses those of the backward pass before it. The last micro-batch sums
    gradients over the shards of a copy, then over the copies. The features of all texts are exchanged in fp32, without
    micro-batches behind a tower. An optimiser that needs full matrices exchanges them with their owners, and back.
    """
    passes = forward_passes(compute)
    micro = compute.accumulate
    shards = ranks // compute.replicate
    forward = 1 / passes / micro
    backward = (2 + (compute.recompute == "block")) / passes / micro
    count = parameters(model)["total"]
    trained = trained_parameters(model, locked)["total"]
    size = value_bytes(compute)
    units = model.image.layers + model.text.layers + 2
    root = model.embed * (model.image.width + model.text.width)
    gather = Collective("gather", shards, 1, units, size * (count - root))  # blocks, and the rests of towers
    once = gather._replace(calls=units + 1, bytes=gather.bytes + 4 * root)
    again = [gather] if compute.reshard != "no" else []
    sums = [
        Collective("scatter", shards, 1, units + 1, 4 * trained),
        Collective("reduction", compute.replicate, shards, units + 1, 4 * trained // shards),
    ]
    batch = local * ranks
    features = 4 * local * ranks * model.embed
    exchange = [Collective("gather", ranks, 1, 1, features), Collective("scatter", ranks, 1, 1, features)]
    reductions, values = loss_kinds.declared(model.objective).reductions(batch)
    loss = [Collective("reduction", ranks, 1, reductions + 1, 4 * (values + 2))]  # and of loss and accuracy
    first = [once]
    last = [*again, *sums]
    if micro == 1:  # behind the image tower, as text is encoded first
        first = [once, exchange[0]]
        last = [*last, exchange[1]]
    else:
        loss = [*exchange, *loss]
    phases = [Phase(1, forward, first, [_mean_call(once)]), Phase(1, 0.0, loss)]
    if micro > 1:  # features of all micro-batches first, without a graph
        phases += [Phase(micro - 1, forward, again), Phase(1, forward, again), Phase(micro - 1, forward, [])]
    phases += [Phase(micro - 1, backward, again), Phase(1, backward, last, [_mean_call(each) for each in sums])]
    if head:
        phases.append(Phase(1, 0.0, _of_head(model, compute, shards)))
    if optimizer_flops(model, optimizer):
        phases.append(Phase(1, 0.0, [_exchange(model, compute, shards)]))
    return [
        phase._replace(collectives=[each for each in phase.collectives if each.ranks > 1])
        for phase in phases
        if phase.times
    ]


def _of_head(model: Model, compute: Compute, shards: int) -> list[Collective]:
    """Those of the text classification head, a unit of its own in fp32 that only passes with a graph use."""
    size = 4 * head_parameters(model)
    passes = 1 if compute.reshard == "no" else 1 + compute.accumulate  # a forward pass uses the backward pass's before
    return [
        Collective("gather", shards, 1, passes, passes * size),
        Collective("scatter", shards, 1, 1, size),
        Collective("reduction", compute.replicate, shards, 1, size // shards),
    ]


def _exchange(model: Model, compute: Compute, shards: int) -> Collective:
    """All-to-alls that bring a matrix to each rank of a copy at a time, and its update back (``flip.muon``)."""
    shapes = block_matrices(model)
    size = 2 if compute.device == "cuda" else 4
    count = sum(rows * columns for rows, columns in shapes)
    return Collective("exchange", shards, 1, 2 * -(-len(shapes) // shards), 2 * size * count // shards)


def _mean_call(collective: Collective) -> Collective:
    """A single call, of mean size."""
    return collective._replace(calls=1, bytes=collective.bytes // collective.calls)


def exposed_seconds(phases: Sequence[Phase], arithmetic: float, links: Links) -> float:
    """Seconds of a step's collectives that its ``arithmetic`` seconds do not hide.

    A phase hides the collectives of neighbouring units behind its share of the arithmetic, so that it exposes
    max(0, communication - arithmetic). Nothing hides the gather of the first unit, the sums of the last one, and the
    reductions of the loss. Kernels of collectives slow others down, which is not counted.
    """
    return sum(
        times * (max(0.0, _seconds(collectives, links) - share * arithmetic) + _seconds(ends, links))
        for times, share, collectives, ends in phases
    )


def _seconds(collectives: Sequence[Collective], links: Links) -> float:
    return sum(each.seconds(links) for each in collectives)
