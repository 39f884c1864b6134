"""The gradient of one global batch: at once, or in micro-batches that give the same gradient.

A contrastive loss of micro-batches is another loss: each pair would see fewer others. So the features of all of them
are computed first, without a graph; the loss over the whole global batch gives the gradient of every feature; then each
micro-batch is encoded again and that gradient fed into it (Gao et al. 2021, "Scaling deep contrastive learning batch
size"). With masks it is exact too, as ``keep`` travels with the batch. It costs a forward pass more.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from flip.contrastive import contrastive_loss

Inputs = tuple[Tensor, Tensor, Tensor]
"""patches (b, K, p*p*3), keep (b, K), tokens (b, T), on the host or the device."""


def gradients(
    pair: nn.Module, inputs: Inputs, micro: int, device: torch.device, autocast: AbstractContextManager[Any]
) -> tuple[Tensor, Tensor]:
    """Leave the loss's gradient in the parameters' ``grad``, which must be None; returns loss and accuracy.

    ``micro``: micro-batches, which divides b; both results are () and those of the global batch, without a graph.
    Collective where there are several ranks. ``autocast`` is entered around every pass.
    """
    parts = [tuple(part) for part in zip(*(field.chunk(micro) for field in inputs), strict=True)]
    if micro == 1:
        image, text, scale = _encode(pair, parts[0], device, autocast)
        loss, accuracy = contrastive_loss(image, text, scale)
        loss.backward()
        return loss.detach(), accuracy
    with torch.no_grad():
        images, texts, scales = zip(*(_encode(pair, part, device, autocast) for part in parts), strict=True)
    leaves = [torch.cat(images), torch.cat(texts), scales[0]]
    for leaf in leaves:
        leaf.requires_grad_()
    loss, accuracy = contrastive_loss(*leaves)
    of_image, of_text, of_scale = torch.autograd.grad(loss, leaves)
    wanted = zip(of_image.chunk(micro), of_text.chunk(micro), strict=True)
    for number, (part, of_features) in enumerate(zip(parts, wanted, strict=True)):
        _last(pair, number == micro - 1)
        # The scale's gradient is that of the whole loss: it is fed in once.
        features = _encode(pair, part, device, autocast)
        torch.autograd.backward(features, [*of_features, of_scale if number == 0 else torch.zeros_like(of_scale)])
    return loss.detach(), accuracy


def _encode(pair: nn.Module, part: Any, device: torch.device, autocast: AbstractContextManager[Any]) -> list[Tensor]:
    fields = (field.to(device, non_blocking=True) for field in part)
    with autocast:
        return list(pair(*fields))


def _last(pair: nn.Module, last: bool) -> None:
    """Ranks add up their gradients once, after the last micro-batch."""
    if isinstance(pair, FSDPModule):
        pair.set_requires_gradient_sync(last)
        pair.set_is_last_backward(last)
        pair.set_reshard_after_backward(last)
