"""A model as evaluation sees it: a decoded image -> its view -> features; texts -> features. Ours, whole or masked."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flip.config import schema
from flip.config.derived import kept, patches
from flip.data import decode, masking
from flip.data.decode import Pixels
from flip.data.view import EvaluationView
from flip.models.clip import Pair
from flip.rng import key
from flip.runs.errors import ConfigError
from flip.tokenizer import Tokenizer

PLAIN: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


class Encoder(Protocol):
    """Features are (n, E) fp32 on the CPU, of norm 1."""

    width: int
    """E."""
    looks: str
    """How it looks at an image, in a word: part of the key of cached features."""
    precision: str
    """``fp32`` or ``bf16``: of the towers' arithmetic. Stands in every result."""

    def view(self, image: Pixels | Image.Image) -> NDArray[Any]:
        """What is stacked to a batch, of one decoded image."""

    def image(self, views: Tensor, ids: Tensor) -> Tensor:
        """(n, E) of n views. ``ids`` (n,): the images' ids in their data set."""

    def text(self, texts: Sequence[str]) -> Tensor:
        """(n, E) of n texts."""


class PairEncoder:
    """The pair of a run. Under sharding every call is collective.

    ``mask``: share of the patches that are not looked at ("0": all are seen). Which, is drawn as in training, of seed 0
    and visit 0. ``ensemble``: look through as many masks as show every patch, and average (paper, Table 1d).
    ``precision``: what ``pair`` computes in under ``autocast``; it is recorded, not set here.
    ``view``: default, that of recipe paper.
    """

    def __init__(
        self, pair: Pair, tokenizer: Tokenizer, tower: schema.ImageTower, device: torch.device | str = "cpu",
        autocast: contextlib.AbstractContextManager[Any] = PLAIN, mask: str = "0", ensemble: bool = False,
        precision: str = "fp32",
        view: EvaluationView | None = None,
    ) -> None:  # fmt: skip
        self.pair, self.tokenizer, self.tower, self.device, self.autocast = pair, tokenizer, tower, device, autocast
        self.patches, self.kept, self.ensemble = patches(tower), kept(tower, mask), ensemble
        if self.kept < 1:
            raise ConfigError("such a mask leaves no patch", "mask", mask, "Mask less.")
        self.width, self.precision = pair.image.projection.out_features, precision
        self._view = view or EvaluationView(tower.size)
        self.looks = self._view.label + (f"-{'ensemble' if ensemble else 'mask'}{mask}" if self.masked else "")

    @property
    def masked(self) -> bool:
        return self.kept < self.patches

    def view(self, image: Pixels | Image.Image) -> Pixels:
        """All patches (P, p*p*3) of the view."""
        return decode.patches(self._view(image), self.tower.patch)

    @torch.no_grad()
    def image(self, views: Tensor, ids: Tensor) -> Tensor:
        """(n, P, p*p*3) uint8 -> (n, E)."""
        if not self.masked:
            return self._encode(views, None)
        total = torch.zeros(len(views), self.width)
        for keep in masks(ids.numpy(), self.patches, self.kept, self.ensemble):
            at = torch.from_numpy(keep.astype(np.int64))
            total += self._encode(views.gather(1, at[..., None].expand(-1, -1, views.shape[2])), at)
        return torch.nn.functional.normalize(total, dim=-1)

    def _encode(self, views: Tensor, keep: Tensor | None) -> Tensor:
        with self.autocast:
            seen = keep if keep is None else keep.to(self.device)
            return self.pair.encode_image(views.to(self.device), seen).float().cpu()

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        tokens = torch.from_numpy(self.tokenizer(texts)).to(self.device)
        with self.autocast:
            return self.pair.encode_text(tokens).float().cpu()


def masks(ids: NDArray[np.int64], count: int, kept: int, every: bool) -> list[NDArray[np.int16]]:
    """Visible patches (n, K), ascending, of one mask, or with ``every`` of as many as show all P.

    The first is training's mask of seed 0 and visit 0; the next takes the K patches that come after in the same order.
    Where K does not divide P the last one takes its missing patches from the one before.
    """
    keys = key(0, 0, ids.reshape(-1, 1), masking.MASK, np.arange(count))
    order = np.argsort(keys, axis=1, kind="stable").astype(np.int16)
    starts = [min(start, count - kept) for start in range(0, count if every else 1, kept)]
    return [np.sort(order[:, start : start + kept], axis=1) for start in starts]
