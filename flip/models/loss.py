"""The losses over the global batch (docs/recipe.md, Objective): CLIP's symmetric InfoNCE, and SigLIP's sigmoid loss.

Dimensions: W ranks of b pairs, B = W * b, E features. A rank computes its own b rows of the (B, B) logits in tiles of
some columns, so that memory is O(b * tile) beside the gathered texts. InfoNCE keeps a running log-sum-exp of each row
(Milakov, Gimelshein 2018) and of each column's part, which the ranks then combine; backward recomputes the tiles.

Gradients fit the averaging over ranks of FSDP and DDP: a rank back-propagates the mean over its own b rows, the
gradients of gathered texts are summed over ranks, and the average over ranks turns 1/b into 1/B.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, distributed

from flip.costs import LOSS_TILE

# Newer torch renamed both and warns about the old names at every call.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


class TextGather:
    """Gathers the texts of all ranks while the image tower computes, and sums their gradients while it back-propagates.

    ``start`` is called between the forward passes of the towers, text first. Autograd runs nodes in reverse order, so
    the sum over ranks, which starts as soon as the loss has its gradients, has to be complete only when the backward
    pass of the image tower has ended. The values do not depend on when it is called.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self._transfer = group, _Transfer()
        self.world_size = distributed.get_world_size(group) if distributed.is_initialized() else 1

    def start(self, text: Tensor) -> None:
        """Start the gather of this rank's features (b, E). Collective."""
        self._texts = text if text.dtype == torch.float64 else text.float()
        if self.world_size > 1:
            self._texts = _StartGather.apply(self._texts, self._transfer, self.group, self.world_size)

    def finish(self) -> Tensor:
        """(B, E), ranks in order. The sum over ranks of its gradient becomes that of this rank's features."""
        texts = self._texts
        if self.world_size > 1:
            texts = _FinishGather.apply(texts, self._transfer, self.group)
        return texts


class _Transfer:
    """A collective in the background, and the tensor that it fills."""

    def start(self, collective: Callable[..., Any], output: Tensor, input: Tensor, group: Any) -> Tensor:
        self._output, self._work = output, collective(output, input.contiguous(), group=group, async_op=True)
        return output

    def finish(self) -> Tensor:
        output, work = self._output, self._work
        del self._output, self._work  # the graph refers to this object
        work.wait()
        return output


class _StartGather(torch.autograd.Function):
    """(b, E) -> (B, E), which ``_FinishGather`` completes; backward: completes the sum that it starts."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, transfer: _Transfer, group: Any, world_size: int) -> Tensor:
        ctx.transfer = transfer
        gathered = features.new_empty(len(features) * world_size, *features.shape[1:])
        return transfer.start(_all_gather, gathered, features, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.transfer.finish(), None, None, None


class _FinishGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, texts: Tensor, transfer: _Transfer, group: Any) -> Tensor:
        ctx.transfer, ctx.group = transfer, group
        return transfer.finish().view_as(texts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        own = gradient.new_empty(len(gradient) // distributed.get_world_size(ctx.group), *gradient.shape[1:])
        ctx.transfer.start(_reduce_scatter, own, gradient, ctx.group)
        return gradient, None, None


class _TiledInfoNCE(torch.autograd.Function):
    """The mean of both cross-entropies, and of correct matches, over this rank's rows of the logits.

    ``image`` (b, E), ``texts`` (B, E) of all ranks, ``scale`` () or (1,); own texts start at ``first``.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, texts: Tensor, scale: Tensor, first: int, tile: int, group: Any
    ) -> tuple[Tensor, Tensor]:
        rows, columns = _OnlineLogSumExp(image, len(image)), _OnlineLogSumExp(image, len(texts))
        argmax = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        scaled = scale * image
        for start in range(0, len(texts), tile):
            cols = slice(start, start + tile)
            logits = scaled @ texts[cols].T  # (b, tile)
            max_logit, index = logits.max(dim=1)
            argmax = torch.where(max_logit > rows.max, index + start, argmax)
            rows.add(slice(None), logits, max_logit, dim=1)
            columns.add(cols, logits, logits.amax(dim=0), dim=0)
        if group is not None:
            columns.all_reduce(group)
        row, column = rows.value(), columns.value()
        own = torch.arange(first, first + len(image), device=image.device)
        diagonal = (scaled * texts[own]).sum(dim=1)
        ctx.save_for_backward(image, texts, scale, row, column)
        ctx.first, ctx.tile, ctx.tf32 = first, tile, torch.backends.cuda.matmul.allow_tf32
        loss, correct = ((row + column[own]) / 2 - diagonal).mean(), (argmax == own).to(image.dtype).mean()
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, row, column = ctx.saved_tensors

        def grad_logits(logits: Tensor, start: int) -> Tensor:
            grad = (logits - row[:, None]).exp_() + logits.sub_(column[start : start + ctx.tile]).exp_()
            _positive_pairs(grad, ctx.first, start).sub_(2)
            return grad

        factor = gradients[0] / (2 * len(image))
        with _allow_tf32(ctx.tf32):
            return *_tiled_gradients(image, texts, scale, ctx.tile, grad_logits, factor), *(None,) * 3


class _TiledSigmoidLoss(torch.autograd.Function):
    """The sum over all texts of -log sigmoid(+-logit), and correct matches, both as means over this rank's images.

    Arguments as of ``_TiledInfoNCE``; ``bias`` () or (1,) is added to the scaled cosines. The sign is + on own pairs.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, first: int, tile: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(image, texts, scale, bias)
        ctx.first, ctx.tile, ctx.tf32 = first, tile, torch.backends.cuda.matmul.allow_tf32
        total, scaled = image.new_zeros(()), scale * image
        max_logit = image.new_full((len(image),), -torch.inf)
        argmax = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        for start in range(0, len(texts), tile):
            logits = (scaled @ texts[start : start + tile].T).add_(bias)  # (b, tile)
            tile_max, index = logits.max(dim=1)
            argmax = torch.where(tile_max > max_logit, index + start, argmax)
            max_logit = torch.maximum(max_logit, tile_max)
            _positive_pairs(logits.neg_(), first, start).neg_()
            total = total - torch.nn.functional.logsigmoid(logits).sum()  # softplus turns linear too early for fp64
        own = torch.arange(first, first + len(image), device=image.device)
        loss, correct = total / len(image), (argmax == own).to(image.dtype).mean()
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, bias = ctx.saved_tensors
        grad_bias = image.new_zeros(())

        def grad_logits(logits: Tensor, start: int) -> Tensor:
            nonlocal grad_bias
            _positive_pairs(logits.add_(bias), ctx.first, start).neg_()
            grad = logits.sigmoid_()
            _positive_pairs(grad, ctx.first, start).neg_()
            grad_bias = grad_bias + grad.sum()
            return grad

        factor = gradients[0] / len(image)
        with _allow_tf32(ctx.tf32):
            grads = _tiled_gradients(image, texts, scale, ctx.tile, grad_logits, factor)
        return *grads, (factor * grad_bias).reshape(bias.shape), None, None


def _tiled_gradients(
    image: Tensor, texts: Tensor, scale: Tensor, tile: int, grad_logits: Callable[[Tensor, int], Tensor], factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, texts and scale. ``grad_logits``: (logits of a tile, its first text) -> their gradient."""
    grad_image, grad_text, scaled = torch.zeros_like(image), torch.empty_like(texts), scale * image
    with torch.autocast(image.device.type, enabled=False):
        for start in range(0, len(texts), tile):
            cols = slice(start, start + tile)
            grad = grad_logits(scaled @ texts[cols].T, start)
            grad_image += grad @ texts[cols]
            grad_text[cols] = grad.T @ image
        grad_scale = (factor * (grad_image * image).sum()).reshape(scale.shape)
        # in place: a copy of the texts' gradient would double the largest tensor of the loss
        return grad_image.mul_(factor * scale), grad_text.mul_(factor * scale), grad_scale


@contextlib.contextmanager
def _allow_tf32(allowed: bool) -> Iterator[None]:
    """Switch TF32 for matrix products on CUDA."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _positive_pairs(tile: Tensor, first: int, start: int) -> Tensor:
    """A view of the positive pairs' elements in a tile (b, columns) that starts at text ``start``; may be empty."""
    low = max(first, start)
    high = max(low, min(first + tile.shape[0], start + tile.shape[1]))
    return tile[low - first : high - first, low - start : high - start].diagonal()


class _OnlineLogSumExp:
    """Log-sum-exp of ``n`` rows or columns, computed part by part."""

    def __init__(self, like: Tensor, n: int) -> None:
        self.max, self.sum = like.new_full((n,), -torch.inf), like.new_zeros(n)

    def add(self, index: slice, logits: Tensor, part_max: Tensor, dim: int) -> None:
        """Add ``logits`` along ``dim``, with maxima ``part_max``, to the elements ``index``."""
        new_max = torch.maximum(self.max[index], part_max)
        scaled_sum = self.sum[index] * (self.max[index] - new_max).exp()
        self.sum[index] = scaled_sum + (logits - new_max.unsqueeze(dim)).exp_().sum(dim)
        self.max[index] = new_max

    def all_reduce(self, group: Any) -> None:
        """Combine over ranks. Collective."""
        new_max = self.max.clone()
        distributed.all_reduce(new_max, distributed.ReduceOp.MAX, group=group)
        self.sum *= (self.max - new_max).exp()
        distributed.all_reduce(self.sum, group=group)
        self.max = new_max

    def value(self) -> Tensor:
        return self.max + self.sum.log()


def contrastive_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, *, group: Any = None, tile: int = LOSS_TILE,
    tf32: bool = False, gather: TextGather | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and accuracy over this rank's rows of the logits, both () fp32, or fp64 if the features are.

    Their means over ranks are those of the global batch (``flip.distributed.collectives.mean_over_ranks``). The
    gradient needs no such mean, since the trainer averages gradients over ranks.

    Args:
        image, text: this rank's normalised features (b, E), in the same order; b must be equal on all ranks.
        scale: factor of the cosines.
        bias: None for InfoNCE, the mean of the cross-entropies image -> text and text -> image. Otherwise added to the
            logits for SigLIP's loss: the sum of -log sigmoid of the logit of each of the B own pairs, and of minus that
            of each of the B^2 - B others, over B.
        tile: columns of logits computed at once (``flip.costs.loss_bytes``).
        tf32: multiply in TF32 on CUDA, forward and backward.
        gather: of ``text`` over ``group``, if it was started before.

    Accuracy is the share of images whose own text has the largest logit.
    """
    if gather is None:
        gather = TextGather(group)
        gather.start(text)
    world_size = gather.world_size
    first = distributed.get_rank(group) * len(image) if world_size > 1 else 0
    with torch.autocast(image.device.type, enabled=False), _allow_tf32(tf32):
        if image.dtype != torch.float64:
            image, scale = image.float(), scale.float()
        texts = gather.finish()
        group = (group or distributed.group.WORLD) if world_size > 1 else None
        if bias is None:
            loss, correct = _TiledInfoNCE.apply(image, texts, scale, first, tile, group)
        else:
            bias = bias.to(image.dtype)
            loss, correct = _TiledSigmoidLoss.apply(image, texts, scale, bias, first, tile)
    return loss, correct.detach()
