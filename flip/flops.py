"""Parameters and FLOPs of a configuration, by arithmetic: no torch, so that planning is instant.

Per block of width D with fused q, k, v and an MLP of 4 D (all with biases): 12 D^2 + 13 D parameters (two LayerNorms
included), and for n tokens 24 n D^2 + 4 n^2 D forward FLOPs. A multiply-add counts as two; norms, activations and the
softmax are left out, as is usual. Only visible patches are embedded, as in ``flip.models.clip``. Checked against the
paper's cost ratios (docs/recipe.md, FLOPs) and the built model.
"""

from __future__ import annotations

from flip.config.derived import kept
from flip.config.schema import ImageTower, Model, TextTower

LOSS_TILE = 1024
"""Columns of logits that the loss holds at once. On a CPU more are not faster (benchmarks/loss.py)."""


def parameters(model: Model) -> dict[str, int]:
    """Trainable parameters: ``image``, ``text`` and ``total``, which counts the logit scale (and bias) too."""
    image, text = model.image, model.text
    pixels = 3 * image.patch**2
    counts = {
        "image": pixels * image.width + 2 * image.width + _blocks(image) + image.width * model.embed,
        "text": (text.vocabulary + text.length) * text.width + _blocks(text) + text.width * model.embed,
    }
    return counts | {"total": sum(counts.values()) + 1 + (model.objective == "siglip")}


def _blocks(tower: ImageTower | TextTower) -> int:
    """The blocks and the LayerNorm after them."""
    return tower.layers * (12 * tower.width**2 + 13 * tower.width) + 2 * tower.width


def tokens(image: ImageTower, mask: str) -> int:
    """Length of the image tower's sequence: the visible patches and the class token."""
    return kept(image, mask) + 1


def forward_flops(model: Model, mask: str, positions: float | None = None) -> dict[str, int]:
    """Forward FLOPs of one pair at a mask ratio: ``image``, ``text``, ``total``. The loss is left out.

    ``positions``: of a caption that are computed, a mean, where text masking or masked padding leaves fewer than all.
    """
    image, text = model.image, model.text
    visible = tokens(image, mask)
    embedding = 2 * (visible - 1) * 3 * image.patch**2 * image.width
    counts = {
        "image": embedding + _forward(image, visible) + 2 * image.width * model.embed,
        "text": _forward(text, text.length if positions is None else positions) + 2 * text.width * model.embed,
    }
    return counts | {"total": sum(counts.values())}


def _forward(tower: ImageTower | TextTower, length: float) -> int:
    return round(tower.layers * (24 * length * tower.width**2 + 4 * length**2 * tower.width))


def training_flops(model: Model, mask: str, positions: float | None = None) -> dict[str, int]:
    """FLOPs of one pair in training: three forward passes, the backward one counting two. The basis of MFU."""
    return {name: 3 * count for name, count in forward_flops(model, mask, positions).items()}


def loss_bytes(local: int, world: int, embed: int, tile: int = LOSS_TILE) -> int:
    """Bytes that the loss of b = ``local`` pairs on each of W ranks holds at most, fp32: O(b * tile), never O(b * B).

    Three tiles of logits (backward), all ranks' texts with their gradient, the rank's own features with theirs, and
    log-sum-exp of rows and columns.
    """
    whole = local * world
    return 4 * (3 * local * min(tile, whole) + 2 * whole * embed + 2 * 2 * local * embed + 4 * (local + whole))
