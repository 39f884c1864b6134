"""A text tower that sees no padding as one that attends to all positions, for libraries without a padding mask.

It is wider by one channel per head and computes the same numbers (docs/recipe.md, Text without padding). The first new
channel of the residual stream marks padding: the embedding of [PAD] (id 0) is large there, all others are zero, and no
block writes to it. Each head gets one dimension more, in which every query is a constant and the key of padding is
strongly negative: its weight in the softmax is zero, to the last bit. Two things would feel the new channels, and are
told beforehand: LayerNorm, whose mean becomes zero as all that is written to the stream is centred (it subtracts the
mean anyway), and whose deviation is smaller by a known factor; and the scale of attention, 1 / sqrt(head's dimensions).

Position 0 must never be padding: [CLS] stands there (``model.text.prepend_cls``), else empty captions differ.
Letters: D width, H heads, d = D / H, D' = D + H.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flip.config.schema import TextTower

State = Mapping[str, Tensor]
_MARK = 4096.0
"""Of padding in the stream: drowns what else is there, and is a number in float16 too."""
_PUSH = 16.0
"""Of queries, and of keys per unit of the normalised mark: logits of padding lie hundreds below all others."""


def attending(state: State, tower: TextTower) -> tuple[dict[str, Tensor], TextTower, float]:
    """The parameters of the text encoder (names below ``text.``) -> those of the wider tower, that tower, and the
    factor by which its LayerNorms need a smaller eps.

    Other parameters are passed on. fp64 inside; the result has the dtype of the state.
    """
    wide = tower.width + tower.heads
    found = _each(state, lambda kind, value: _WIDER[kind](value, tower, wide))
    return found, dataclasses.replace(tower, width=wide, padding="attend"), tower.width / wide


def without(state: State, tower: TextTower) -> dict[str, Tensor]:
    """What ``attending`` made of ``tower`` back in the tower's own shapes: the same model, its stream now centred."""
    return _each(state, lambda kind, value: _narrower(kind, value, tower))


def _each(state: State, change: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    found = dict(state)
    for name, value in state.items():
        if name.startswith("text."):
            (kind,) = (end for end in _WIDER if name.endswith(end))
            found[name] = change(kind, value.double()).to(value.dtype).contiguous()
    return found


def _narrower(kind: str, value: Tensor, tower: TextTower) -> Tensor:
    width, heads, d = tower.width, tower.heads, tower.width // tower.heads
    if kind.startswith(".attn.qkv."):
        whole = value.unflatten(0, (3, heads, d + 1))[:, :, :d]
        whole = torch.cat([whole[:1] * (d / (d + 1)) ** 0.5, whole[1:]]).flatten(0, 2)
        return whole if value.ndim == 1 else whole[:, :width]
    if kind == ".attn.proj.weight":
        return value[:width].unflatten(1, (heads, d + 1))[:, :, :d].flatten(1)
    if kind.startswith(".norm") and kind.endswith(".weight"):
        return value[:width] * ((width + heads) / width) ** 0.5
    if kind.startswith(".mlp.fc1."):
        return value[: 4 * width] if value.ndim == 1 else value[: 4 * width, :width]
    if kind == ".mlp.fc2.weight":
        return value[:width, : 4 * width]
    return value[:width] if value.ndim == 1 else value[:, :width]


def _pad(value: Tensor, *shape: int) -> Tensor:
    """Zeros of a shape with ``value`` in their first corner."""
    whole = value.new_zeros(shape)
    whole[tuple(slice(n) for n in value.shape)] = value
    return whole


def _centred(value: Tensor, dim: int) -> Tensor:
    return value - value.mean(dim=dim, keepdim=True)


def _tokens(value: Tensor, tower: TextTower, wide: int) -> Tensor:
    whole = _pad(_centred(value, 1), len(value), wide)
    whole[0, tower.width] = _MARK
    return whole


def _positions(value: Tensor, tower: TextTower, wide: int) -> Tensor:
    return _pad(_centred(value, 1), len(value), wide)


def _gain(value: Tensor, tower: TextTower, wide: int) -> Tensor:
    whole = _pad(value * (tower.width / wide) ** 0.5, wide)
    whole[tower.width] = 1.0
    return whole


def _vector(value: Tensor, tower: TextTower, wide: int) -> Tensor:
    return _pad(value, wide)


def _qkv(value: Tensor, tower: TextTower, wide: int) -> Tensor:
    """(3 D, D) or (3 D,), by q, k, v, then head, then dimension."""
    heads, d = tower.heads, tower.width // tower.heads
    whole = value.new_zeros(3, heads, d + 1, *([wide] if value.ndim == 2 else []))
    inner = value.view(3, heads, d, *value.shape[1:])
    whole[(slice(None), slice(None), slice(d), *(slice(n) for n in value.shape[1:]))] = inner
    whole[0] *= ((d + 1) / d) ** 0.5
    if value.ndim == 1:
        whole[0, :, d] = _PUSH
    else:
        whole[1, :, d, tower.width] = -_PUSH
    return whole.flatten(0, 2)


def _out(value: Tensor, tower: TextTower, wide: int) -> Tensor:
    """(D, D): from heads and their dimensions to the stream."""
    heads, d = tower.heads, tower.width // tower.heads
    whole = value.new_zeros(wide, heads, d + 1)
    whole[: tower.width, :, :d] = _centred(value, 0).view(-1, heads, d)
    return whole.flatten(1)


def _written(value: Tensor, tower: TextTower, wide: int) -> Tensor:
    """A bias, or a matrix from the hidden layer, of what is added to the stream."""
    return _pad(_centred(value, 0), wide, *([4 * wide] if value.ndim == 2 else []))


def _hidden(value: Tensor, tower: TextTower, wide: int) -> Tensor:
    return _pad(value, 4 * wide, *([wide] if value.ndim == 2 else []))


def _projection(value: Tensor, tower: TextTower, wide: int) -> Tensor:
    return _pad(value, len(value), wide)


_WIDER: dict[str, Callable[[Tensor, TextTower, int], Tensor]] = {
    "text.tokens.weight": _tokens,
    "text.positions": _positions,
    "text.projection.weight": _projection,
    ".attn.qkv.weight": _qkv,
    ".attn.qkv.bias": _qkv,
    ".attn.proj.weight": _out,
    ".attn.proj.bias": _written,
    ".mlp.fc1.weight": _hidden,
    ".mlp.fc1.bias": _hidden,
    ".mlp.fc2.weight": _written,
    ".mlp.fc2.bias": _written,
    ".norm.weight": _gain,
    ".norm1.weight": _gain,
    ".norm2.weight": _gain,
    ".norm.bias": _vector,
    ".norm1.bias": _vector,
    ".norm2.bias": _vector,
}
