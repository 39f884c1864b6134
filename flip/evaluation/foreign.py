"""Other people's models: a folder as open_clip writes them, seen as an encoder. open_clip is an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flip.data.decode import Pixels, to_rgb
from flip.evaluation import open_clip_folder
from flip.runs.errors import ConfigError


class OpenClipEncoder:
    """The model of an open_clip folder with its own preprocessing and tokenizer, whole on every rank.

    ``precision``: ``fp32``, or ``bf16`` by autocast over fp32 weights.

    Weights are read as safetensors alone, and no code that a folder or a hub brings is run. Raises ConfigError if
    open_clip or transformers is needed and not installed, and what ``open_clip_folder.check`` raises.
    """

    def __init__(
        self, folder: str, device: torch.device | str = "cpu", precision: str = "fp32"
    ) -> None:  # fmt: skip
        trust = {"trust_remote_code": False} if open_clip_folder.check(folder) else {}
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
            raise ConfigError(f"open_clip cannot make this model: {error}", folder) from error
        self.model.to(device).eval()
        self.device, self.precision = device, precision
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
        self.width, self.looks = self.encode(torch.zeros(1, *self.view(_grey()).shape)).shape[1], "open_clip"

    def view(self, image: Pixels | Image.Image) -> NDArray[Any]:
        """(3, H, W) float32."""
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        made: NDArray[Any] = self._preprocess(to_rgb(picture)).numpy()
        return made

    def image(self, views: Tensor, ids: Tensor) -> Tensor:
        return self.encode(views)

    @torch.no_grad()
    def encode(self, views: Tensor) -> Tensor:
        with self.autocast:
            return _unit(self.model.encode_image(views.to(self.device)))

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        with self.autocast:
            return _unit(self.model.encode_text(self._tokenizer(list(texts)).to(self.device)))


def _grey() -> Pixels:
    return np.full((32, 32, 3), 127, dtype=np.uint8)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()
