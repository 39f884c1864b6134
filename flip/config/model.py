"""The fields of a run's model (docs/recipe.md): two towers and what joins them. Pure dataclasses, as in ``schema``."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ImageTower:
    """The image encoder: a pre-norm ViT (docs/recipe.md, Image encoder)."""

    size: int = 224
    """Side of the square input, pixels."""
    patch: int = 16
    """Side of a patch, pixels; divides ``size``."""
    width: int = 768
    layers: int = 12
    heads: int = 12
    pool: str = "patches"
    """``all``: mean over class token and patches (recipe: paper). ``patches``: over patches only (recipe: portable)."""


@dataclass
class TextTower:
    """The text encoder: the same blocks, not causal (docs/recipe.md, Text encoder)."""

    length: int = 32
    """Tokens per caption, cut or padded with id 0."""
    vocabulary: int = 30522
    """Rows of the embedding; at least the tokenizer's size."""
    width: int = 512
    layers: int = 12
    heads: int = 8
    prepend_cls: bool = True
    """Put [CLS] first and pool it (recipe: portable). False: pool the first word piece (recipe: paper)."""
    repair: bool = False
    """Repair broken encodings in texts (UTF-8 that was read as something else, by ftfy), as open_clip does it to every
    text (recipe: portable). False: texts are taken as they are (recipe: paper)."""
    padding: str = "attend"
    """``attend``: attention runs over padding too (both recipes). ``mask``: it sees none, which is another model and
    the faster one, as padding is then not computed at all (docs/recipe.md, Text without padding)."""


@dataclass
class Model:
    size: str = "B/16"
    """A row of ``flip.config.sizes.SIZES``: fills in every field below that is not given by name."""
    embed: int = 512
    """Width of the shared embedding."""
    image: ImageTower = field(default_factory=ImageTower)
    text: TextTower = field(default_factory=TextTower)
    temperature: float = 0.07
    """Initial temperature; logit_scale starts at ln(1 / temperature)."""
    max_logit_scale: float = 100.0
    """The scale is clamped to [1, this] inside the forward pass (docs/recipe.md, Objective)."""
    objective: str = "clip"
    """``clip``: symmetric InfoNCE. ``siglip``: the sigmoid loss of every pair by itself; its values of temperature,
    bias and clamp are in recipe siglip."""
    logit_bias: float = -10.0
    """Initial bias of the logits, learned; of objective siglip alone."""
