"""The transformer block of both towers: timm's, which takes captions without their padding too.

Letters: b sequences of T tokens, D a tower's width, N tokens of a batch that are no padding. Packed, those N are the
rows (N, D) of all layers; inside attention they lie in their captions, (b, T), and a mask keeps padding out of sight.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flip.config import schema

EPS = 1e-6


class Layout(NamedTuple):
    """Where the tokens of packed captions lie."""

    rows: Tensor
    """(N,) int64, ascending: places out of b * T that hold a token; b * T itself for rows that only fill up."""
    first: Tensor
    """(b,) int64: the row of each caption's position 0."""
    bias: Tensor
    """(b, 1, 1, T): 0 where a token lies, minus infinity on padding; in the dtype of activations."""


class _Spread(torch.autograd.Function):
    """(N, C) rows -> (``size``, C): each at its place, zeros elsewhere. Rows of place ``size`` vanish."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(rows)
        return spread(x, rows, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return pick(gradients[0], ctx.saved_tensors[0]), None, None


class _Pick(torch.autograd.Function):
    """(``size``, C) -> (N, C): what ``_Spread`` undoes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.size = len(x)
        ctx.save_for_backward(rows)
        return pick(x, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return spread(gradients[0], ctx.saved_tensors[0], ctx.size), None


def spread(x: Tensor, rows: Tensor, size: int) -> Tensor:
    """As ``_Spread``."""
    return x.new_zeros(size + 1, x.shape[1]).index_copy_(0, rows, x)[:size]


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """(size, C) -> (N, C): rows by their places; zeros for those of place ``size``."""
    return F.pad(x, (0, 0, 0, 1)).index_select(0, rows)


class _Attention(Attention):
    """timm's, of packed rows too, and with ``first`` of each sequence's first token alone."""

    def forward(self, x: Tensor, layout: Layout | None = None, first: bool = False) -> Tensor:  # type: ignore[override]
        """(b, T, D) or, with a layout, (N, D) -> the same; with ``first`` (b, D)."""
        qkv = self.qkv(x)
        if layout is not None:
            b, _, _, length = layout.bias.shape
            qkv = _Spread.apply(qkv, layout.rows, b * length).view(b, length, -1)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        if first:
            q = q[:, :, :1]
        bias = None if layout is None else layout.bias
        if self.fused_attn:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            weights = (q * self.scale) @ k.mT
            y = (weights if bias is None else weights + bias).softmax(dim=-1) @ v
        y = y.transpose(1, 2).flatten(2)
        if first:
            y = y.squeeze(1)
        elif layout is not None:
            y = _Pick.apply(y.flatten(0, 1), layout.rows)
        out: Tensor = self.proj(y)
        return out


def _dear(context: Any, op: Any, *inputs: Any, **_: Any) -> CheckpointPolicy:
    """Keep the products of matrices and SDPA's output; norms, activation and explicit attention are computed again.

    The product that ends a block narrows its input, and nothing in the backward pass asks for its output.
    """
    product = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    keep = inputs[-1].shape[0] <= inputs[-1].shape[1] if product else "scaled_dot_product" in op.name()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_RECOMPUTE: dict[str, dict[str, Any]] = {
    "block": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, _dear)},
}


class _Block(Block):
    """timm's pre-norm block. ``first``: only what becomes of each sequence's first token, as no other one is read."""

    recompute = "no"

    def forward(self, x: Tensor, layout: Layout | None = None, first: bool = False) -> Tensor:  # type: ignore[override]
        if self.recompute == "no" or not torch.is_grad_enabled():
            return self._run(x, layout, first)
        # Inside the module, so that sharding sees one forward pass and the names of parameters stay.
        how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, **_RECOMPUTE[self.recompute]}
        again: Tensor = checkpoint(self._run, x, layout, first, **how)
        return again

    def _run(self, x: Tensor, layout: Layout | None, first: bool) -> Tensor:
        y = self.attn(self.norm1(x), layout, first)
        if first:
            x = x[:, 0] if layout is None else x.index_select(0, layout.first)
        x = x + y
        return x + self.mlp(self.norm2(x))


def blocks(tower: schema.ImageTower | schema.TextTower, attention: str) -> nn.ModuleList:
    act: Any = partial(nn.GELU, approximate="tanh")
    norm: Any = partial(nn.LayerNorm, eps=EPS)
    made = nn.ModuleList()
    for _ in range(tower.layers):
        block: Any = _Block(
            tower.width, tower.heads, qkv_bias=True, act_layer=act, norm_layer=norm, attn_layer=_Attention
        )
        block.attn.fused_attn = attention == "sdpa"
        made.append(block)
    return made
