"""Builds the image tower of ``model.image.tower``, and checks one of a user (``flip.tower_kinds`` has the sizes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from flip.config import schema
from flip.models.image_encoder import ImageEncoder
from flip.runs.errors import ConfigError
from flip.tower_kinds import image_tower

_KEY = "model.image.tower"
_SEE = "see UserImageTower in flip/tower_kinds.py"


def _build_flip(model: schema.Model, augment: schema.Augment, attention: str) -> nn.Module:
    return ImageEncoder(model, augment, attention)


def _build_timm(model: schema.Model, augment: schema.Augment, attention: str) -> nn.Module:
    from flip.models.timm_vit import TimmViT  # timm takes seconds to import

    return TimmViT(model, augment, attention)


BUILDERS: dict[str, Callable[[schema.Model, schema.Augment, str], nn.Module]] = {
    "flip": _build_flip,
    "timm": _build_timm,
}
"""``model.image.tower`` -> what builds the tower."""


def build_image_tower(model: schema.Model, augment: schema.Augment, attention: str, recompute: str) -> Any:
    """The image tower of a model. ``attention``, ``recompute``: resolved fields of ``compute``.

    Raises ConfigError if a user's tower lacks a part, has dropout, or has another number of parameters than its class
    says.
    """
    name = model.image.tower
    if name in BUILDERS:
        return BUILDERS[name](model, augment, attention)
    kind = image_tower(name)
    tower = kind.build(model, augment, attention)
    _check_parts(tower, name, recompute)
    _refuse_dropout(tower, name)
    count = sum(parameter.numel() for parameter in tower.parameters())
    expected = kind.parameters(model)
    if count != expected:
        what = f"the tower has {count:,} parameters, and its class says {expected:,}"
        raise ConfigError(what, _KEY, name, f"Correct `parameters` of the class; {_SEE}.")
    if not hasattr(tower, "draw"):
        tower.draw = lambda *_: False
    return tower


def _check_parts(tower: nn.Module, name: str, recompute: str) -> None:
    blocks = getattr(tower, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ConfigError("the tower has no nn.ModuleList `blocks`", _KEY, name, f"Add it; {_SEE}.")
    if not isinstance(getattr(tower, "projection", None), nn.Linear):
        raise ConfigError("the tower has no nn.Linear `projection`", _KEY, name, f"Add it; {_SEE}.")
    if recompute != "no" and not all(hasattr(block, "activation_checkpointing") for block in blocks):
        remedy = "Set it to no, or give the blocks the attribute activation_checkpointing and obey it."
        raise ConfigError("the blocks of the tower recompute nothing", "compute.recompute", recompute, remedy)
    for key, buffer in tower.named_buffers():
        if buffer.is_meta:
            remedy = 'Create it inside `with torch.device("cpu")`.'
            raise ConfigError("a buffer of the tower has no values", f"{_KEY}: {name}", key, remedy)


def _refuse_dropout(tower: nn.Module, name: str) -> None:
    """Raise ConfigError for a module that draws random numbers: a resumed run would draw others."""
    for key, module in tower.named_modules():
        rate = getattr(module, "drop_prob", 0.0) or 0.0
        if isinstance(module, nn.modules.dropout._DropoutNd):
            rate = module.p
        if rate:
            remedy = "Set it to 0: a run that resumes would draw other numbers."
            raise ConfigError("the tower has dropout or stochastic depth", f"{_KEY}: {name}", key, remedy)
