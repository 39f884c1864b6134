"""The torch optimiser of ``optim.name: muon``: Muon for groups of matrices, AdamW for all other groups.

Muon orthogonalises the momentum of a matrix (Jordan et al. 2024; with AdamW's size of an update: Liu et al., arXiv
2502.16982). That needs the full matrix. Sharded matrices are taken as many at a time as their group has ranks. Each
rank gets one full matrix in an all-to-all, orthogonalises it, and sends the parts back. No work is repeated, and a rank
holds one full matrix at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from flip.distributed.parallel import local

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, as in torch.optim.Muon."""
ITERATIONS = 5
EPS = 1e-7
"""Least norm by which a matrix is divided."""
CHANGES = "changes"
"""Key of a parameter group: parameter -> 2-norm () of this rank's part of its last change, in fp64."""


def orthogonalised(matrix: Tensor) -> Tensor:
    """U V^T of a matrix U S V^T, (rows, columns) each, with singular values that are not 1 but within 0.7 and 1.2.

    Five Newton-Schulz iterations x <- a x + (b x x^T + c (x x^T)^2) x from x = matrix / |matrix| (Jordan et al. 2024).
    """
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def update_scale(shape: Sequence[int]) -> float:
    """Factor that gives an orthogonal matrix the root mean square of AdamW's updates, 0.2: 0.2 sqrt(max(shape)), as
    torch.optim.Muon has for ``match_rms_adamw`` (Liu et al., arXiv 2502.16982)."""
    return 0.2 * math.sqrt(max(shape))


class MuonAdamW(torch.optim.Optimizer):
    """Updates the groups in ``matrices`` by Muon with Nesterov's momentum, and the other groups by AdamW.

    Changes nothing in a step for which its attribute ``found_inf`` is 1. ``first_moments``: the moments of a matrix
    before its first step.
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(
        self, matrices: list[dict[str, Any]], adamw: torch.optim.AdamW, momentum: float,
        first_moments: Callable[[Tensor], dict[str, Tensor]],
    ) -> None:  # fmt: skip
        super().__init__([*matrices, *adamw.param_groups], {"lr": 0.0})
        self._matrices = self.param_groups[: len(matrices)]
        self._momentum = momentum
        self._first_moments = first_moments
        self._adamw = adamw
        adamw.param_groups = self.param_groups[len(matrices) :]
        adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step. Collective if parameters are sharded. ``closure`` is not supported."""
        assert closure is None
        for group in self._matrices:
            group[CHANGES] = {}
            for batch in _rounds([each for each in group["params"] if each.grad is not None]):
                self._update(group, batch)
        self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self._adamw.step()

    def _update(self, group: dict[str, Any], batch: list[Tensor]) -> None:
        """Update parameters whose full matrices are in memory at once, one for each rank of their group."""
        like = local(batch[0])
        skipped = self.found_inf
        if skipped is None:
            skipped = torch.zeros((), device=like.device)
        applies = 1 - skipped.to(like.dtype)
        directions = [self._direction(parameter, applies) for parameter in batch]
        for parameter, update in zip(batch, _orthogonalised_all(batch, directions), strict=True):
            weight = local(parameter)
            change = weight * (group["lr"] * group["weight_decay"])
            change.add_(update, alpha=group["lr"] * update_scale(parameter.shape)).mul_(applies)
            group[CHANGES][parameter] = torch.linalg.vector_norm(change, dtype=torch.float64)
            weight.sub_(change)

    def _direction(self, parameter: Tensor, applies: Tensor) -> Tensor:
        """This rank's part of Nesterov's momentum, which is orthogonalised. ``applies`` 0: without the gradient."""
        state = self.state[parameter]
        if not state:
            state.update(self._first_moments(parameter))
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        gradient = torch.where(applies > 0, gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device))
        average = local(state["momentum_buffer"])
        average.lerp_(gradient, applies * (1 - self._momentum))
        direction = gradient.lerp(average, self._momentum)
        return direction.bfloat16() if direction.is_cuda else direction


def _rounds(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters by size, as many at a time as their shard group has ranks, so that ranks have equal work."""
    ordered = sorted(parameters, key=lambda parameter: -parameter.numel())
    size = 1
    if ordered:
        size = _shard_group(ordered[0])[1]
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _shard_group(parameter: Tensor) -> tuple[Any, int, int]:
    """(group, its ranks, this rank's number in it) over which the rows of a matrix are sharded; (None, 1, 0)."""
    for dimension, placement in enumerate(getattr(parameter, "placements", ())):
        if placement.is_shard():
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            return mesh.get_group(dimension), mesh.size(dimension), mesh.get_local_rank(dimension)
    return None, 1, 0


def _orthogonalised_all(parameters: Sequence[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """This rank's parts of the orthogonalised matrices, of which ``parts`` are this rank's. Collective if sharded.

    The n-th rank of the group orthogonalises the n-th matrix. There are at most as many matrices as ranks.
    """
    group, size, rank = _shard_group(parameters[0])
    if size == 1:
        return [orthogonalised(part) for part in parts]
    lengths = [part.numel() for part in parts] + [0] * (size - len(parts))
    shape = (0, 0)
    if rank < len(parameters):
        rows, columns = parameters[rank].shape
        shape = (rows, columns)
    rows_of_rank = -(-shape[0] // size)
    held = [max(0, min(rows_of_rank, shape[0] - rows_of_rank * other)) * shape[1] for other in range(size)]
    sent = torch.cat([part.reshape(-1) for part in parts])
    matrix = sent.new_empty(sum(held))
    distributed.all_to_all_single(matrix, sent, held, lengths, group=group)
    if matrix.numel():
        matrix = orthogonalised(matrix.view(shape)).contiguous().view(-1)
    received = torch.empty_like(sent)
    distributed.all_to_all_single(received, matrix, lengths, held, group=group)
    pieces = received.split(lengths[: len(parts)])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
