"""Which kernel of ``scaled_dot_product_attention`` computes the attention on a GPU.

torch has several fused kernels and chooses one by shape, dtype and GPU. ``compute.attention`` may name the first to
try. The choice holds for the process, because compiled blocks and their backward passes must agree on it.
``choose_kernels`` tries every shape of a stage once, before its first step: a library may accept a shape and then find
no plan for it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flip.config import schema
from flip.model_costs import image_tokens

log = logging.getLogger(__name__)

EXPLICIT = "explicit"
"""The value of ``compute.attention`` that uses no fused kernel."""
AUTOMATIC = "sdpa"
"""The value that leaves the choice to torch."""
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Name of a kernel in configurations and logs -> in torch, in the order in which they replace each other. ``math`` is
no fused kernel and computes every shape."""
_preference = contextlib.ExitStack()


class Shape(NamedTuple):
    """The attention of one kind of block."""

    tower: str
    heads: int
    queries: int
    tokens: int
    head_width: int
    mask: str = ""
    """``causal``, ``padding`` (a bias), or empty: every query attends to all tokens."""

    def __str__(self) -> str:
        parts = [f"{self.tower}, {self.tokens} tokens"]
        if self.queries != self.tokens:
            parts.append("one query")
        if self.mask:
            parts.append(f"{self.mask} mask")
        return ", ".join(parts)


def is_fused(attention: str) -> bool:
    """Whether this value of ``compute.attention`` uses ``scaled_dot_product_attention``."""
    return attention != EXPLICIT


def prefer(attention: str, without: Sequence[str] = ()) -> None:
    """Let this process try a kernel first, of all but those in ``without``. ``sdpa``: in the order of torch."""
    if torch.cuda.is_initialized():
        _settle_order()
    _preference.close()
    if attention == AUTOMATIC and not without:
        return
    order = [name for name in KERNELS if name not in without]
    if attention in order:
        order.remove(attention)
        order.insert(0, attention)
    _preference.enter_context(sdpa_kernel([KERNELS[name] for name in order], set_priority=True))


@functools.cache
def _settle_order() -> None:
    """Choose a kernel once: at the first choice of a process on compute capability 9.0 torch puts cuDNN first, and
    forgets an order that was set before (2.13, seen on the stub of CUDA)."""
    query = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16, device="cuda")
    torch._fused_sdp_choice(query, query, query)


def stage_shapes(model: schema.Model, visible: int) -> list[Shape]:
    """The shapes of a stage that keeps so many patches of an image, without the packed blocks of ``varlen_kernel``."""
    image = model.image
    text = model.text
    tokens = image_tokens(image, visible)
    masks = [""]
    if text.causal:
        masks = ["causal", "padding"]
    elif text.padding == "mask":
        masks = ["padding", "padding"]
    shapes = [
        Shape("image", image.heads, tokens, tokens, image.width // image.heads),
        Shape("text", text.heads, text.length, text.length, text.width // text.heads, masks[0]),
        Shape("text", text.heads, 1, text.length, text.width // text.heads, masks[-1]),
    ]
    if image.pool == "class" and image.tower == schema.ImageTower.tower:
        shapes.insert(1, shapes[0]._replace(queries=1))
    return shapes


def choose_kernels(
    attention: str, shapes: Sequence[Shape], pairs: int, dtype: torch.dtype, device: torch.device
) -> dict[Shape, str]:
    """Try the shapes of a stage for so many pairs, and return the kernel of each.

    A kernel that fails is left out from now on, with a warning, and the next one is tried. On a CPU nothing is chosen.
    """
    if device.type != "cuda" or not is_fused(attention):
        return {}
    without = list[str]()
    prefer(attention)
    while True:
        chosen = {shape: _kernel(shape, pairs, dtype, device) for shape in shapes}
        fused = [shape for shape in shapes if chosen[shape] != "math"]
        failures = ((shape, _failure(shape, pairs, dtype, device)) for shape in fused)
        shape, failure = next(((shape, text) for shape, text in failures if text), (None, ""))
        if shape is None:
            break
        without.append(chosen[shape])
        log.warning("attention of %s: the kernel %s fails, the next one is used: %s", shape, without[-1], failure)
        prefer(attention, without)
    if attention not in (AUTOMATIC, *without, *chosen.values()):
        log.warning("compute.attention: %s computes no shape of this stage in %s", attention, dtype)
    return chosen


def format_kernels(chosen: dict[Shape, str]) -> str:
    """The kernels of a stage as one line of the log."""
    return "; ".join(f"{shape}: {kernel}" for shape, kernel in chosen.items())


def _tensors(shape: Shape, pairs: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Query, key and value in the layout of the block: views of one product."""
    for length in (shape.queries, shape.tokens, shape.tokens):
        values = torch.zeros(pairs, length, shape.heads, shape.head_width, dtype=dtype, device=device)
        yield values.transpose(1, 2).requires_grad_()


def _bias(shape: Shape, pairs: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if shape.mask != "padding":
        return None
    return torch.zeros(pairs, 1, 1, shape.tokens, dtype=dtype, device=device)


def _kernel(shape: Shape, pairs: int, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel that torch chooses for a shape."""
    query, key, value = _tensors(shape, pairs, dtype, device)
    bias = _bias(shape, pairs, dtype, device)
    number = torch._fused_sdp_choice(query, key, value, attn_mask=bias, is_causal=shape.mask == "causal")
    return next(name for name, member in KERNELS.items() if member.value == number)


def _failure(shape: Shape, pairs: int, dtype: torch.dtype, device: torch.device) -> str:
    """The first line of the error of a forward and backward pass; empty if they succeed."""
    query, key, value = _tensors(shape, pairs, dtype, device)
    bias = _bias(shape, pairs, dtype, device)
    try:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=shape.mask == "causal")
        out.sum().backward()
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""
