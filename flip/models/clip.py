"""The image encoder, the text encoder, and the pair of them (docs/recipe.md).

Dimensions: b images or captions, K of P patches visible, T tokens, D the width of a tower, E the shared embedding.
Activations have autocast's dtype where autocast is on, the residual stream too; pooling, projection and
normalisation are fp32 always: they cost nothing and decide the precision of the loss.
"""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flip.config import schema
from flip.distributed.parallel import shard_like
from flip.models.transformer import EPS, PackedLayout, build_blocks, pack
from flip.rng import key

STD = 0.02


def build(model: schema.Model, augment: schema.Augment, attention: str, recompute: str = "no") -> Pair:
    """The pair with weights yet to be drawn by ``initialise``. ``attention``: ``explicit`` or ``sdpa``.

    Under ``torch.device("meta")`` the weights have no memory yet, and only the fixed tables (buffers) are there.

    ``recompute``: what a block computes again in the backward pass, to the same bits: nothing (``no``), all but its
    matrix products and attention (``selective``), or everything from its input on (``block``).
    """
    pair = Pair(model, augment, attention)
    for block in (*pair.image.blocks, *pair.text.blocks):
        block.activation_checkpointing = recompute  # type: ignore[assignment]
    return pair


def sincos(grid: int, width: int) -> Tensor:
    """The fixed position table (grid^2, D) fp32, patches row by row (docs/recipe.md, Image encoder).

    The first half of the channels codes the column, the second the row; each is D/4 sines, then D/4 cosines, of the
    coordinate over 10000^(i / (D/4)).
    """
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * 10000.0 ** -(torch.arange(width // 4) / (width / 4))
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)
    return torch.cat([column, row], dim=1).float()


def _project(pooled: Tensor, projection: nn.Linear) -> Tensor:
    """(b, D) -> (b, E), in fp32 whatever autocast says."""
    with torch.autocast(pooled.device.type, enabled=False):
        return projection(pooled.float())


class ImageEncoder(nn.Module):
    """Visible patches with their positions, the class token before them; pooled over patches or all."""

    positions: Tensor
    pixel_scale: Tensor
    pixel_offset: Tensor

    def __init__(self, tower: schema.ImageTower, embed: int, augment: schema.Augment, attention: str) -> None:
        super().__init__()
        self.pool = tower.pool
        self.patch = nn.Linear(3 * tower.patch**2, tower.width)
        self.class_token = nn.Parameter(torch.zeros(tower.width))
        self.blocks = build_blocks(tower, attention)
        self.norm = nn.LayerNorm(tower.width, eps=EPS)
        self.projection = nn.Linear(tower.width, embed, bias=False)
        with torch.device("cpu"):  # known numbers, in a model without memory too
            self.register_buffer("positions", sincos(tower.size // tower.patch, tower.width), persistent=False)
            mean, std = (torch.tensor(v).repeat(tower.patch**2) for v in (augment.mean, augment.std))
            self.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
            self.register_buffer("pixel_offset", -mean / std, persistent=False)

    def forward(self, patches: Tensor, keep: Tensor | None = None) -> Tensor:
        """(b, K, p*p*3) uint8 and positions (b, K), or all P patches in order -> (b, E) fp32, not normalised."""
        x = self.patch((patches * self.pixel_scale).add_(self.pixel_offset).to(self.patch.weight.dtype))
        positions = self.positions.to(x.dtype)
        x = x + (positions if keep is None else positions[keep.long()])
        x = torch.cat([self.class_token.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        pooled = x if self.pool == "all" else x[:, 1:]
        return _project(pooled.mean(dim=1, dtype=torch.float32), self.projection)


class TextEncoder(nn.Module):
    """Not causal; the output at position 0, which is never padding, is pooled. Attention runs over padding or not."""

    def __init__(self, tower: schema.TextTower, embed: int, attention: str) -> None:
        super().__init__()
        self.packed = tower.padding == "mask"
        self.few_shapes = False
        """Fill packed rows up to one of 32 lengths: compiled blocks are compiled for each length anew."""
        self.tokens = nn.Embedding(tower.vocabulary, tower.width)
        self.positions = nn.Parameter(torch.zeros(tower.length, tower.width))
        self.blocks = build_blocks(tower, attention)
        self.norm = nn.LayerNorm(tower.width, eps=EPS)
        self.projection = nn.Linear(tower.width, embed, bias=False)

    def rows(self, tokens: Tensor) -> Tensor | None:
        """``PackedLayout.token_indices`` of a batch (b, T), None where padding is attended to.

        ``forward`` finds them by itself, but on a GPU it then waits for the device: better find them on the host.
        """
        if not self.packed:
            return None
        rows = _held(tokens).flatten().nonzero().squeeze(1)
        if self.few_shapes:
            step = max(1, tokens.numel() // 32)
            rows = F.pad(rows, (0, -len(rows) % step), value=tokens.numel())
        return rows

    def forward(self, tokens: Tensor, places: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """(b, T) token ids -> (b, E) fp32, not normalised.

        ``places``: (b, T) positions of a shortened caption's tokens, the first one 0; without, they are 0 .. T-1.
        ``rows``: those of ``self.rows(tokens)``, if they are known.
        """
        layout = None
        rows = self.rows(tokens) if rows is None else rows
        if rows is None:
            x = self.tokens(tokens) + self._positions(places)
        else:
            held = _held(tokens)
            at = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) if places is None else places
            chosen, at = (pack(field.reshape(-1, 1), rows).squeeze(1) for field in (tokens, at))
            x = self.tokens(chosen) + self._positions(at)
            lengths = held.sum(dim=1)
            bias = torch.zeros(held.shape, dtype=_dtype(x), device=x.device).masked_fill_(~held, -torch.inf)
            layout = PackedLayout(rows, lengths.cumsum(0) - lengths, bias[:, None, None])
        x = x.to(_dtype(x))
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, layout, cls_only=number == len(self.blocks))
        return _project(self.norm(x), self.projection)

    def _positions(self, places: Tensor | None) -> Tensor:
        return self.positions if places is None else F.embedding(places.long(), self.positions)


def _held(tokens: Tensor) -> Tensor:
    """(b, T) bool: no padding, or the position that is pooled (an empty caption has no other)."""
    held = tokens != 0
    held[:, 0] = True
    return held


def _dtype(x: Tensor) -> torch.dtype:
    """That of activations."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Pair(nn.Module):
    """Both encoders, the temperature, and SigLIP's bias: the whole of what is trained."""

    def __init__(self, model: schema.Model, augment: schema.Augment, attention: str) -> None:
        super().__init__()
        self.image = ImageEncoder(model.image, model.embed, augment, attention)
        self.text = TextEncoder(model.text, model.embed, attention)
        self.first_logit_scale, self.first_logit_bias = math.log(1 / model.temperature), model.logit_bias
        self.max_logit_scale = math.log(model.max_logit_scale)
        # Shape (1,): fully_shard refuses scalars.
        self.logit_scale = nn.Parameter(torch.full((1,), self.first_logit_scale))
        self.logit_bias = nn.Parameter(torch.full((1,), model.logit_bias)) if model.objective == "siglip" else None

    def forward(
        self, patches: Tensor, keep: Tensor | None, tokens: Tensor, places: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """One training pass -> what ``contrastive_loss`` takes: image (b, E), text (b, E), both fp32 of norm 1, the
        scale of the logits (1,), and with objective siglip their bias (1,).

        The scale is exp of the parameter clamped to [0, ln max]: outside, its gradient is zero. The towers
        are called directly: encode_image and encode_text are entry points of their own under sharding.
        """
        image, text = self.image(patches, keep), self.text(tokens, places, rows)
        scale = self.logit_scale.float().clamp(0.0, self.max_logit_scale).exp()
        found = _normalise(image), _normalise(text), scale
        # A result of forward: a parameter itself is not gathered by whoever holds it outside, where it is sharded.
        return found if self.logit_bias is None else (*found, self.logit_bias.float() + 0.0)

    def encode_image(self, patches: Tensor, keep: Tensor | None = None) -> Tensor:
        """(b, K, p*p*3) uint8 -> (b, E) fp32 of norm 1; without ``keep`` all P patches in order."""
        return _normalise(self.image(patches, keep))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(b, T) token ids -> (b, E) fp32 of norm 1."""
        return _normalise(self.text(tokens))


def _normalise(features: Tensor) -> Tensor:
    return features / (features.norm(dim=-1, keepdim=True) + 1e-8)


@torch.no_grad()
def initialise(pair: Pair, seed: int) -> None:
    """Draw all weights, each parameter from a generator of its own: key(seed, hash of its name).

    So they depend on neither the order of construction, nor the device, nor the world size, nor what else draws. Of a
    sharded pair each rank draws one whole parameter after the other and keeps its part of it.
    docs/contracts.md, Randomness, gives the formula.
    """
    for name, parameter in pair.named_parameters():
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        generator = torch.Generator().manual_seed(int(key(seed, digest)))
        value = torch.full(parameter.shape, math.nan)
        if name == "logit_scale":
            value.fill_(pair.first_logit_scale)
        elif name == "logit_bias":
            value.fill_(pair.first_logit_bias)
        elif name.endswith(".bias"):
            value.zero_()
        elif name.endswith((".class_token", ".positions", ".tokens.weight")):
            value.normal_(0.0, STD, generator=generator)
        elif value.ndim == 1:  # the gain of a LayerNorm
            value.fill_(1.0)
        else:
            nn.init.xavier_uniform_(value, generator=generator)
        parameter.copy_(shard_like(value, parameter))
