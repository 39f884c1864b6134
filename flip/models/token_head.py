"""The text classification head: a linear layer that predicts a caption's tokens from pooled image features, and its
loss in tiles of the vocabulary (SuperCLIP, arXiv 2512.14480; docs/variants.md).

Dimensions: b pairs of this rank, D the width of the image tower, V tokens of the vocabulary, T targets of a caption.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flip.loss_kinds import OnlineLogSumExp


class TokenTargets(NamedTuple):
    """What the head has to predict."""

    ids: Tensor
    """(b, T) distinct tokens of each caption; negative: none."""
    weights: Tensor
    """(V,) weight of each token, at least 0, before they are normalised over a caption."""
    tile: int
    """Tokens whose logits are computed at once."""


class TokenHead(nn.Module):
    """Soft cross-entropy between the softmax of V logits and the weights of the caption's tokens, which sum to 1.

    A caption whose tokens all have weight 0 has no loss. Always fp32 (fp64 if the features are).
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocabulary, width))
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, pooled: Tensor, targets: TokenTargets) -> Tensor:
        """The mean () over the rows of ``pooled`` (b, D)."""
        with torch.autocast(pooled.device.type, enabled=False):
            dtype = self.weight.dtype
            ids = targets.ids.long()
            weights = targets.weights.to(dtype)[ids.clamp(min=0)] * (ids >= 0)
            total = weights.sum(dim=1, keepdim=True)
            shares = weights / total.clamp(min=torch.finfo(dtype).tiny)
            loss: Tensor = _TiledCrossEntropy.apply(pooled.to(dtype), self.weight, self.bias, ids, shares, targets.tile)
        return loss


class _TiledCrossEntropy(torch.autograd.Function):
    """-sum over targets of share * log softmax, the mean over rows. Backward computes the tiles of logits again, so
    that memory is O(b * tile) beside weights and gradients."""

    @staticmethod
    def forward(
        ctx: Any, pooled: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, shares: Tensor, tile: int
    ) -> Tensor:
        total = OnlineLogSumExp(pooled, len(pooled))
        for start in range(0, len(weight), tile):
            logits = _logits(pooled, weight, bias, start, tile)
            total.add(slice(None), logits, torch.maximum(total.max, logits.amax(dim=1)), dim=1)
        log_sum = total.value()
        known = ids.clamp(min=0)
        mean_weight = F.embedding_bag(known, weight, mode="sum", per_sample_weights=shares)  # (b, D)
        target = (pooled * mean_weight).sum(dim=1) + (bias[known] * shares).sum(dim=1)
        ctx.save_for_backward(pooled, weight, bias, ids, shares, log_sum)
        ctx.tile = tile
        return (shares.sum(dim=1) * log_sum - target).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pooled, weight, bias, ids, shares, log_sum = ctx.saved_tensors
        factor = gradients[0] / len(pooled)
        rows = torch.arange(len(pooled), device=pooled.device)[:, None].expand_as(ids)
        present = shares.sum(dim=1, keepdim=True)
        grad_pooled = torch.zeros_like(pooled)
        grad_weight = torch.empty_like(weight)
        grad_bias = torch.empty_like(bias)
        for start in range(0, len(weight), ctx.tile):
            columns = slice(start, start + ctx.tile)
            grad = (_logits(pooled, weight, bias, start, ctx.tile) - log_sum[:, None]).exp_().mul_(present)
            inside = (ids >= start) & (ids < start + grad.shape[1])
            places = (ids - start).clamp(0, grad.shape[1] - 1)
            grad.index_put_((rows, places), -shares * inside, accumulate=True)  # deterministic also on CUDA
            grad.mul_(factor)
            grad_pooled += grad @ weight[columns]
            grad_weight[columns] = grad.T @ pooled
            grad_bias[columns] = grad.sum(dim=0)
            del grad  # before the next tile is computed
        return grad_pooled, grad_weight, grad_bias, None, None, None


def _logits(pooled: Tensor, weight: Tensor, bias: Tensor, start: int, tile: int) -> Tensor:
    return torch.addmm(bias[start : start + tile], pooled, weight[start : start + tile].T)
