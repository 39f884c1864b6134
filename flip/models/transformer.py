"""The pre-norm transformer block of both towers, which also takes packed captions.

Dimensions: b sequences, T tokens each, D the tower's width, N tokens of a batch that are not padding. Packed
activations are (N, D) in all layers; only attention unpacks them to (b, T, D), with a mask over padding, unless it has
a kernel for packed sequences (``varlen_kernel``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flip.config import schema
from flip.models.attention import is_fused

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
"""``model.activation`` -> the function."""
_FUSED = "scaled_dot_product", "varlen_attn"


def varlen_kernel(device: torch.device, dtype: torch.dtype, fused: bool, head_width: int) -> Callable[..., Any] | None:
    """``varlen_attn``, which attends to packed captions without padding and mask (FlashAttention's kernel of torch), or
    None.

    It is for bf16 and fp16 on CUDA, from compute capability 8.0, and heads of 8 to 256 values in steps of 8. Its
    backward pass is not deterministic.
    """
    usable = (
        fused
        and device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_width % 8 == 0
        and head_width <= 256
        and not torch.are_deterministic_algorithms_enabled()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    return _load_varlen() if usable else None


@cache
def _load_varlen() -> Callable[..., Any] | None:
    """Attention of packed sequences, or None: before torch 2.10 there is none, and 2.10 has other arguments.

    Imported late: the import sets torch's own folder for compiled code, if none is set.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "window_size" in signature(varlen_attn).parameters:
        return varlen_attn
    return None


class PackedLayout(NamedTuple):
    """Positions of the tokens of packed captions."""

    token_indices: Tensor
    """(N,) int64, ascending: indices of tokens in the flattened (b * T); b * T itself for rows that only fill up."""
    pooled: Tensor
    """(b,) int64: the packed row of each caption's pooled token."""
    bias: Tensor
    """(b, 1, 1, T): 0 at tokens, minus infinity at padding; in the dtype of activations."""
    causal: bool
    """Whether a token attends to earlier ones only. The pooled token is then each caption's last."""
    offsets: Tensor | None = None
    """(S + 1,) int32: first rows of the S sequences for ``kernel``, and N. Rows that only fill up are in sequences of
    their own, as the kernel writes no row outside."""
    kernel: Callable[..., Any] | None = None
    """``varlen_kernel``; None: attend with the mask."""


def unpack(x: Tensor, indices: Tensor, size: int) -> Tensor:
    """(N, C) -> (size, C): each row at its index, zeros elsewhere. Rows of index ``size`` are dropped."""
    return x.new_zeros(size + 1, x.shape[1]).index_copy_(0, indices, x)[:size]


def pack(x: Tensor, indices: Tensor) -> Tensor:
    """(size, C) -> (N, C): the rows at ``indices``; zeros for those of index ``size``."""
    return F.pad(x, (0, 0, 0, 1)).index_select(0, indices)


class _Pack(torch.autograd.Function):
    """``pack`` whose backward pass copies rows; autograd's own would add them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indices: Tensor) -> Tensor:
        ctx.size = x.shape[0]
        ctx.save_for_backward(indices)
        return pack(x, indices)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return unpack(gradients[0], ctx.saved_tensors[0], ctx.size), None


class Attention(nn.Module):
    """Multi-head self-attention; ``fused`` uses ``scaled_dot_product_attention``."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.fused = fused
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: PackedLayout | None, pooled_only: bool) -> Tensor:
        """(b, T, D), or (N, D) with a layout, -> the same shape; with ``pooled_only`` (b, D), the pooled tokens."""
        qkv = self.qkv(x)
        bias = None
        causal = False
        if layout is not None and layout.kernel is not None and not pooled_only:
            packed: Tensor = self.proj(self._attend_packed(qkv, layout, layout.kernel))
            return packed
        if layout is None:
            q, k, v = self._heads(qkv)
            if pooled_only:
                q = q[:, :, :1]
        else:
            b, _, _, length = layout.bias.shape
            q, k, v = self._heads(unpack(qkv, layout.token_indices, b * length).view(b, length, -1))
            if pooled_only:
                q = self._heads(qkv.index_select(0, layout.pooled)[:, None])[0]
            # A causal mask hides padding too, which follows all tokens.
            causal = layout.causal and not pooled_only
            bias = None if causal else layout.bias
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
        else:
            logits = (q * self.head_width**-0.5) @ k.mT
            if causal:
                bias = torch.full_like(logits[0, 0], -torch.inf).triu(1)
            y = (logits if bias is None else logits + bias).softmax(dim=-1) @ v
        y = y.transpose(1, 2).flatten(2)
        if pooled_only:
            y = y.squeeze(1)
        elif layout is not None:
            y = _Pack.apply(y.flatten(0, 1), layout.token_indices)
        out: Tensor = self.proj(y)
        return out

    def _attend_packed(self, qkv: Tensor, layout: PackedLayout, kernel: Callable[..., Any]) -> Tensor:
        """(N, 3 D) -> (N, D)."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_width)).unbind(1)  # (N, heads, D/heads)
        length = layout.bias.shape[-1]
        window = -1, 0 if layout.causal else -1
        y: Tensor = kernel(q, k, v, layout.offsets, layout.offsets, length, length, window_size=window)
        return y.flatten(1)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """(b, T, 3 D) -> q, k and v, each (b, heads, T, D/heads)."""
        return qkv.unflatten(-1, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4).unbind()


class MLP(nn.Module):
    """Linear, activation, linear; the hidden layer has four times the width."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.activation(self.fc1(x)))
        return out


def _save_matmuls_policy(context: Any, op: Any, *inputs: Any, **_: Any) -> CheckpointPolicy:
    """Save matrix products and the output of fused attention; recompute norms, activation and explicit attention.

    The last product of a block narrows its input; the backward pass does not need its output.
    """
    product = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    if product:
        save = inputs[-1].shape[0] <= inputs[-1].shape[1]
    else:
        save = any(name in op.name() for name in _FUSED)
    if save:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_CHECKPOINT_OPTIONS: dict[str, dict[str, Any]] = {
    "block": {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, _save_matmuls_policy)},
}


def recomputed(how: str, forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """``forward(*arguments)`` of a block. ``how``: ``compute.recompute``, what its backward pass computes again."""
    if how == "no" or not torch.is_grad_enabled():
        return forward(*arguments)
    # Inside the module, so that sharding sees one forward pass and the names of parameters stay.
    options = _CHECKPOINT_OPTIONS[how]
    out: Tensor = checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)
    return out


class TransformerBlock(nn.Module):
    """Pre-norm block. ``activation_checkpointing``: ``no``, ``selective`` or ``block`` (``compute.recompute``)."""

    activation_checkpointing = "no"

    def __init__(self, width: int, heads: int, fused_attention: bool, activation: str, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads, fused_attention)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, activation)

    def forward(self, x: Tensor, layout: PackedLayout | None = None, pooled_only: bool = False) -> Tensor:
        """(b, T, D), or (N, D) with a layout, -> the same shape; with ``pooled_only`` (b, D), the pooled tokens: the
        first ones, or those of the layout."""
        return recomputed(self.activation_checkpointing, self._forward, x, layout, pooled_only)

    def _forward(self, x: Tensor, layout: PackedLayout | None, pooled_only: bool) -> Tensor:
        y = self.attn(self.norm1(x), layout, pooled_only)
        if pooled_only:
            if layout is None:
                x = x[:, 0]
            else:
                x = x.index_select(0, layout.pooled)
        x = x + y
        return x + self.mlp(self.norm2(x))


def build_blocks(tower: schema.ImageTower | schema.TextTower, model: schema.Model, attention: str) -> nn.ModuleList:
    """The blocks of a tower. ``attention``: a resolved ``compute.attention``."""
    shape = tower.width, tower.heads, is_fused(attention), model.activation, model.norm_eps
    return nn.ModuleList(TransformerBlock(*shape) for _ in range(tower.layers))
