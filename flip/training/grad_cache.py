"""The gradient of one global batch, in one pass or in micro-batches that give the same gradient.

The contrastive loss of a micro-batch is another loss, since each pair sees fewer negatives. Therefore the features of
all micro-batches are computed first, without a graph. The loss over the global batch gives the gradient of each
feature; then each micro-batch is encoded again and receives its gradients (Gao et al. 2021, "Scaling deep contrastive
learning batch size"). The masks travel with the batch, so this is exact. It costs one more forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flip.distributed.parallel import is_fsdp_unit
from flip.model_costs import LOSS_TILE
from flip.models.tiled_loss import TextGather, contrastive_loss
from flip.models.token_head import TokenTargets

Inputs = tuple[Tensor, ...]
"""patches (b, K, p*p*3), keep_indices (b, K), tokens (b, T), for shortened captions also position_ids (b, T); on the
host or the device."""


class PairFeatures(NamedTuple):
    """The features of this rank's pairs, from which the loss was computed, without a graph. Row i is pair i of the
    batch."""

    image: Tensor
    """(b, E) fp32 of norm 1, on the device."""
    text: Tensor
    """(b, E) fp32 of norm 1, on the device."""


class Classification(NamedTuple):
    """What the text classification head learns from a batch."""

    weight: float
    """Factor of its loss, which is added to the contrastive one."""
    ids: Tensor
    """(b, T) as ``TokenTargets.ids``, on the host."""
    token_weights: Tensor
    """(V,) on the device."""


def grad_cache_backward(
    model: nn.Module,
    inputs: Inputs,
    num_micro_batches: int,
    device: torch.device,
    autocast: AbstractContextManager[Any],
    tile: int = LOSS_TILE,
    tf32: bool = False,
    classification: Classification | None = None,
    on_features: Callable[[PairFeatures], object] | None = None,
    fields: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Add the loss's gradient to ``grad`` of the parameters, which must be None. Returns loss and accuracy, and the
    loss of the text classification head if there is a ``classification``.

    ``num_micro_batches`` divides b. Results are (), of this rank's rows of the logits, without a graph.
    ``autocast`` is entered around every pass. ``tile``, ``tf32``: of ``contrastive_loss``. ``on_features`` is called
    with the features of all micro-batches, before the backward pass; they share memory with those of the loss, so it
    must not write to them. ``fields``: ``Tiles.fields``, on the host. Collective.
    """
    batches = [tuple(part) for part in zip(*(field.chunk(num_micro_batches) for field in inputs), strict=True)]
    targets: list[TokenTargets | None] = [None] * num_micro_batches
    if classification is not None:
        targets = [*_targets(classification, num_micro_batches, device, tile)]
    objective: Any = model.objective
    numbers = dict(zip(fields or {}, _copy([*(fields or {}).values()], device), strict=True))
    if num_micro_batches == 1:
        gather = TextGather()
        outputs = _encode(model, batches[0], device, autocast, gather.start, targets[0])
        of_head = [outputs.pop()] if classification else []
        if on_features is not None:
            on_features(PairFeatures(outputs[0].detach(), outputs[1].detach()))
        loss, accuracy = contrastive_loss(objective, *outputs, tile=tile, tf32=tf32, gather=gather, fields=numbers)
        total = loss
        if classification:
            total = loss + classification.weight * of_head[0]
        total.backward()
        return loss.detach(), accuracy, *(value.detach() for value in of_head)
    with torch.no_grad():
        images, texts, *scalars = zip(*(_encode(model, batch, device, autocast) for batch in batches), strict=True)
    leaves = [torch.cat(images), torch.cat(texts), *(value[0] for value in scalars)]
    if on_features is not None:
        on_features(PairFeatures(leaves[0].detach(), leaves[1].detach()))
    for leaf in leaves:
        leaf.requires_grad_()
    loss, accuracy = contrastive_loss(objective, *leaves, tile=tile, tf32=tf32, fields=numbers)
    grad_image, grad_text, *grad_scalars = torch.autograd.grad(loss, leaves)
    grads = zip(grad_image.chunk(num_micro_batches), grad_text.chunk(num_micro_batches), strict=True)
    losses = list[Tensor]()
    for number, (batch, grad_features) in enumerate(zip(batches, grads, strict=True)):
        _set_last_micro_batch(model, number == num_micro_batches - 1)
        # Gradients of the scale and of learned parameters are those of the loss of all micro-batches: add them once.
        once = [grad if number == 0 else torch.zeros_like(grad) for grad in grad_scalars]
        outputs = _encode(model, batch, device, autocast, targets=targets[number])
        if classification:
            losses.append(outputs[-1].detach())
            once.append(torch.full_like(losses[-1], classification.weight / num_micro_batches))
        torch.autograd.backward(outputs, [*grad_features, *once])
    of_head = [torch.stack(losses).mean()] if classification else []
    return loss.detach(), accuracy, *of_head


def _targets(classification: Classification, parts: int, device: torch.device, tile: int) -> Iterator[TokenTargets]:
    """Those of each micro-batch, without the positions that no caption of the batch needs."""
    ids = classification.ids
    longest = max(1, int((ids >= 0).sum(dim=1).max()))  # on the host
    for part in ids[:, :longest].chunk(parts):
        yield TokenTargets(part.to(device, non_blocking=True), classification.token_weights, tile)


def mean_text_tokens(model: nn.Module, tokens: Tensor) -> float:
    """Tokens per caption that the text tower computes, the mean over a batch (b, T)."""
    indices = model.text.token_indices(tokens)  # type: ignore[operator, union-attr]
    if indices is None:
        return tokens.shape[1]
    return int((indices < tokens.numel()).sum()) / len(tokens)  # without those that fill a bucket of lengths


def _encode(
    model: nn.Module, batch: Any, device: torch.device, autocast: AbstractContextManager[Any], on_text: Any = None,
    targets: TokenTargets | None = None,
) -> list[Tensor]:  # fmt: skip
    indices = model.text.token_indices(batch[2])  # type: ignore[operator, union-attr]
    if indices is not None and device.type == "cuda":
        indices = indices.pin_memory()  # like the batch: the host would wait for a copy from pageable memory
    fields = _copy([*batch, *([] if indices is None else [indices])], device)
    indices = None if indices is None else fields.pop()
    with autocast:
        return list(model(*fields, token_indices=indices, on_text=on_text, targets=targets))


def _copy(fields: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The fields on the device, copied on a stream of their own while the device computes what was launched before.

    The host is a step ahead of a GPU, so the batch of the next step arrives during this one.
    """
    if device.type != "cuda":
        return [field.to(device) for field in fields]
    copying = _copy_stream(device)
    computing = torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        copies = [field.to(device, non_blocking=True) for field in fields]
    computing.wait_stream(copying)
    for copy in copies:
        copy.record_stream(computing)
    return copies


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _set_last_micro_batch(model: nn.Module, last: bool) -> None:
    """Ranks sum their gradients once, after the last micro-batch."""
    if is_fsdp_unit(model):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last)
