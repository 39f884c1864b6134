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

from flip.models.loss import contrastive_loss

Inputs = tuple[Tensor, ...]
"""patches (b, K, p*p*3), keep (b, K), tokens (b, T), of shortened captions places (b, T); on the host or the device."""


def gradients(
    pair: nn.Module, inputs: Inputs, micro: int, device: torch.device, autocast: AbstractContextManager[Any]
) -> tuple[Tensor, Tensor]:
    """Leave the loss's gradient in the parameters' ``grad``, which must be None; returns loss and accuracy.

    ``micro``: micro-batches, which divides b; both results are () and those of the global batch, without a graph.
    Collective where there are several ranks. ``autocast`` is entered around every pass.
    """
    parts = [tuple(part) for part in zip(*(field.chunk(micro) for field in inputs), strict=True)]
    if micro == 1:
        loss, accuracy = contrastive_loss(*_encode(pair, parts[0], device, autocast))
        loss.backward()
        return loss.detach(), accuracy
    with torch.no_grad():
        images, texts, *shared = zip(*(_encode(pair, part, device, autocast) for part in parts), strict=True)
    leaves = [torch.cat(images), torch.cat(texts), *(value[0] for value in shared)]
    for leaf in leaves:
        leaf.requires_grad_()
    loss, accuracy = contrastive_loss(*leaves)
    of_image, of_text, *of_shared = torch.autograd.grad(loss, leaves)
    wanted = zip(of_image.chunk(micro), of_text.chunk(micro), strict=True)
    for number, (part, of_features) in enumerate(zip(parts, wanted, strict=True)):
        _last(pair, number == micro - 1)
        # The gradient of scale and bias is that of the whole loss: it is fed in once.
        once = [of if number == 0 else torch.zeros_like(of) for of in of_shared]
        torch.autograd.backward(_encode(pair, part, device, autocast), [*of_features, *once])
    return loss.detach(), accuracy


def positions(pair: nn.Module, tokens: Tensor) -> float:
    """Positions of a caption that the text tower computes, the mean of a batch (b, T)."""
    rows = pair.text.token_indices(tokens)  # type: ignore[operator, union-attr]
    return tokens.shape[1] if rows is None else len(rows) / len(tokens)


def _encode(pair: nn.Module, part: Any, device: torch.device, autocast: AbstractContextManager[Any]) -> list[Tensor]:
    rows = pair.text.token_indices(part[2])  # type: ignore[operator, union-attr]
    if rows is not None and device.type == "cuda":
        rows = rows.pin_memory()  # as the batch is: the host would wait for a copy from other memory
    fields = [field.to(device, non_blocking=True) for field in part]
    with autocast:
        return list(pair(*fields, token_indices=None if rows is None else rows.to(device, non_blocking=True)))


def _last(pair: nn.Module, last: bool) -> None:
    """Ranks add up their gradients once, after the last micro-batch."""
    if isinstance(pair, FSDPModule):
        pair.set_requires_gradient_sync(last)
        pair.set_is_last_backward(last)
        pair.set_reshard_after_backward(last)
