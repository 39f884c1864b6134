"""The named model sizes (docs/recipe.md, Sizes): values of ordinary fields, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _size(embed: int, image: tuple[int, int, int, int, int], text: tuple[int, int, int], **more: int) -> dict[str, Any]:
    size, patch, width, layers, heads = image
    row: dict[str, Any] = {
        "embed": embed,
        "image": {"size": size, "patch": patch, "width": width, "layers": layers, "heads": heads},
        "text": {"width": text[0], "layers": text[1], "heads": text[2], **more},
    }
    return row


#: name -> fields of ``Model``. L/14 is L/16 with patch 14 (the paper tunes it from L/16).
SIZES: dict[str, dict[str, Any]] = {
    "B/16": _size(512, (224, 16, 768, 12, 12), (512, 12, 8)),
    "L/16": _size(768, (224, 16, 1024, 24, 16), (768, 12, 12)),
    "L/14": _size(768, (224, 14, 1024, 24, 16), (768, 12, 12)),
    "H/14": _size(1024, (224, 14, 1280, 32, 16), (1024, 24, 16)),
    # for tests: small, yet every kind of part occurs
    "tiny": _size(48, (64, 8, 64, 3, 2), (64, 2, 2), vocabulary=1000),
    # for the quickstart: 48 px pictures, two CPU cores
    "emoji": _size(128, (48, 8, 128, 4, 2), (128, 1, 2), vocabulary=4000),
}

MAX_CHANGED = 3
"""Fields that a label lists at most."""


def label(settings: Mapping[str, Any]) -> str | None:
    """What to call a model: its size, and the fields whose values are not those of that size.

    ``settings``: dotted key -> value, as ``flip.config.identity.flatten`` makes them. None if they name no size.
    """
    size = settings.get("model.size")
    changed = []
    for section, value in SIZES.get(size or "", {}).items():
        nested = isinstance(value, dict)
        fields = {f"{section}.{name}": item for name, item in value.items()} if nested else {section: value}
        changed += [key for key, item in fields.items() if settings.get(f"model.{key}", item) != item]
    if len(changed) > MAX_CHANGED:
        return "custom size"
    return f"{size} with " + ", ".join(f"{key} {settings.get(f'model.{key}')}" for key in changed) if changed else size
