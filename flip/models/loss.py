"""The losses over the global batch (docs/recipe.md, Objective), in memory that grows with b alone: CLIP's symmetric
InfoNCE, and SigLIP's sigmoid loss of every pair by itself.

With W ranks of b pairs, B = W * b: a rank goes over its own b rows of the B x B logits in tiles of some columns.
InfoNCE keeps a running log-sum-exp of each row (Milakov, Gimelshein 2018) and of each column's share, which the ranks
then add up; backward computes the tiles again. Beside the gathered texts a tile is all that is held: O(b * tile).

The gradient is right under the averaging over ranks that FSDP and DDP do: a rank back-propagates the mean over its own
b rows, what it wants of other ranks' texts is summed over ranks, and the average over ranks makes 1/b into 1/B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from flip.costs import LOSS_TILE

# Newer torch renamed both and warns of the old names at every call.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    """(b, E) on each rank -> (B, E), ranks in order; backward: the sum over ranks of what each wants of our rows."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, group: Any, world: int) -> Tensor:
        ctx.group, ctx.local = group, len(features)
        whole = features.new_empty(len(features) * world, *features.shape[1:])
        _all_gather(whole, features.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        mine = gradient.new_empty(ctx.local, *gradient.shape[1:])
        _reduce_scatter(mine, gradient.contiguous(), group=ctx.group)
        return mine, None, None


class _Whole(torch.autograd.Function):
    """The mean over ranks of a value; backward: the gradient of our own part (the trainer averages over ranks)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any, world: int) -> Tensor:
        value = value / world
        distributed.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class _Rows(torch.autograd.Function):
    """The mean of both cross-entropies, and of hits, over the rows of logits that are this rank's.

    ``image`` (b, E), ``texts`` (B, E) of all ranks, ``scale`` () or (1,); own texts begin at ``first``.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, texts: Tensor, scale: Tensor, first: int, tile: int, group: Any
    ) -> tuple[Tensor, Tensor]:
        rows, columns = _Lse(image, len(image)), _Lse(image, len(texts))
        best = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        scaled = scale * image
        for start in range(0, len(texts), tile):
            at = slice(start, start + tile)
            logits = scaled @ texts[at].T
            top, where = logits.max(dim=1)
            best = torch.where(top > rows.top, where + start, best)
            rows.add(slice(None), logits, top, dim=1)
            columns.add(at, logits, logits.amax(dim=0), dim=0)
        if group is not None:
            columns.join(group)
        row, column = rows.value(), columns.value()
        own = torch.arange(first, first + len(image), device=image.device)
        diagonal = (scaled * texts[own]).sum(dim=1)
        ctx.save_for_backward(image, texts, scale, row, column)
        ctx.first, ctx.tile = first, tile
        hits = (best == own).to(image.dtype).mean()
        ctx.mark_non_differentiable(hits)
        return ((row + column[own]) / 2 - diagonal).mean(), hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, row, column = ctx.saved_tensors
        of_image, of_texts, scaled = torch.zeros_like(image), torch.empty_like(texts), scale * image
        with torch.autocast(image.device.type, enabled=False):
            for start in range(0, len(texts), ctx.tile):
                at = slice(start, start + ctx.tile)
                logits = scaled @ texts[at].T
                wanted = (logits - row[:, None]).exp_() + logits.sub_(column[at]).exp_()
                _own(wanted, ctx.first, start).sub_(2)
                of_image += wanted @ texts[at]
                of_texts[at] = wanted.T @ image
            share = gradients[0] / (2 * len(image))
            of_scale = share * (of_image * image).sum()
            return of_image * (share * scale), of_texts * (share * scale), of_scale.reshape(scale.shape), *(None,) * 3


class _Sigmoid(torch.autograd.Function):
    """The sum over all texts of -log sigmoid(+-logit), and hits, both as means over this rank's images.

    Arguments as of ``_Rows``; ``bias`` () or (1,) is added to the scaled cosines. The sign is + on own pairs.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, first: int, tile: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(image, texts, scale, bias)
        ctx.first, ctx.tile = first, tile
        total, scaled = image.new_zeros(()), scale * image
        top = image.new_full((len(image),), -torch.inf)
        best = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        for start in range(0, len(texts), tile):
            logits = (scaled @ texts[start : start + tile].T).add_(bias)
            largest, where = logits.max(dim=1)
            best = torch.where(largest > top, where + start, best)
            top = torch.maximum(top, largest)
            _own(logits.neg_(), first, start).neg_()
            total = total - torch.nn.functional.logsigmoid(logits).sum()  # softplus turns linear too early for fp64
        own = torch.arange(first, first + len(image), device=image.device)
        hits = (best == own).to(image.dtype).mean()
        ctx.mark_non_differentiable(hits)
        return total / len(image), hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, bias = ctx.saved_tensors
        of_image, of_texts, scaled = torch.zeros_like(image), torch.empty_like(texts), scale * image
        of_bias = image.new_zeros(())
        with torch.autocast(image.device.type, enabled=False):
            for start in range(0, len(texts), ctx.tile):
                at = slice(start, start + ctx.tile)
                logits = (scaled @ texts[at].T).add_(bias)
                _own(logits, ctx.first, start).neg_()
                wanted = logits.sigmoid_()
                _own(wanted, ctx.first, start).neg_()
                of_bias = of_bias + wanted.sum()
                of_image += wanted @ texts[at]
                of_texts[at] = wanted.T @ image
            share = gradients[0] / len(image)
            of_scale = (share * (of_image * image).sum()).reshape(scale.shape)
            of_bias = (share * of_bias).reshape(bias.shape)
            return of_image * (share * scale), of_texts * (share * scale), of_scale, of_bias, None, None


def _own(tile: Tensor, first: int, start: int) -> Tensor:
    """A view of the logits of own pairs in a tile (b, columns) that begins at text ``start``; there may be none."""
    low = max(first, start)
    high = max(low, min(first + tile.shape[0], start + tile.shape[1]))
    return tile[low - first : high - first, low - start : high - start].diagonal()


class _Lse:
    """Log-sum-exp of ``n`` rows or columns of which parts come one after the other."""

    def __init__(self, like: Tensor, n: int) -> None:
        self.top, self.sum = like.new_full((n,), -torch.inf), like.new_zeros(n)

    def add(self, at: slice, logits: Tensor, top: Tensor, dim: int) -> None:
        """``logits`` along ``dim``, of which the largest are ``top``, belong to ``at``."""
        top = torch.maximum(self.top[at], top)
        self.sum[at] = self.sum[at] * (self.top[at] - top).exp() + (logits - top.unsqueeze(dim)).exp_().sum(dim)
        self.top[at] = top

    def join(self, group: Any) -> None:
        """Over ranks. Collective."""
        top = self.top.clone()
        distributed.all_reduce(top, distributed.ReduceOp.MAX, group=group)
        self.sum *= (self.top - top).exp()
        distributed.all_reduce(self.sum, group=group)
        self.top = top

    def value(self) -> Tensor:
        return self.top + self.sum.log()


def contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, *, group: Any = None, tile: int = LOSS_TILE
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of the global batch, both () fp32 (fp64 where the features are) and equal on all ranks.

    ``image`` and ``text`` are this rank's normalised features (b, E), in the same order; b must be equal on all ranks.
    ``scale`` multiplies the cosines. Without ``bias`` the loss is the mean of the cross-entropies image -> text and
    text -> image (InfoNCE). With it, it is added to the logits, and the loss is SigLIP's: the sum of -log sigmoid of
    the logit of each of the B own pairs, and of minus that of each of the B^2 - B others, over B. Accuracy: share of
    images to which their own text is the nearest. ``tile``: columns of logits that are held at once;
    ``flops.loss_bytes`` says what that takes.
    """
    world = distributed.get_world_size(group) if distributed.is_initialized() else 1
    rank = distributed.get_rank(group) if world > 1 else 0
    with torch.autocast(image.device.type, enabled=False):
        if image.dtype != torch.float64:
            image, text, scale = image.float(), text.float(), scale.float()
        texts = _Gather.apply(text, group, world) if world > 1 else text
        everyone = (group or distributed.group.WORLD) if world > 1 else None
        if bias is None:
            loss, hits = _Rows.apply(image, texts, scale, rank * len(image), tile, everyone)
        else:
            loss, hits = _Sigmoid.apply(image, texts, scale, bias.to(image.dtype), rank * len(image), tile)
        if world > 1:
            loss, hits = _Whole.apply(torch.stack([loss, hits]), group, world).unbind()
    return loss, hits.detach()
