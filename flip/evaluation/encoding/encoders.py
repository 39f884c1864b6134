"""Encoders of images and texts for evaluation: a run's model, with or without masks, or a folder of open_clip.

Features are (n, E) fp32 on the CPU, of norm 1; E is ``width``. ``view`` converts a decoded image to one item of a
batch. ``view_id`` (the kind of view) and ``precision`` (``fp32`` or ``bf16``) are fields of results and keys of the
cache.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from flip.config import schema
from flip.config.derived import patches, visible_patch_count
from flip.data import decode
from flip.data.decode import Pixels
from flip.data.patch_masking import PATCH_MASKINGS, UNIFORM, PatchMasking, patch_ranks
from flip.data.view import EvaluationView
from flip.evaluation.encoding import open_clip_folder
from flip.models.clip import CLIPModel
from flip.runs.errors import ConfigError
from flip.tokenizer import Tokenizer

FULL_PRECISION: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
GREY: Pixels = np.full((32, 32, 3), 127, dtype=np.uint8)
"""An image that stands for any other."""


class ModelEncoder:
    """The model of a run. Under sharding every call is collective.

    ``mask``: share of patches to hide ("0": none), drawn as in training with seed 0 and epoch 0, by ``patch_masking``,
    a row of ``PATCH_MASKINGS``. ``ensemble``: average over as many masks as show every patch (paper, Table 1d).
    ``precision``: of ``model`` under ``autocast``, recorded in results. ``view``: default, that of recipe paper.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: Tokenizer, tower: schema.ImageTower, device: torch.device | str = "cpu",
        autocast: contextlib.AbstractContextManager[Any] = FULL_PRECISION, mask: str = "0", ensemble: bool = False,
        precision: str = "fp32", view: EvaluationView | None = None, patch_masking: str = "uniform",
    ) -> None:  # fmt: skip
        self.model = model
        self.tokenizer = tokenizer
        self.tower = tower
        self.device = device
        self.autocast = autocast
        self.patches = patches(tower)
        self.visible_patch_count = visible_patch_count(tower, mask)
        self.ensemble = ensemble
        if self.visible_patch_count < 1:
            raise ConfigError("the mask leaves no patch", "mask", mask, "Mask less.")
        if self.masked and patch_masking not in PATCH_MASKINGS:
            what = "evaluation executes no class of a user, so it cannot draw the masks of this run"
            raise ConfigError(what, "stages.patch_masking", patch_masking, "Score without a mask.")
        self._patch_masking = PATCH_MASKINGS.get(patch_masking, UNIFORM)
        self.width = model.image.projection.out_features
        self.precision = precision
        self._view = view or EvaluationView(tower.size)
        self.view_id = self._view.label
        if self.masked and ensemble:
            self.view_id += f"-ensemble{mask}"
        elif self.masked:
            self.view_id += f"-mask{mask}"
        if self.masked and patch_masking != "uniform":
            self.view_id += f"-{patch_masking}"

    @property
    def masked(self) -> bool:
        return self.visible_patch_count < self.patches

    def view(self, image: Pixels | Image.Image) -> Pixels:
        """All patches (P, p*p*3) of the view."""
        return decode.patches(self._view(image), self.tower.patch)

    @torch.no_grad()
    def image(self, views: Tensor, ids: Tensor) -> Tensor:
        """(n, P, p*p*3) uint8 -> (n, E). ``ids`` (n,): ids of the images in their data set, which select the masks."""
        if not self.masked:
            return self._encode(views, None)
        total = torch.zeros(len(views), self.width)
        count = self.visible_patch_count
        for mask in masks(ids.numpy(), self.patches, count, self.ensemble, self._patch_masking):
            keep = torch.from_numpy(mask.astype(np.int64))
            total += self._encode(views.gather(1, keep[..., None].expand(-1, -1, views.shape[2])), keep)
        return normalize(total, dim=-1)

    def _encode(self, views: Tensor, keep: Tensor | None) -> Tensor:
        with self.autocast:
            keep = keep if keep is None else keep.to(self.device)
            return self.model.encode_image(views.to(self.device), keep).float().cpu()

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        tokens = torch.from_numpy(self.tokenizer(texts))
        indices = self.model.text.token_indices(tokens)  # on the host, which would wait for a GPU
        fields = [self._copy(field) for field in (tokens, indices) if field is not None]
        with self.autocast:
            return self.model.encode_text(*fields).float().cpu()

    def _copy(self, field: Tensor) -> Tensor:
        """A copy on the device, for which the host does not wait."""
        if torch.device(self.device).type == "cuda":
            field = field.pin_memory()
        return field.to(self.device, non_blocking=True)


def masks(
    ids: NDArray[np.int64], count: int, visible: int, every: bool, way: PatchMasking = UNIFORM
) -> list[NDArray[np.int16]]:
    """Visible patches (n, K), ascending: of one mask, or with ``every`` of as many masks as show all ``count`` patches.

    The first is the mask of training with seed 0 and epoch 0. The next takes the following K patches in the order of
    the same ranks; if K does not divide ``count``, the last one overlaps the one before.
    """
    ranks = patch_ranks(0, 0, ids, count, visible, way)
    order = np.argsort(ranks, axis=1, kind="stable").astype(np.int16)
    end = 1
    if every:
        end = count
    starts = [min(start, count - visible) for start in range(0, end, visible)]
    return [np.sort(order[:, start : start + visible], axis=1) for start in starts]


class OpenClipEncoder:
    """The model of an open_clip folder with its own preprocessing and tokenizer, replicated on every rank.

    Only safetensors are read, and no code of the folder or of a hub runs. ``precision``: ``fp32``, or ``bf16`` by
    autocast. Raises ConfigError if open_clip or transformers is needed and not installed, and the errors of
    ``open_clip_folder.check``.
    """

    def __init__(self, folder: str, device: torch.device | str = "cpu", precision: str = "fp32") -> None:
        trust = {}
        if open_clip_folder.check(folder):
            trust = {"trust_remote_code": False}
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError("open_clip is not installed", folder, remedy="pip install open_clip_torch") from error
        name = f"local-dir:{Path(folder).absolute()}"
        try:
            self.model, _, self._preprocess = open_clip.create_model_and_transforms(name, precision="fp32")
            self._tokenizer = open_clip.get_tokenizer(name, **trust)
        except ImportError as error:
            remedy = "pip install transformers"
            raise ConfigError(f"its tokenizer needs a package: {error}", folder, remedy=remedy) from error
        except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
            raise ConfigError(f"open_clip cannot build this model: {error}", folder) from error
        self.model.to(device).eval()
        self.device = device
        self.precision = precision
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
        self.view_id = "open_clip-own"  # features cached as "open_clip" are of images converted to RGB beforehand
        self.width = self.image(torch.zeros(1, *self.view(GREY).shape), torch.zeros(1)).shape[1]

    def view(self, image: Pixels | Image.Image) -> NDArray[Any]:
        """(3, H, W) float32."""
        if isinstance(image, Image.Image):
            pil_image = image
        else:
            pil_image = Image.fromarray(image)
        view: NDArray[Any] = self._preprocess(pil_image).numpy()
        return view

    @torch.no_grad()
    def image(self, views: Tensor, ids: Tensor) -> Tensor:
        with self.autocast:
            return normalize(self.model.encode_image(views.to(self.device)).float(), dim=-1).cpu()

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        with self.autocast:
            tokens = self._tokenizer(list(texts)).to(self.device)
            return normalize(self.model.encode_text(tokens).float(), dim=-1).cpu()


Encoder = ModelEncoder | OpenClipEncoder
