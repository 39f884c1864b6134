"""Parameters, FLOPs and memory of a configuration, by arithmetic: no torch, so that planning is instant.

Per block of width D with fused q, k, v and an MLP of 4 D (all with biases): 12 D^2 + 13 D parameters (two LayerNorms
included), and for n tokens 24 n D^2 + 4 n^2 D forward FLOPs. A multiply-add counts as two; norms, activations and the
softmax are left out, as is usual. Only visible patches are embedded, as in ``flip.model``. Checked against the
paper's cost ratios (docs/recipe.md, FLOPs) and the built model.
"""

from __future__ import annotations

from flip.config.schema import ImageTower, Model, TextTower
from flip.config.stages import kept

SAVED, TEMPORARY = 17, 12
"""Values of the width per token: what a block saves for its backward pass (its two inputs, two norms, q, k, v, the
heads' output, the hidden layer before and after its activation), and what the backward pass of one holds besides."""

LAST = 5
"""The same of the text tower's last block, whose first position alone goes on: its input, a norm, q, k and v."""

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


def memory(
    model: Model, local: int, mask: str, precision: str, world: int, attention: str = "sdpa", accumulate: int = 1,
    recompute: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Bytes of one rank, an estimate for planning: each part and their ``total``.

    Arguments: local batch b, mask ratio, ``fp32`` or ``bf16``, world size W, ``explicit`` or ``sdpa``, micro-batches.
    Weights, gradients and both moments are fp32 and shared over the ranks. Activations are what autograd saves on a CPU
    for one micro-batch (within 10 %, see the test), with ``recompute`` the inputs of all blocks and one block whole;
    autocast on CUDA keeps norms in fp32, which is more and was not measured. The loss goes over its logits in tiles.
    Interpreter and libraries come on top.
    """
    size = 2 if precision == "bf16" else 4
    count, length = parameters(model)["total"], tokens(model.image, mask)
    widest = max(model.image.width, model.text.width)
    # Held whole by each rank where W > 1: the block at work and the next one, the embedding, and their gradients.
    gathered = 4 * 2 * (2 * 12 * widest**2 + model.text.vocabulary * model.text.width) if world > 1 else 0
    micro = -(-local // accumulate)
    parts = {
        "weights": 4 * count // world + gathered,
        "bf16_weights": 2 * (count - model.text.vocabulary * model.text.width) if precision == "bf16" else 0,
        "gradients": 4 * count // world,
        "moments": 8 * count // world,
        "image_activations": micro * size * _saved(model.image, length, attention, recompute),
        "text_activations": micro * size * _saved(model.text, model.text.length, attention, recompute, True),
        "temporary": micro * size * TEMPORARY * max(length * model.image.width, model.text.length * model.text.width),
        "loss": loss_bytes(local, world, model.embed),
    }
    return parts | {"total": sum(parts.values())}


def _saved(
    tower: ImageTower | TextTower, length: int, attention: str, recompute: bool, first: bool = False
) -> int:  # fmt: skip
    """Values saved for the backward pass of one sequence; explicit attention saves one square matrix per head.

    ``first``: of the last block only the first position is computed.
    """
    block = SAVED * length * tower.width + (tower.heads * length**2 if attention == "explicit" else 0)
    if recompute:
        return tower.layers * length * tower.width + block
    return tower.layers * block - ((block - LAST * length * tower.width) if first else 0)
