"""The image encoder of ``model.image.tower: flip``, and what other towers share with it (docs/recipe.md).

Dimensions: b images, K of P patches visible, D the width of the tower, E the shared embedding. Pooling and projection
are always fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flip.config import derived, schema
from flip.models.transformer import build_blocks


def sincos(grid: int, width: int) -> Tensor:
    """The fixed position table (grid^2, D) fp32, patches row by row (docs/recipe.md, Image encoder).

    The first half of the channels codes the column, the second the row; each is D/4 sines, then D/4 cosines, of the
    coordinate over 10000^(i / (D/4)).
    """
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * 10000.0 ** -(torch.arange(width // 4) / (width / 4))
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    column = line.repeat(grid, 1)
    row = line.repeat_interleave(grid, dim=0)
    return torch.cat([column, row], dim=1).float()


def project(pooled: Tensor, projection: nn.Linear) -> Tensor:
    """(b, D) -> (b, E), in fp32 also under autocast."""
    with torch.autocast(pooled.device.type, enabled=False):
        return projection(pooled.float())


def scale_pixels(patches: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, K, p*p*3) uint8 -> normalised, of ``dtype``. Compiled on a GPU: one kernel that writes nothing in fp32."""
    return (patches * scale).add_(offset).to(dtype)


def register_constants(encoder: nn.Module, tower: schema.ImageTower, augment: schema.Augment) -> None:
    """Give an encoder its constants, which no checkpoint has: positions that are not learned, and the normalisation."""
    with torch.device("cpu"):  # also in a model on the meta device
        if tower.positions != "learned":
            encoder.register_buffer("positions", sincos(tower.size // tower.patch, tower.width), persistent=False)
        mean, std = (torch.tensor(v).repeat(tower.patch**2) for v in (augment.mean, augment.std))
        encoder.register_buffer("pixel_scale", 1 / (255 * std), persistent=False)
        encoder.register_buffer("pixel_offset", -mean / std, persistent=False)


def visible_positions(positions: Tensor, keep_indices: Tensor | None) -> Tensor:
    """(P, D) -> (b, K, D) of the visible patches, or all of them."""
    if keep_indices is None:
        return positions
    return F.embedding(keep_indices.long(), positions)


def mean_token(x: Tensor, pool: str, prefix: int) -> Tensor:
    """(b, T, D) -> (b, D) fp32: the mean of all tokens, or of those of patches, which follow ``prefix`` others."""
    return (x if pool == "all" else x[:, prefix:]).mean(dim=1, dtype=torch.float32)


class ImageEncoder(nn.Module):
    """Vision transformer of the visible patches and a class token; pooled at it, or by the mean over patches or all
    tokens."""

    positions: Tensor
    """(P, D), a fixed table; or (1 + P, D), learned, with the class token's first."""
    pixel_scale: Tensor
    pixel_offset: Tensor

    def __init__(self, model: schema.Model, augment: schema.Augment, attention: str) -> None:
        super().__init__()
        tower = model.image
        eps = model.norm_eps
        self.pool = tower.pool
        self.learned_positions = tower.positions == "learned"
        self.scale_pixels = scale_pixels
        self.patch = nn.Linear(3 * tower.patch**2, tower.width, bias=not tower.norm_pre)
        self.class_token = nn.Parameter(torch.zeros(tower.width))
        if self.learned_positions:
            self.positions = nn.Parameter(torch.zeros(1 + derived.patches(tower), tower.width))
        self.norm_pre: nn.Module = nn.Identity()
        if tower.norm_pre:
            self.norm_pre = nn.LayerNorm(tower.width, eps=eps)
        self.blocks = build_blocks(tower, model, attention)
        self.norm = nn.LayerNorm(tower.width, eps=eps)
        self.projection = nn.Linear(tower.width, model.embed, bias=False)
        register_constants(self, tower, augment)

    def forward(
        self, patches: Tensor, keep_indices: Tensor | None = None, with_pooled: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(b, K, p*p*3) uint8 and patch indices (b, K), or all P patches in order -> (b, E) fp32, not normalised.

        ``with_pooled``: also the pooled features (b, D) of which they are the projection.
        """
        x = self.patch(self.scale_pixels(patches, self.pixel_scale, self.pixel_offset, self.patch.weight.dtype))
        first = self.class_token.to(x.dtype)
        positions = self.positions.to(x.dtype)
        if self.learned_positions:
            first = first + positions[0]
            positions = positions[1:]
        x = x + visible_positions(positions, keep_indices)
        x = torch.cat([first.expand(x.shape[0], 1, -1), x], dim=1)  # (b, 1 + K, D)
        x = self.norm_pre(x).to(x.dtype)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, pooled_only=self.pool == "class" and number == len(self.blocks))
        x = self.norm(x)
        if self.pool != "class":
            x = mean_token(x, self.pool, prefix=1)
        features = project(x, self.projection)
        return (features, x) if with_pooled else features

    def draw(self, name: str, value: Tensor, generator: torch.Generator) -> bool:
        """Draw the first value of a parameter. False: as ``flip.models.clip`` draws those of its kind."""
        return False
