"""The ranks that evaluate together: a share of the batches each, what they find on rank 0, its verdict for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from flip.distributed.collectives import all_gather_json, run_on_first

_T = TypeVar("_T")


@dataclass(frozen=True)
class Team:
    """``group``: a process group of all ranks that takes CPU tensors; None: one rank. All methods are collective."""

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batches: int, rank: int | None = None) -> range:
        """This rank's batches of all: neighbouring ones, at most one more than another rank's."""
        rank = self.rank if rank is None else rank
        return range(rank * batches // self.size, (rank + 1) * batches // self.size)

    def gather(self, part: Tensor, rows: list[int]) -> Tensor | None:
        """The parts of all ranks one below the other, on rank 0; None elsewhere. ``rows``: how many each rank has."""
        if self.size == 1:
            return part
        padded = torch.zeros(max(rows), *part.shape[1:], dtype=part.dtype)
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in rows] if self.first else None
        distributed.gather(padded, parts, dst=0, group=self.group)
        return torch.cat([one[:n] for one, n in zip(parts, rows, strict=True)]) if parts is not None else None

    def everything(self, value: _T) -> list[_T]:
        """What each rank has, by rank. ``value``: of JSON."""
        return all_gather_json(value, self.group)

    def lead(self, function: Callable[[], _T]) -> _T:
        """What rank 0 computes, a value of JSON, for all; its FlipError is raised on all."""
        return run_on_first(function, self.group)


ALONE = Team()
