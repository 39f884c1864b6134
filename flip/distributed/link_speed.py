"""Measures how fast ranks communicate: a collective of all ranks, and neighbours that send to each other.

Used by the check of an allocation (``jobs.runtime.network_check``) and by `flip doctor --measure`
(``jobs.measuring.functions``). All functions but ``neighbours`` and ``disjoint`` are collective, over the default
process group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed

SHORTEST = 1e-9
"""Seconds of a call, at least: a GPU that only pretends returns 0."""

Pair = tuple[int, int]


def neighbours(ranks: int, local: int) -> list[Pair]:
    """The links of the ring of all ranks; with several nodes of ``local`` ranks, those between nodes."""
    pairs = [(first, (first + 1) % ranks) for first in range(ranks)]
    if ranks > local:
        pairs = [pair for pair in pairs if pair[0] // local != pair[1] // local]
    if ranks == 2:
        return pairs[:1]
    return pairs


def disjoint(pairs: Sequence[Pair], local: int = 1) -> list[list[Pair]]:
    """Groups of pairs that have no node of ``local`` ranks in common: of a ring two or three, whatever its length."""
    groups: list[list[Pair]] = []
    for pair in pairs:
        nodes = {rank // local for rank in pair}
        for group in groups:
            if not nodes & {rank // local for other in group for rank in other}:
                group.append(pair)
                break
        else:
            groups.append([pair])
    return groups


def collective_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> Tensor:
    """Seconds of each round of a call: those of its slowest rank."""
    return _seconds_by_rank(call, device, rounds).amax(0)


def link_seconds(pairs: Sequence[Pair], size: int, device: torch.device, rounds: int) -> Tensor:
    """Seconds of each pair and round: the ranks of each pair send ``size`` bytes to each other, all pairs at once.

    A rank is in at most one of the pairs.
    """
    own = distributed.get_rank()
    sent = torch.ones(size // 4, device=device)
    received = torch.empty_like(sent)
    peers = [sum(pair) - own for pair in pairs if own in pair]

    def swap() -> None:
        for peer in peers:
            calls = [
                distributed.P2POp(distributed.isend, sent, peer),
                distributed.P2POp(distributed.irecv, received, peer),
            ]
            for work in distributed.batch_isend_irecv(calls):
                work.wait()

    seconds = _seconds_by_rank(swap, device, rounds)
    return torch.stack([seconds[list(pair)].amax(0) for pair in pairs])


def _seconds_by_rank(call: Callable[[], object], device: torch.device, rounds: int) -> Tensor:
    """Seconds of a call by rank and round."""
    times = []
    for number in range(rounds + 1):
        distributed.barrier()
        start_time = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:  # the first one connects
            times.append(time.perf_counter() - start_time)
    own = torch.tensor(times, device=device)
    every = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, own)
    return torch.stack(every).cpu().clamp_min(SHORTEST)
