"""The weights of a pair under other libraries' names: open_clip's and timm's, and back (docs/export.md).

``State`` is ours: a parameter's name in ``flip.models.clip.CLIPModel`` -> fp32 tensor. Letters: D a tower's width, E
the shared embedding, P patches, p a patch's side. The blocks are the same everywhere; what differs is named below.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]

#: Parts of a block: ours (timm's) -> open_clip's. Both fuse q, k and v in this order.
_BLOCK = {
    "norm1.": "ln_1.",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj.": "attn.out_proj.",
    "norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
_SCALE = 2.0**24
"""A power of two, so that the projection is exact under it; large, so that what it is added to drowns (``extra``)."""


def to_timm(state: State, positions: Tensor) -> dict[str, Tensor]:
    """The image encoder without its projection as timm's VisionTransformer (``no_embed_class``).

    ``positions`` (P, D): the fixed table, which timm holds as a parameter.
    """
    tower = {
        "patch_embed.proj.weight": as_convolution(state["image.patch.weight"]),
        "patch_embed.proj.bias": state["image.patch.bias"],
        "cls_token": state["image.class_token"][None, None],
        "pos_embed": positions[None],
    }
    return tower | {
        name: state[f"image.{name}"] for name in _below("image.", state) if name.startswith(("blocks.", "norm."))
    }


def from_timm(tower: State) -> dict[str, Tensor]:
    """The image encoder without its projection, as ``to_timm`` gave it."""
    state = {
        "image.patch.weight": as_matrix(tower["patch_embed.proj.weight"]),
        "image.patch.bias": tower["patch_embed.proj.bias"],
        "image.class_token": tower["cls_token"][0, 0],
    }
    return state | {f"image.{name}": tower[name] for name in tower if name.startswith(("blocks.", "norm."))}


def text_to_open_clip(state: State, max_logit_scale: float) -> dict[str, Tensor]:
    """The text encoder, and the logarithm of the logits' scale as our forward pass clamps it: open_clip never does.

    Where there is a bias of the logits, that as well. open_clip has no mask of padding: ``flip.export.fold_padding``
    comes first.
    """
    text = {
        "token_embedding.weight": state["text.tokens.weight"],
        "positional_embedding": state["text.positions"],
        "ln_final.weight": state["text.norm.weight"],
        "ln_final.bias": state["text.norm.bias"],
        "text_projection": state["text.projection.weight"].T,
        "logit_scale": state["logit_scale"].reshape(()).clamp(0.0, max_logit_scale),
    }
    if "logit_bias" in state:
        text["logit_bias"] = state["logit_bias"].reshape(())
    return text | _blocks_to_open_clip("text.", "", state)


def text_from_open_clip(tensors: State) -> dict[str, Tensor]:
    """The text encoder, ``logit_scale`` and ``logit_bias``, as ``text_to_open_clip`` gave them."""
    state = {
        "text.tokens.weight": tensors["token_embedding.weight"],
        "text.positions": tensors["positional_embedding"],
        "text.norm.weight": tensors["ln_final.weight"],
        "text.norm.bias": tensors["ln_final.bias"],
        "text.projection.weight": tensors["text_projection"].T,
        "logit_scale": tensors["logit_scale"].reshape(1),
    }
    if "logit_bias" in tensors:
        state["logit_bias"] = tensors["logit_bias"].reshape(1)
    stem = "transformer.resblocks."
    for name in (name for name in tensors if name.startswith(stem)):
        number, _, part = name.removeprefix(stem).partition(".")
        ours, theirs = next(pair for pair in _BLOCK.items() if part.startswith(pair[1]))
        state[f"text.blocks.{number}.{ours}{part.removeprefix(theirs)}"] = tensors[name]
    return state


def image_to_native(state: State, positions: Tensor) -> dict[str, Tensor]:
    """The image encoder as open_clip's own ViT, pooled over patches.

    Its patch convolution has no bias: ours is added to the table of positions, which is the same sum. The class token's
    row of the table stays zero.
    """
    table = torch.cat([torch.zeros_like(positions[:1]), positions + state["image.patch.bias"]])
    visual = {
        "visual.conv1.weight": as_convolution(state["image.patch.weight"]),
        "visual.class_embedding": state["image.class_token"],
        "visual.positional_embedding": table,
        "visual.ln_post.weight": state["image.norm.weight"],
        "visual.ln_post.bias": state["image.norm.bias"],
        "visual.proj": state["image.projection.weight"].T,
    }
    return visual | _blocks_to_open_clip("image.", "visual.", state)


def image_to_extra(state: State, positions: Tensor, layers: int) -> dict[str, Tensor]:
    """The image encoder as open_clip's own ViT with one block more and pooled at the class token, E < D.

    The block computes what open_clip has no key for, the mean over class token and patches of the normalised output,
    projected: attention with zero queries is uniform, its values are the normalised tokens, its output matrix is
    ``_SCALE`` times our projection. The class token's old value (of order 1) drowns in that. One channel more holds the
    negative sum, so that the last LayerNorm finds a mean of zero and only rescales, which L2 normalisation undoes.
    """
    projection = state["image.projection.weight"]
    embed, width = projection.shape
    zeros, eye = torch.zeros(width, width), torch.eye(width)
    out = torch.zeros(width, width)
    out[:embed], out[embed] = _SCALE * projection, -_SCALE * projection.double().sum(dim=0).float()
    stem = f"visual.transformer.resblocks.{layers}."
    block = {
        "ln_1.weight": state["image.norm.weight"], "ln_1.bias": state["image.norm.bias"],
        "attn.in_proj_weight": torch.cat([zeros, zeros, eye]), "attn.in_proj_bias": torch.zeros(3 * width),
        "attn.out_proj.weight": out, "attn.out_proj.bias": torch.zeros(width),
        "ln_2.weight": torch.ones(width), "ln_2.bias": torch.zeros(width),
        "mlp.c_fc.weight": torch.zeros(4 * width, width), "mlp.c_fc.bias": torch.zeros(4 * width),
        "mlp.c_proj.weight": torch.zeros(width, 4 * width), "mlp.c_proj.bias": torch.zeros(width),
    }  # fmt: skip
    last = {
        "visual.ln_post.weight": torch.ones(width),
        "visual.ln_post.bias": torch.zeros(width),
        "visual.proj": torch.eye(width, embed),
    }
    return image_to_native(state, positions) | {stem + name: value for name, value in block.items()} | last


def image_to_timm_tower(state: State, positions: Tensor) -> dict[str, Tensor]:
    """The image encoder as open_clip holds one of timm's, with a linear projection."""
    tower = {f"visual.trunk.{name}": value for name, value in to_timm(state, positions).items()}
    return tower | {"visual.head.proj.weight": state["image.projection.weight"]}


def projection_from_open_clip(tensors: State, layers: int, embed: int) -> dict[str, Tensor]:
    """Our image projection (E, D) out of any of the three forms. ``layers``: our image encoder's."""
    extra = f"visual.transformer.resblocks.{layers}.attn.out_proj.weight"
    if "visual.head.proj.weight" in tensors:
        projection = tensors["visual.head.proj.weight"]
    elif extra in tensors:
        projection = tensors[extra][:embed] / _SCALE
    else:
        projection = tensors["visual.proj"].T
    return {"image.projection.weight": projection}


def as_convolution(matrix: Tensor) -> Tensor:
    """(D, p*p*3), by row, column, channel -> (D, 3, p, p)."""
    side = round((matrix.shape[1] / 3) ** 0.5)
    return matrix.reshape(len(matrix), side, side, 3).permute(0, 3, 1, 2)


def as_matrix(convolution: Tensor) -> Tensor:
    """(D, 3, p, p) -> (D, p*p*3)."""
    return convolution.permute(0, 2, 3, 1).flatten(1)


def _below(prefix: str, state: State) -> list[str]:
    return [name.removeprefix(prefix) for name in state if name.startswith(prefix)]


def _blocks_to_open_clip(ours: str, theirs: str, state: State) -> dict[str, Tensor]:
    blocks = {}
    for name in _below(f"{ours}blocks.", state):
        number, _, part = name.partition(".")
        old, new = next(pair for pair in _BLOCK.items() if part.startswith(pair[0]))
        path = f"{theirs}transformer.resblocks.{number}.{new}{part.removeprefix(old)}"
        blocks[path] = state[f"{ours}blocks.{name}"]
    return blocks
