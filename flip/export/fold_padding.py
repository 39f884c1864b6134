"""Converts a text tower that ignores padding to one that attends to all positions, for libraries without such a mask.

The result has one channel more per head and computes the same numbers (docs/variants.md, Text without padding). The
first new channel of the residual stream marks padding: it is large in the embedding of [PAD] (id 0), zero in all
others, and no block writes to it. Each head gets one dimension more, in which every query is constant and the key of
padding is strongly negative, so that the softmax weight of padding is exactly zero.

The new channels affect two operations. LayerNorm: everything written to the stream is centred, so that the mean is zero
(it is subtracted anyway), and the deviation shrinks by a known factor. The scale of attention: 1 / sqrt(head size).

Position 0 must never be padding; it is [CLS] (``model.text.prepend_cls``), or empty captions would differ.
Letters: D width, H heads, d = D / H, D' = D + H.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flip.config.schema import TextTower

StateDict = Mapping[str, Tensor]
_PAD_MARKER = 4096.0
"""The marker in the stream: larger than any other value, and finite in float16."""
_PAD_LOGIT = 16.0
"""Value of queries, and of keys per unit of the normalised marker: logits of padding are hundreds below all others."""
_KINDS = (
    ".tokens.weight", ".positions", ".projection.weight", ".attn.qkv.weight", ".attn.qkv.bias",
    ".attn.proj.weight", ".attn.proj.bias", ".mlp.fc1.weight", ".mlp.fc1.bias", ".mlp.fc2.weight", ".mlp.fc2.bias",
    ".norm.weight", ".norm1.weight", ".norm2.weight", ".norm.bias", ".norm1.bias", ".norm2.bias",
)  # fmt: skip
"""Names of the tower's parameters behind ``text`` or ``text.blocks.N``."""
_STEM = re.compile(r"text(\.blocks\.\d+)?(?=\.)")


def applies(tower: TextTower) -> bool:
    """Whether the tower ignores padding that another library would attend to."""
    return tower.padding == "mask" and not tower.causal


def fold_padding_mask(state: StateDict, tower: TextTower) -> tuple[dict[str, Tensor], TextTower, float]:
    """The parameters of the wider tower, that tower, and the factor by which its LayerNorms need a smaller eps.

    Parameters of other names are passed on. Computes in fp64; keeps the dtypes of ``state``.
    """
    wide = tower.width + tower.heads
    return _convert(state, tower, _widen), dataclasses.replace(tower, width=wide, padding="attend"), tower.width / wide


def unfold_padding_mask(state: StateDict, tower: TextTower) -> dict[str, Tensor]:
    """The inverse of ``fold_padding_mask`` for ``tower``: the same model, but its stream is centred."""
    return _convert(state, tower, _narrow)


def _convert(
    state: StateDict, tower: TextTower, change: Callable[[str, Tensor, TextTower], Tensor]
) -> dict[str, Tensor]:
    converted = dict(state)
    for name, value in state.items():
        kind = _STEM.sub("", name, count=1)
        if kind in _KINDS:
            converted[name] = change(kind, value.double(), tower).to(value.dtype).contiguous()
    return converted


def _widen(kind: str, value: Tensor, tower: TextTower) -> Tensor:
    width = tower.width
    heads = tower.heads
    d = tower.width // tower.heads
    wide = width + heads
    matrix = value.ndim == 2
    if kind == ".tokens.weight":
        result = _pad(_centred(value, 1), len(value), wide)
        result[0, width] = _PAD_MARKER
        return result
    if kind == ".positions":
        return _pad(_centred(value, 1), len(value), wide)
    if kind == ".projection.weight":
        return _pad(value, len(value), wide)
    if kind.startswith(".attn.qkv."):  # (3 D, D) or (3 D,), by q, k, v, then head, then dimension
        result = _pad(value.view(3, heads, d, *value.shape[1:]), 3, heads, d + 1, *([wide] if matrix else []))
        result[0] *= ((d + 1) / d) ** 0.5
        if matrix:
            result[1, :, d, width] = -_PAD_LOGIT
        else:
            result[0, :, d] = _PAD_LOGIT
        return result.flatten(0, 2)
    if kind == ".attn.proj.weight":  # (D, D), from heads and their dimensions to the stream
        return _pad(_centred(value, 0).view(-1, heads, d), wide, heads, d + 1).flatten(1)
    if kind in (".attn.proj.bias", ".mlp.fc2.weight", ".mlp.fc2.bias"):  # added to the stream
        return _pad(_centred(value, 0), wide, *([4 * wide] if matrix else []))
    if kind.startswith(".mlp.fc1."):
        return _pad(value, 4 * wide, *([wide] if matrix else []))
    if kind.endswith(".bias"):  # of a norm
        return _pad(value, wide)
    result = _pad(value * (width / wide) ** 0.5, wide)
    result[width] = 1.0
    return result


def _narrow(kind: str, value: Tensor, tower: TextTower) -> Tensor:
    width = tower.width
    heads = tower.heads
    d = tower.width // tower.heads
    if kind.startswith(".attn.qkv."):
        result = value.unflatten(0, (3, heads, d + 1))[:, :, :d]
        result = torch.cat([result[:1] * (d / (d + 1)) ** 0.5, result[1:]]).flatten(0, 2)
        if value.ndim == 1:
            return result
        return result[:, :width]
    if kind == ".attn.proj.weight":
        return value[:width].unflatten(1, (heads, d + 1))[:, :, :d].flatten(1)
    if kind.startswith(".norm") and kind.endswith(".weight"):
        return value[:width] * ((width + heads) / width) ** 0.5
    if kind.startswith(".mlp.fc1."):
        if value.ndim == 1:
            return value[: 4 * width]
        return value[: 4 * width, :width]
    if kind == ".mlp.fc2.weight":
        return value[:width, : 4 * width]
    if value.ndim == 1:
        return value[:width]
    return value[:, :width]


def _pad(value: Tensor, *shape: int) -> Tensor:
    """Zeros of this shape with ``value`` in the first corner."""
    result = value.new_zeros(shape)
    result[tuple(slice(n) for n in value.shape)] = value
    return result


def _centred(value: Tensor, dim: int) -> Tensor:
    return value - value.mean(dim=dim, keepdim=True)
