"""The image tower ``timm``: timm's blocks and pooling by attention on visible patches, with registers.

Names of parameters are those of ``flip.models.image_encoder`` where both have them. A test compares the tower with
timm's VisionTransformer of the same weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from flip.config import derived, schema
from flip.models.attention import is_fused
from flip.models.image_encoder import mean_token, project, register_constants, scale_pixels, visible_positions
from flip.models.transformer import ACTIVATIONS, recomputed
from flip.tower_kinds import has_class_token


class _Activation(nn.Module):
    """``model.activation`` as a module, as timm takes it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x)


class TimmBlock(Block):
    """timm's block. ``activation_checkpointing``: as of ``flip.models.transformer.TransformerBlock``."""

    activation_checkpointing = "no"

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(b, T, D) -> (b, T, D)."""
        return recomputed(self.activation_checkpointing, super().forward, x)


class TimmViT(nn.Module):
    """Vision transformer of the visible patches, registers and a class token, which pooling by attention has not."""

    positions: Tensor
    """(P, D), a fixed table; or learned, with the class token's first if there is one."""
    pixel_scale: Tensor
    pixel_offset: Tensor

    def __init__(self, model: schema.Model, augment: schema.Augment, attention: str) -> None:
        super().__init__()
        tower = model.image
        norm: Any = partial(nn.LayerNorm, eps=model.norm_eps)
        activation: Any = partial(_Activation, model.activation)
        self.pool = tower.pool
        self.learned_positions = tower.positions == "learned"
        self.scale_pixels = scale_pixels
        self.patch = nn.Linear(3 * tower.patch**2, tower.width, bias=not tower.norm_pre)
        self.class_token: nn.Parameter | None = None
        if has_class_token(tower):
            self.class_token = nn.Parameter(torch.zeros(tower.width))
        self.registers: nn.Parameter | None = None
        if tower.registers:
            self.registers = nn.Parameter(torch.zeros(tower.registers, tower.width))
        if self.learned_positions:
            rows = has_class_token(tower) + derived.patches(tower)
            self.positions = nn.Parameter(torch.zeros(rows, tower.width))
        self.norm_pre: nn.Module = nn.Identity()
        if tower.norm_pre:
            self.norm_pre = norm(tower.width)
        self.blocks = nn.ModuleList(
            TimmBlock(
                tower.width, tower.heads, qkv_bias=True, qk_norm=tower.qk_norm, norm_layer=norm, act_layer=activation
            )
            for _ in range(tower.layers)
        )
        for block in self.blocks:
            block.attn.fused_attn = is_fused(attention)  # type: ignore[union-attr]
        self.norm = norm(tower.width)
        self.attn_pool: nn.Module | None = None
        if tower.pool == "attention":
            self.attn_pool = AttentionPoolLatent(
                tower.width, num_heads=tower.heads, mlp_ratio=4, norm_layer=norm, act_layer=activation
            )
            self.attn_pool.fused_attn = is_fused(attention)  # type: ignore[misc, assignment]
        self.projection = nn.Linear(tower.width, model.embed, bias=False)
        register_constants(self, tower, augment)

    def forward(
        self, patches: Tensor, keep_indices: Tensor | None = None, with_pooled: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As of ``flip.models.image_encoder.ImageEncoder``."""
        x = self.patch(self.scale_pixels(patches, self.pixel_scale, self.pixel_offset, self.patch.weight.dtype))
        positions = self.positions.to(x.dtype)
        tokens = list[Tensor]()
        if self.class_token is not None:
            first = self.class_token.to(x.dtype)
            if self.learned_positions:
                first = first + positions[0]
                positions = positions[1:]
            tokens.append(first.expand(x.shape[0], 1, -1))
        if self.registers is not None:
            tokens.append(self.registers.to(x.dtype).expand(x.shape[0], -1, -1))
        x = x + visible_positions(positions, keep_indices)
        x = torch.cat([*tokens, x], dim=1)  # (b, prefix + K, D)
        prefix = x.shape[1] - patches.shape[1]
        x = self.norm_pre(x).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.attn_pool is not None:
            x = self.attn_pool(x[:, prefix:])
        elif self.pool == "class":
            x = x[:, 0]
        else:
            x = mean_token(x, self.pool, prefix)
        features = project(x, self.projection)
        return (features, x) if with_pooled else features

    def draw(self, name: str, value: Tensor, generator: torch.Generator) -> bool:
        """As of ``ImageEncoder``."""
        return False
