"""What must agree between a configuration and the one whose weights it begins with. No torch, no weights."""

from __future__ import annotations

from flip.config.merge import get
from flip.config.schema import Config
from flip.runs.errors import ConfigError

#: Where these differ, the weights do not fit, or fit and mean something else.
_EQUAL = (
    "model.embed", "model.image.width", "model.image.layers", "model.image.heads", "model.text.width",
    "model.text.layers", "model.text.heads", "model.text.length", "model.text.vocabulary",
)  # fmt: skip
#: Where these differ, other weights are made of those there, which have no moments.
_MADE = ("model.image.patch", "model.objective")
#: Where these differ, the weights fit, and what they compute is another function: training has to make up for it.
_TOLD = (
    "model.image.size", "model.image.pool", "model.text.prepend_cls", "model.text.repair", "model.text.padding",
    "model.max_logit_scale", "augment.mean", "augment.std", "data.to_rgb", "evaluate.preprocess",
)  # fmt: skip


def agree(config: Config, source: Config, where: str, extend: bool = False) -> dict[str, list[object]]:
    """Key -> [there, here] of what differs and may. Raises ConfigError where ``config`` cannot begin from ``source``.

    Size and patch of the image may differ: positions are computed for the new grid, the patch weights resampled. The
    patch may not where ``extend``: moments go on as well. ``where``: what the source is called in errors.
    """
    for key in (*_EQUAL, *_MADE * extend):
        if get(config, key) != get(source, key):
            free = "image size, pool and texts" if extend else "image size, patch, pool, objective and texts"
            remedy = f"It must be {get(source, key)!r}, as there; what may differ is {free}."
            raise ConfigError(f"cannot begin from {where}", key, get(config, key), remedy)
    return {
        key: [get(source, key), get(config, key)] for key in (*_MADE, *_TOLD) if get(config, key) != get(source, key)
    }


def as_they_are(config: Config, source: Config) -> bool:
    """Whether all weights are those of the source."""
    return all(get(config, key) == get(source, key) for key in _MADE)
