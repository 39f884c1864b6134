"""Computes a loss of ``flip.loss_kinds`` over the global batch, in tiles and over ranks (docs/recipe.md, Objective).

Dimensions: W ranks of b pairs, B = W * b, E features. A rank computes its own b rows of the (B, B) logits in tiles of
some columns, so that memory is O(b * tile) beside the gathered texts; backward recomputes the tiles.

Gradients fit the averaging over ranks of FSDP and DDP: a rank back-propagates the mean over its own b rows, the
gradients of gathered texts are summed over ranks, and the average over ranks turns 1/b into 1/B.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed

from flip.loss_kinds import Accuracy, Loss, Tiles, loss_kind
from flip.model_costs import LOSS_TILE

# Newer torch renamed both and warns about the old names at every call.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


def contrastive_loss(
    objective: str, image: Tensor, text: Tensor, scale: Tensor, *parameters: Tensor, group: Any = None,
    tile: int = LOSS_TILE, tf32: bool = False, gather: TextGather | None = None,
    fields: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss and accuracy over this rank's rows of the logits, both () fp32, or fp64 if the features are.

    Their means over ranks are those of the global batch (``flip.distributed.collectives.mean_over_ranks``). The
    gradient needs no such mean, since the trainer averages gradients over ranks.

    Args:
        objective: ``model.objective``.
        image, text: this rank's normalised features (b, E), in the same order; b must be equal on all ranks.
        scale: factor of the cosines.
        parameters: the learned parameters of the loss, in its order.
        tile: columns of logits computed at once (``flip.model_costs.loss_bytes``).
        tf32: multiply in TF32 on CUDA, forward and backward.
        gather: of ``text`` over ``group``, if it was started before.
        fields: ``Tiles.fields``, on the device of the features.

    Accuracy is the share of images whose own text has the largest logit.
    """
    if gather is None:
        gather = TextGather(group)
        gather.start(text)
    world_size = gather.world_size
    first = 0
    if world_size > 1:
        first = distributed.get_rank(group) * len(image)
    with torch.autocast(image.device.type, enabled=False), _allow_tf32(tf32):
        if image.dtype != torch.float64:
            image = image.float()
            scale = scale.float()
        parameters = tuple(value.to(image.dtype) for value in parameters)
        texts = gather.finish()
        ranks = None
        if world_size > 1:
            ranks = group or distributed.group.WORLD
        value, correct = _TiledLoss.apply(
            loss_kind(objective), first, tile, ranks, fields or {}, image, texts, scale, *parameters
        )
    return value, correct.detach()


class TextGather:
    """Gathers the texts of all ranks while the image tower computes, and sums their gradients while it back-propagates.

    ``start`` is called between the forward passes of the towers, text first. Autograd runs nodes in reverse order, so
    the sum over ranks, which starts as soon as the loss has its gradients, has to be complete only when the backward
    pass of the image tower has ended. The values do not depend on when it is called.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self._transfer = _Transfer()
        if distributed.is_initialized():
            self.world_size = distributed.get_world_size(group)
        else:
            self.world_size = 1

    def start(self, text: Tensor) -> None:
        """Start the gather of this rank's features (b, E). Collective."""
        if text.dtype == torch.float64:
            self._texts = text
        else:
            self._texts = text.float()
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
        self._output = output
        self._work = collective(output, input.contiguous(), group=group, async_op=True)
        return output

    def finish(self) -> Tensor:
        output = self._output
        work = self._work
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
        ctx.transfer = transfer
        ctx.group = group
        return transfer.finish().view_as(texts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        own = gradient.new_empty(len(gradient) // distributed.get_world_size(ctx.group), *gradient.shape[1:])
        ctx.transfer.start(_reduce_scatter, own, gradient, ctx.group)
        return gradient, None, None


class _TiledLoss(torch.autograd.Function):
    """A loss, and the share of correct matches, over this rank's rows of the logits.

    ``image`` (b, E), ``texts`` (B, E) of all ranks, ``scale`` and learned parameters () or (1,); own texts start at
    ``first``. Backward computes the tiles again.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Loss, first: int, tile: int, group: Any, fields: Mapping[str, Tensor], image: Tensor,
        texts: Tensor, scale: Tensor, *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tiles = Tiles(loss, image, texts, scale, parameters, first, tile, group, fields)
        accuracy = Accuracy(image)
        value, saved = loss.forward(tiles, accuracy)
        ctx.save_for_backward(image, texts, scale, *parameters, *saved)
        ctx.arguments = loss, first, tile, group, fields
        ctx.count = len(parameters)
        ctx.tf32 = torch.backends.cuda.matmul.allow_tf32
        correct = accuracy.mean(tiles.own)
        ctx.mark_non_differentiable(correct)
        return value, correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        image, texts, scale, *others = ctx.saved_tensors
        parameters = others[: ctx.count]
        saved = others[ctx.count :]
        loss, first, tile, group, fields = ctx.arguments
        factor = gradients[0] / (loss.terms * len(image))
        grad_image = torch.zeros_like(image)
        grad_text = torch.empty_like(texts)
        sums = [image.new_zeros(()) for _ in parameters]
        with _allow_tf32(ctx.tf32), torch.autocast(image.device.type, enabled=False):
            tiles = Tiles(loss, image, texts, scale, parameters, first, tile, group, fields)
            for columns, logits in tiles:
                grad, parts = loss.gradient(tiles, columns, logits, saved)
                del logits  # the products below need memory
                grad_image += grad @ texts[columns]
                grad_text[columns] = grad.T @ image
                sums = [total + part for total, part in zip(sums, parts, strict=True)]
                del grad  # before the next tile is computed
            grad_scale = (factor * (grad_image * image).sum()).reshape(scale.shape)
            # in place: a copy of the texts' gradient would double the largest tensor of the loss
            grad_image.mul_(factor * scale)
            grad_text.mul_(factor * scale)
        of_parameters = [(factor * total).reshape(value.shape) for total, value in zip(sums, parameters, strict=True)]
        return None, None, None, None, None, grad_image, grad_text, grad_scale, *of_parameters


@contextlib.contextmanager
def _allow_tf32(allowed: bool) -> Iterator[None]:
    """Switch TF32 for matrix products on CUDA."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
