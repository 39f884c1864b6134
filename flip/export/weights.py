"""Converts weights between this toolkit, open_clip and timm (docs/export.md).

``StateDict`` has the parameter names of ``flip.models.clip`` and fp32 tensors. Letters: D a tower's width, E the shared
embedding, P patches, p the side of a patch.

- open_clip's patch convolution has no bias: this toolkit's is added to the position embeddings.
- open_clip has no pooling whose mean includes the class token. In the variant `extra-block`, the additional block is
  attention without queries, which is a mean over the tokens after the last LayerNorm. Its output matrix is the
  projection times 2^24, so that the previous value of the class token becomes negligible.
- `logit_scale` is clamped. SigLIP's bias is `logit_bias`. Other keys differ in name only.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flip.loss_kinds import all_parameters
from flip.runs.errors import ConfigError

StateDict = Mapping[str, Tensor]

_RESBLOCKS = "transformer.resblocks."
_BLOCK = {
    "norm1.": "ln_1.",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj.": "attn.out_proj.",
    "norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
"""Parts of a block here and in timm -> in open_clip. All fuse q, k and v in this order."""
_SAME_BLOCK = [(part, part) for part in (*_BLOCK, "attn.q_norm.", "attn.k_norm.")]
_ATTENTION_POOL = "attn_pool."
"""Start of the names of timm's pooling by attention, here below ``image.``."""
_LEAVES = ("weight", "bias")
_NORMS = [f"{norm}.{leaf}" for norm in ("norm", "norm_pre") for leaf in _LEAVES]
"""LayerNorms of the image encoder outside blocks, here and in timm."""
_TEXT = {
    "text.tokens.weight": "token_embedding.weight",
    "text.positions": "positional_embedding",
    "text.norm.weight": "ln_final.weight",
    "text.norm.bias": "ln_final.bias",
}
"""Parameters of the text encoder outside blocks -> in open_clip."""
_TRANSFORMERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # as transformers spells it
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.proj": "visual_projection.weight",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "token_embedding.": "text_model.embeddings.token_embedding.",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "text_projection": "text_projection.weight",
    ".ln_1.": ".layer_norm1.",
    ".attn.in_proj_": ".self_attn.{qkv}_proj.",
    ".attn.out_proj.": ".self_attn.out_proj.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
"""Parts of names in open_clip -> in transformers, replaced in this order."""
_SCALE = 2.0**24
"""A power of two, so that the scaled projection is exact; large compared with the values that it is added to."""


class TrackedState(Mapping[str, Tensor]):
    """A state dict that records which of its tensors a conversion reads.

    A conversion reads tensors by name and skips names that it does not know, so an unread tensor would be dropped.
    """

    def __init__(self, tensors: StateDict) -> None:
        self._tensors = tensors
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        value = self._tensors[name]
        self._read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def mark_read(self, names: Iterable[str]) -> None:
        """Count these as read: another conversion has them."""
        self._read.update(names)

    def refuse_unread(self, what: str, where: str | Path, remedy: str, left_out: tuple[str, ...] = ()) -> None:
        """Raise ConfigError with the names of the tensors that were not read.

        ``left_out``: starts of the names of tensors that the conversion leaves out on purpose.
        """
        unread = sorted(self._tensors.keys() - self._read)
        unread = [name for name in unread if not name.startswith(left_out)]
        if unread:
            raise ConfigError(f"{what}, and would drop them", where, shortened(unread), remedy)


def shortened(names: list[str], most: int = 3) -> str:
    """The first names of a list, and how many more it has."""
    text = ", ".join(names[:most])
    if len(names) > most:
        text += f" and {len(names) - most} more"
    return text


def to_timm(state: StateDict, positions: Tensor) -> dict[str, Tensor]:
    """The image encoder without projection as timm's VisionTransformer (``no_embed_class``).

    ``positions``: of the image encoder; a parameter in timm, also the fixed table.
    """
    if "image.positions" in state:
        positions = state["image.positions"]
    tower = {"patch_embed.proj.weight": as_convolution(state["image.patch.weight"])}
    if "image.class_token" in state:
        first = state["image.class_token"]
        if "image.positions" in state and "image.registers" in state:  # which have no position here
            first = first + positions[0]
            positions = positions[1:]
        tower["cls_token"] = first[None, None]
    tower["pos_embed"] = positions[None]
    if "image.registers" in state:
        tower["reg_token"] = state["image.registers"][None]
    pool = [name.removeprefix("image.") for name in state if name.startswith(f"image.{_ATTENTION_POOL}")]
    tower |= {name: state[f"image.{name}"] for name in pool}
    if "image.patch.bias" in state:
        tower["patch_embed.proj.bias"] = state["image.patch.bias"]
    tower |= {name: state[f"image.{name}"] for name in _NORMS if f"image.{name}" in state}
    return tower | _rename_blocks(state, "image.blocks.", "blocks.", _SAME_BLOCK)


def from_timm(tower: StateDict, learned_positions: bool) -> dict[str, Tensor]:
    """The inverse of ``to_timm``. ``learned_positions``: whether positions are parameters here."""
    state = {"image.patch.weight": as_matrix(tower["patch_embed.proj.weight"])}
    if "cls_token" in tower:
        state["image.class_token"] = tower["cls_token"][0, 0]
    if "reg_token" in tower:
        state["image.registers"] = tower["reg_token"][0]
    state |= {f"image.{name}": tower[name] for name in tower if name.startswith(_ATTENTION_POOL)}
    if "patch_embed.proj.bias" in tower:
        state["image.patch.bias"] = tower["patch_embed.proj.bias"]
    if learned_positions:
        positions = tower["pos_embed"][0]
        if "reg_token" in tower and "cls_token" in tower:  # which has its position
            positions = torch.cat([torch.zeros_like(positions[:1]), positions])
        state["image.positions"] = positions
    state |= {f"image.{name}": tower[name] for name in _NORMS if name in tower}
    return state | _rename_blocks(tower, "blocks.", "image.blocks.", _SAME_BLOCK)


def text_to_open_clip(state: StateDict, max_logit_scale: float) -> dict[str, Tensor]:
    """The text encoder, the logarithm of the logit scale, clamped as in our forward pass, and the learned parameters
    of the loss.

    open_clip has no padding mask: apply ``flip.export.fold_padding`` first.
    """
    text = {target: state[name] for name, target in _TEXT.items()}
    text["text_projection"] = state["text.projection.weight"].T
    text["logit_scale"] = state["logit_scale"].reshape(()).clamp(0.0, max_logit_scale)
    text |= {name: state[name].reshape(()) for name in all_parameters() if name in state}
    return text | _rename_blocks(state, "text.blocks.", _RESBLOCKS, _BLOCK.items())


def text_from_open_clip(tensors: StateDict) -> dict[str, Tensor]:
    """The inverse of ``text_to_open_clip``."""
    state = {name: tensors[source] for name, source in _TEXT.items()}
    state["text.projection.weight"] = tensors["text_projection"].T
    state |= {name: tensors[name].reshape(1) for name in ("logit_scale", *all_parameters()) if name in tensors}
    return state | _rename_blocks(tensors, _RESBLOCKS, "text.blocks.", ((new, old) for old, new in _BLOCK.items()))


def image_to_native(state: StateDict, positions: Tensor) -> dict[str, Tensor]:
    """The image encoder as open_clip's own ViT, pooled over patches or at the class token.

    Its patch convolution has no bias, so a bias is added to the positions of patches. In the fixed table the position
    of the class token is zero.
    """
    if "image.positions" in state:
        positions = state["image.positions"]
    else:
        positions = torch.cat([torch.zeros_like(positions[:1]), positions])
    if "image.patch.bias" in state:
        positions = torch.cat([positions[:1], positions[1:] + state["image.patch.bias"]])
    visual = {
        "visual.conv1.weight": as_convolution(state["image.patch.weight"]),
        "visual.class_embedding": state["image.class_token"],
        "visual.positional_embedding": positions,
        "visual.ln_post.weight": state["image.norm.weight"],
        "visual.ln_post.bias": state["image.norm.bias"],
        "visual.proj": state["image.projection.weight"].T,
    }
    if "image.norm_pre.weight" in state:
        visual["visual.ln_pre.weight"] = state["image.norm_pre.weight"]
        visual["visual.ln_pre.bias"] = state["image.norm_pre.bias"]
    return visual | _rename_blocks(state, "image.blocks.", f"visual.{_RESBLOCKS}", _BLOCK.items())


def image_from_native(tensors: StateDict, norm_pre: bool) -> dict[str, Tensor]:
    """The image encoder without projection, of open_clip's own ViT with learned positions. The inverse of
    ``image_to_native``.

    ``norm_pre``: whether a LayerNorm precedes the blocks. Without one the patch embedding here has a bias: zero.
    """
    patch = as_matrix(tensors["visual.conv1.weight"])
    state = {
        "image.patch.weight": patch,
        "image.class_token": tensors["visual.class_embedding"],
        "image.positions": tensors["visual.positional_embedding"],
        "image.norm.weight": tensors["visual.ln_post.weight"],
        "image.norm.bias": tensors["visual.ln_post.bias"],
        "image.projection.weight": tensors["visual.proj"].T,
    }
    if norm_pre:
        state["image.norm_pre.weight"] = tensors["visual.ln_pre.weight"]
        state["image.norm_pre.bias"] = tensors["visual.ln_pre.bias"]
    else:
        state["image.patch.bias"] = torch.zeros(len(patch))
    blocks = ((new, old) for old, new in _BLOCK.items())
    return state | _rename_blocks(tensors, f"visual.{_RESBLOCKS}", "image.blocks.", blocks)


def image_to_extra_block(state: StateDict, positions: Tensor, layers: int) -> dict[str, Tensor]:
    """The image encoder as open_clip's own ViT with one more block, pooled at the class token; needs E < D.

    The block computes what open_clip cannot: the mean over class token and patches of the normalised output, projected.
    Its attention has zero queries, hence uniform weights; values are the normalised tokens; the output matrix is our
    projection times ``_SCALE``, which makes the old value of the class token (of order 1) negligible. One more channel
    has the negative sum, so that the last LayerNorm finds a mean of zero and only rescales, which L2 normalisation
    cancels.
    """
    projection = state["image.projection.weight"]
    embed, width = projection.shape
    zeros = torch.zeros(width, width)
    eye = torch.eye(width)
    out = torch.zeros(width, width)
    out[:embed], out[embed] = _SCALE * projection, -_SCALE * projection.double().sum(dim=0).float()
    stem = f"visual.{_RESBLOCKS}{layers}."
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


def image_to_timm_tower(state: StateDict, positions: Tensor) -> dict[str, Tensor]:
    """The image encoder as a timm model in open_clip, with a linear projection."""
    tower = {f"visual.trunk.{name}": value for name, value in to_timm(state, positions).items()}
    return tower | {"visual.head.proj.weight": state["image.projection.weight"]}


def projection_from_open_clip(tensors: StateDict, layers: int, embed: int) -> dict[str, Tensor]:
    """The image projection (E, D) of an export of any variant. ``layers``: of our image encoder."""
    extra = f"visual.{_RESBLOCKS}{layers}.attn.out_proj.weight"
    if "visual.head.proj.weight" in tensors:
        projection = tensors["visual.head.proj.weight"]
    elif extra in tensors:
        projection = tensors[extra][:embed] / _SCALE
    else:
        projection = tensors["visual.proj"].T
    return {"image.projection.weight": projection}


def to_transformers(native: StateDict) -> dict[str, Tensor]:
    """Weights of open_clip's CLIP (``image_to_native``, ``text_to_open_clip``) as CLIPModel of transformers."""
    renamed: dict[str, Tensor] = {}
    for name, value in native.items():
        for part, new in _TRANSFORMERS.items():
            name = name.replace(part, new)
        if name.endswith("projection.weight"):
            value = value.T  # (E, D)
        rows = value.chunk(3) if "{qkv}" in name else (value,)
        renamed |= {name.replace("{qkv}", letter): row for letter, row in zip("qkv", rows, strict=False)}
    return renamed


def as_convolution(matrix: Tensor) -> Tensor:
    """(D, p*p*3), by row, column, channel -> (D, 3, p, p)."""
    side = round((matrix.shape[1] / 3) ** 0.5)
    return matrix.reshape(len(matrix), side, side, 3).permute(0, 3, 1, 2)


def as_matrix(convolution: Tensor) -> Tensor:
    """(D, 3, p, p) -> (D, p*p*3)."""
    return convolution.permute(0, 2, 3, 1).flatten(1)


def _rename_blocks(state: StateDict, stem: str, target: str, parts: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The parameters ``stem``N.PART as ``target``N.PART; ``parts``: starts of parts, and what replaces them.

    Other parameters of a block are not read.
    """
    blocks = {}
    renamed = {old + leaf: new + leaf for old, new in parts for leaf in _LEAVES}
    for name in state:
        number, _, part = name.removeprefix(stem).partition(".")
        if name.startswith(stem) and part in renamed:
            blocks[f"{target}{number}.{renamed[part]}"] = state[name]
    return blocks
