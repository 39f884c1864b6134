"""The symmetric InfoNCE loss over the global batch (docs/recipe.md, Objective).

With W ranks of b pairs, B = W * b: a rank computes its own rows and columns, two logit matrices b x B, and returns the
whole loss. Its gradient is right under the averaging over ranks that FSDP and DDP do: a rank back-propagates the mean
over its own b pairs, the gathered features' gradients are summed over ranks, and the average over ranks makes 1/b into
1/B.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

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


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, group: Any = None) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of the global batch, both () fp32 (fp64 where the features are) and equal on all ranks.

    ``image`` and ``text`` are this rank's normalised features (b, E), in the same order; b must be equal on all ranks.
    ``scale`` multiplies the cosines. Loss: mean of the cross-entropies image -> text and text -> image. Accuracy: share
    of images to which their own text is the nearest.
    """
    world = distributed.get_world_size(group) if distributed.is_initialized() else 1
    rank = distributed.get_rank(group) if world > 1 else 0
    with torch.autocast(image.device.type, enabled=False):
        if image.dtype != torch.float64:
            image, text, scale = image.float(), text.float(), scale.float()
        images, texts = image, text
        if world > 1:
            images, texts = (_Gather.apply(x, group, world) for x in (image, text))
        to_text, to_image = scale * image @ texts.T, scale * text @ images.T
        own = torch.arange(rank * len(image), (rank + 1) * len(image), device=image.device)
        loss = (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2
        accuracy = (to_text.detach().argmax(dim=1) == own).to(loss.dtype).mean()
        if world > 1:
            loss, accuracy = _Whole.apply(torch.stack([loss, accuracy]), group, world).unbind()
    return loss, accuracy.detach()
