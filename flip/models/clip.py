"""The text encoder, and the CLIP model of an image tower and it (docs/recipe.md).

Dimensions: b images or captions, K of P patches visible, T tokens, D the width of a tower, E the shared embedding.
Activations, the residual stream included, have autocast's dtype if autocast is on. Pooling, projection and
normalisation are always fp32: they cost little and decide the precision of the loss.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flip import loss_kinds
from flip.config import schema
from flip.distributed.parallel import shard_like
from flip.models.attention import is_fused
from flip.models.image_encoder import project
from flip.models.image_towers import build_image_tower
from flip.models.token_head import TokenHead, TokenTargets
from flip.models.transformer import PackedLayout, build_blocks, pack, varlen_kernel
from flip.rng import key

STD = 0.02


class TextEncoder(nn.Module):
    """Bidirectional transformer, pooled at position 0, which is never padding; or a causal one, pooled at the end
    token.
    """

    packed: bool
    """Whether padding is left out of the computation. With False, a tower that ignores padding computes the same from
    shapes that do not depend on the data (ONNX)."""

    def __init__(self, model: schema.Model, attention: str) -> None:
        super().__init__()
        tower = model.text
        self.causal = tower.causal
        self.ignores_padding = tower.causal or tower.padding == "mask"
        self.packed = self.ignores_padding
        self.fused_attention = is_fused(attention)
        self.head_width = tower.width // tower.heads
        self.bucket_lengths = False
        """Pad packed batches to one of 32 lengths, as compiled blocks are compiled once per length."""
        self.tokens = nn.Embedding(tower.vocabulary, tower.width)
        self.positions = nn.Parameter(torch.zeros(tower.length, tower.width))
        self.blocks = build_blocks(tower, model, attention)
        self.norm = nn.LayerNorm(tower.width, eps=model.norm_eps)
        self.projection = nn.Linear(tower.width, model.embed, bias=False)

    def token_indices(self, tokens: Tensor) -> Tensor | None:
        """``PackedLayout.token_indices`` of a batch (b, T); None if padding is attended to.

        ``forward`` computes them if they are not passed, but on a GPU this waits for the device: compute them on the
        host.
        """
        if not self.ignores_padding:
            return None
        if not self.packed:
            return torch.arange(tokens.numel(), device=tokens.device)
        indices = self._token_mask(tokens).flatten().nonzero().squeeze(1)
        if self.bucket_lengths:
            filling = -len(indices) % self._bucket(tokens.numel())
            indices = F.pad(indices, (0, filling), value=tokens.numel())
        return indices

    def forward(
        self, tokens: Tensor, position_ids: Tensor | None = None, token_indices: Tensor | None = None
    ) -> Tensor:
        """(b, T) token ids -> (b, E) fp32, not normalised.

        ``position_ids``: (b, T) positions of a shortened caption's tokens, the first one 0; default 0 .. T-1.
        """
        layout = None
        if token_indices is None:
            token_indices = self.token_indices(tokens)
        if token_indices is None:
            x = self.tokens(tokens) + self._positions(position_ids)  # (b, T, D)
        else:
            mask = self._token_mask(tokens)
            if position_ids is None:
                position_ids = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            ids, positions = (pack(field.reshape(-1, 1), token_indices).squeeze(1) for field in (tokens, position_ids))
            x = self.tokens(ids) + self._positions(positions)  # (N, D)
            lengths = mask.sum(dim=1)
            bias = torch.zeros(mask.shape, dtype=_compute_dtype(x), device=x.device).masked_fill_(~mask, -torch.inf)
            first = lengths.cumsum(0) - lengths
            if not self.packed:
                first = tokens.shape[1] * torch.arange(tokens.shape[0], device=tokens.device)
            pooled = first + lengths - 1 if self.causal else first
            layout = PackedLayout(token_indices, pooled, bias[:, None, None], self.causal)
            kernel = varlen_kernel(x.device, bias.dtype, self.fused_attention, self.head_width)
            if self.packed and kernel is not None:
                layout = layout._replace(offsets=self._offsets(lengths, tokens.shape[1], len(x)), kernel=kernel)
        x = x.to(_compute_dtype(x))
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, layout, pooled_only=number == len(self.blocks))
        return project(self.norm(x), self.projection)

    def _offsets(self, lengths: Tensor, length: int, rows: int) -> Tensor:
        """``PackedLayout.offsets`` of captions of (b,) tokens, at most ``length`` each, in so many packed rows."""
        ends = lengths.cumsum(0)
        if self.bucket_lengths:
            filling = -(-self._bucket(len(lengths) * length) // length)
            more = ends[-1] + length * torch.arange(1, filling + 1, device=ends.device)
            ends = torch.cat([ends, more.clamp_(max=rows)])
        return F.pad(ends, (1, 0)).int()

    @staticmethod
    def _bucket(positions: int) -> int:
        """Rows in whose multiples packed batches are padded."""
        return max(1, positions // 32)

    def _positions(self, position_ids: Tensor | None) -> Tensor:
        if position_ids is None:
            return self.positions
        return F.embedding(position_ids.long(), self.positions)

    def _token_mask(self, tokens: Tensor) -> Tensor:
        """(b, T) bool: True at tokens, and at position 0 even of an empty caption. The end token has the highest id."""
        if self.causal:
            end = tokens.argmax(dim=1, keepdim=True)
            return torch.arange(tokens.shape[1], device=tokens.device) <= end
        mask = tokens != 0
        mask[:, 0] = True
        return mask


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class CLIPModel(nn.Module):
    """Both encoders, the logit scale, and the learned parameters of the loss. ``init_weights`` draws their values.

    ``attention``: a resolved ``compute.attention``. ``head``: with the text classification head, which only stages that
    train it have. ``recompute``: what blocks recompute in the backward pass, to the same bits: nothing (``no``), all
    but matrix products and attention (``selective``), or everything (``block``).
    """

    logit_scale: nn.Parameter

    head: TokenHead | None

    def __init__(
        self, model: schema.Model, augment: schema.Augment, attention: str, recompute: str = "no", head: bool = False
    ) -> None:
        super().__init__()
        self.locked = frozenset[str]()
        self.image = build_image_tower(model, augment, attention, recompute)
        self.text = TextEncoder(model, attention)
        self.head = TokenHead(model.image.width, model.text.vocabulary) if head else None
        self.initialisation = model.initialisation
        self.set_recompute(recompute)
        self.objective = model.objective
        self.max_logit_scale = math.log(model.max_logit_scale)
        self.first_values = {"logit_scale": math.log(1 / model.temperature), **loss_kinds.first_values(model)}
        """First value of each parameter that belongs to no tower."""
        for name, value in self.first_values.items():  # shape (1,): fully_shard refuses scalars
            self.register_parameter(name, nn.Parameter(torch.full((1,), value)))

    def lock(self, towers: Collection[str]) -> None:
        """Keep the weights of towers (``image``, ``text``), which stay in evaluation mode. Call it before sharding.

        Projections are trained: they map the fixed features of a tower to the shared space of both.
        """
        self.locked = frozenset(towers)
        for name in self.locked:
            tower = self.get_submodule(name)
            tower.requires_grad_(False)
            tower.get_submodule("projection").requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> CLIPModel:
        """``nn.Module.train``, without effect on locked towers."""
        super().train(mode)
        for name in self.locked:
            self.get_submodule(name).eval()
        return self

    def set_recompute(self, recompute: str) -> None:
        """Change what blocks recompute, from the next forward pass on."""
        for block in (*self.image.blocks, *self.text.blocks):
            block.activation_checkpointing = recompute  # type: ignore[assignment]

    def forward(
        self, patches: Tensor, keep_indices: Tensor | None, tokens: Tensor, position_ids: Tensor | None = None,
        token_indices: Tensor | None = None, on_text: Callable[[Tensor], None] | None = None,
        targets: TokenTargets | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The arguments of ``contrastive_loss``: image (b, E), text (b, E), both fp32 of norm 1, the logit scale (1,),
        and the learned parameters of the loss, (1,) each. With ``targets``, the loss () of the head is the last one.

        Text is encoded first; ``on_text`` is called with it before the images are encoded (``TextGather.start``). The
        scale is exp of the parameter clamped to [0, ln max]; outside, its gradient is zero. The towers are called
        directly, as encode_image and encode_text are entry points of their own under sharding.
        """
        text = _normalise(self.text(tokens, position_ids, token_indices))
        if on_text is not None:
            on_text(text)
        features, pooled = self.image(patches, keep_indices, with_pooled=True)
        # Computed values: under sharding, a parameter that is returned itself would not be gathered.
        learned = [parameter.float() + 0.0 for parameter in self.loss_parameters().values()]
        scale = self.logit_scale.float().clamp(0.0, self.max_logit_scale).exp()
        outputs = _normalise(features), text, scale, *learned
        if self.head is not None and targets is not None:
            return *outputs, self.head(pooled, targets)
        return outputs

    def loss_parameters(self) -> dict[str, nn.Parameter]:
        """The learned parameters of the loss beside the logit scale, in its order."""
        return {name: self.get_parameter(name) for name in self.first_values if name != "logit_scale"}

    def encode_image(self, patches: Tensor, keep_indices: Tensor | None = None) -> Tensor:
        """(b, K, p*p*3) uint8 -> (b, E) fp32 of norm 1; without ``keep_indices`` all P patches in order."""
        return _normalise(self.image(patches, keep_indices))

    def encode_text(self, tokens: Tensor, token_indices: Tensor | None = None) -> Tensor:
        """(b, T) token ids -> (b, E) fp32 of norm 1. ``token_indices``: of ``TextEncoder.token_indices``."""
        return _normalise(self.text(tokens, token_indices=token_indices))


def _normalise(features: Tensor) -> Tensor:
    return features / (features.norm(dim=-1, keepdim=True) + 1e-8)


def _draw(value: Tensor, name: str, model: CLIPModel, generator: torch.Generator) -> None:
    if name in model.first_values:
        value.fill_(model.first_values[name])
    elif name.startswith("image.") and model.image.draw(name.removeprefix("image."), value, generator):
        pass
    elif name.endswith(".bias"):
        value.zero_()
    elif name.endswith((".class_token", ".registers", ".latent", ".positions", ".tokens.weight")):
        value.normal_(0.0, STD, generator=generator)
    elif value.ndim == 1:  # the gain of a LayerNorm
        value.fill_(1.0)
    else:
        nn.init.xavier_uniform_(value, generator=generator)


def _draw_clip(value: Tensor, name: str, model: CLIPModel, generator: torch.Generator) -> bool:
    """Draw a parameter as CLIP's published code does. False: it draws this one as ``_draw`` does.

    The blocks of the text tower have GPT-2's deviations. Those of the image tower, its patch embedding and the biases
    of all MLPs have the defaults of PyTorch's modules: U(-a, a) with a = fan_in^-0.5, and Xavier for q, k and v.
    """
    tower: Any = model.text
    if name.startswith("image."):
        tower = model.image
    width = tower.projection.in_features
    stem = re.sub(r"\.\d+\.", ".", name)
    if stem == "image.patch.weight":
        fan_in = value.shape[1]
    else:
        fan_in = 4 * width if ".fc2." in stem else width
    residual = (2 * len(tower.blocks) * width) ** -0.5
    deviations = {
        "image.class_token": width**-0.5, "image.positions": width**-0.5, "image.projection.weight": width**-0.5,
        "text.tokens.weight": 0.02, "text.positions": 0.01, "text.projection.weight": width**-0.5,
        "text.blocks.attn.qkv.weight": width**-0.5, "text.blocks.attn.proj.weight": residual,
        "text.blocks.mlp.fc1.weight": (2 * width) ** -0.5, "text.blocks.mlp.fc2.weight": residual,
    }  # fmt: skip
    if stem in deviations:
        value.normal_(0.0, deviations[stem], generator=generator)
    elif ".mlp." in stem or stem in ("image.patch.weight", "image.blocks.attn.proj.weight"):
        value.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
    else:
        return False
    return True


@torch.no_grad()
def init_weights(model: CLIPModel, seed: int, part: str = "") -> None:
    """Draw all weights, each parameter from a generator of its own: key(seed, hash of its name). ``part``: only those
    whose names start with it.

    Weights therefore do not depend on the order of construction, the device, the world size, or other random draws.
    Each rank of a sharded model draws one full parameter at a time and keeps its shard. docs/contracts.md, Randomness,
    has the formula.
    """
    for name, parameter in model.named_parameters():
        if not name.startswith(part):
            continue
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        generator = torch.Generator().manual_seed(int(key(seed, digest)))
        value = torch.full(parameter.shape, math.nan)
        if not (model.initialisation == "clip" and _draw_clip(value, name, model, generator)):
            _draw(value, name, model, generator)
        parameter.copy_(shard_like(value, parameter))
