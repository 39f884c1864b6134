"""Converts weights between models of other patch sizes, image sizes and text lengths: at the border of two stages, and
for a run that starts from another one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from flip.checkpoint.saver import TRAINING_ONLY
from flip.config.schema import Config
from flip.distributed.parallel import full_tensor, reshard, shard_like
from flip.models.clip import CLIPModel


@torch.no_grad()
def copy_weights(source: CLIPModel, target: CLIPModel, names: Collection[str] | None = None) -> None:
    """Fill the parameters of ``target`` with those of ``source``, converted if their shapes differ. Collective.

    ``names``: the parameters that are copied; None: all.

    Both models are sharded alike, or ``source`` is whole on every rank. Fixed positions belong to the model and are not
    copied. A parameter that ``source`` does not have (logit_bias) keeps its value.
    """
    reshard(source)
    values: dict[str, nn.Parameter] = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        if name not in values or (names is not None and name not in names):
            continue
        value = values[name].detach()
        if value.shape != parameter.shape:
            value = convert(name, full_tensor(value), parameter.shape)
        if hasattr(value, "placements"):
            parameter.copy_(value)
        else:
            parameter.copy_(shard_like(value, parameter))


@torch.no_grad()
def load_weights(source: Config, target: CLIPModel, load: Callable[[dict[str, Tensor], tuple[str, ...]], None]) -> None:
    """Fill the parameters of ``target`` from a checkpoint of the model of ``source``, as ``copy_weights``. Collective.

    ``load`` fills tensors ``model.<name>`` from the checkpoint; its second argument are the parameters of the source
    that the target does not have. Of parameters that keep their shape it fills this
    rank's shards in place; only those to be converted are read in full by every rank.
    """
    with torch.device("meta"):
        saved = dict(CLIPModel(source.model, source.augment, "sdpa").named_parameters())
    own = {name: parameter.detach() for name, parameter in target.named_parameters() if name in saved}
    full = {name: torch.empty(saved[name].shape) for name, value in own.items() if saved[name].shape != value.shape}
    left_out = [f"model.{name}" for name in saved if name not in own]
    load({f"model.{name}": value for name, value in (own | full).items()}, (TRAINING_ONLY, *left_out))
    for name, value in full.items():
        own[name].copy_(shard_like(convert(name, value, own[name].shape), own[name]))


def convert(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """The full value of a parameter for a model in which it has another shape. Raises ValueError for other names."""
    if name == "image.patch.weight":
        return resample_patch_embed(value, round((shape[1] / 3) ** 0.5))
    if name == "image.positions":
        return resample_positions(value, shape[0])
    if name == "text.positions":
        return resize_text_positions(value, shape[0])
    raise ValueError(f"{name} cannot be converted from {tuple(value.shape)} to {tuple(shape)}")


def resample_patch_embed(weight: Tensor, patch: int) -> Tensor:
    """Patch weights (D, q*q*3) -> (D, p*p*3) for p = ``patch``, equivalent on a patch that is resized from q to p.

    This is the pseudo-inverse of the resize (FlexiViT, arXiv 2212.08013, section 3.4), exact if p > q.
    """
    from timm.layers import patch_embed

    from flip.export import weights

    return weights.as_matrix(patch_embed.resample_patch_embed(weights.as_convolution(weight), [patch, patch]))


def resample_positions(positions: Tensor, rows: int) -> Tensor:
    """Learned positions -> (``rows``, D): that of the class token, if there is one, stays, the grid is resampled
    (bicubic, antialiased), as in timm and open_clip.
    """
    from timm.layers.pos_embed import resample_abs_pos_embed

    grid = int(rows**0.5)
    return resample_abs_pos_embed(positions[None], [grid, grid], num_prefix_tokens=rows - grid**2)[0]


def resize_text_positions(positions: Tensor, length: int) -> Tensor:
    """Learned positions (T, D) -> (``length``, D): the first ones, or all of them and copies of the last.

    Not interpolated: captions start at position 0 in any length, so a position keeps its meaning.
    """
    extra = positions[-1:].expand(max(0, length - len(positions)), -1)
    return torch.cat([positions[:length], extra])
