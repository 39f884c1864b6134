"""The ranks that evaluate together: a share of the batches each, what they find on rank 0, its verdict for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from flip import exitcodes
from flip.exitcodes import FlipError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Team:
    """``group``: a process group that takes CPU tensors. All methods are collective."""

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
        """What each rank has, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value, group=self.group)
        return values

    def lead(self, function: Callable[[], _T]) -> _T:
        """What rank 0 computes, for all; its FlipError is raised on all."""
        told: list[Any] = [None]
        if self.first:
            try:
                told = [("", function())]
            except FlipError as error:
                kind = next(kind for kind in type(error).__mro__ if kind.__module__ == exitcodes.__name__)
                told = [(kind.__name__, (error.what, error.where, error.value, error.remedy))]
        if self.size > 1:
            distributed.broadcast_object_list(told, src=0, group=self.group)
        name, value = told[0]
        if name:
            raise getattr(exitcodes, name)(*value)
        found: _T = value
        return found


ALONE = Team()
