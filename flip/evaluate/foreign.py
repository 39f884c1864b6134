"""Other people's models: a folder as open_clip writes them, seen as an encoder. open_clip is an optional dependency."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flip.commit import sha256
from flip.data.decode import Pixels, to_rgb
from flip.exitcodes import ConfigError

FILES = ("open_clip_config.json", "open_clip_model.safetensors")
WISHES = ("clean", "language", "strip_sep_token")
"""Keywords of a tokenizer that a folder may choose."""


class OpenClipEncoder:
    """The model of an open_clip folder with its own preprocessing and tokenizer, whole on every rank.

    ``precision``: ``fp32``, or ``bf16`` by autocast over fp32 weights.

    Weights are read as safetensors alone, and no code that a folder or a hub brings is run. Raises ConfigError where
    open_clip is not installed, where the folder is none of its or wants more than files of its own, or where its
    tokenizer needs transformers.
    """

    def __init__(
        self, folder: str, device: torch.device | str = "cpu", precision: str = "fp32"
    ) -> None:  # fmt: skip
        _check(folder)
        foreign = _wants(folder)
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError("open_clip is not installed", folder, remedy="pip install open_clip_torch") from error
        name = f"local-dir:{Path(folder).absolute()}"
        try:
            self.model, _, self._preprocess = open_clip.create_model_and_transforms(name, precision="fp32")
            self._tokenizer = open_clip.get_tokenizer(name, **({"trust_remote_code": False} if foreign else {}))
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


def digest(folder: str) -> str:
    """SHA-256 over the contents of a folder's files, by name. Raises ConfigError where it is no folder of open_clip."""
    _check(folder)
    text = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        text.update(f"{path.name} {sha256(path)}\n".encode())
    return text.hexdigest()


def _check(folder: str) -> None:
    lacking = [name for name in FILES if not (Path(folder) / name).is_file()]
    if lacking:
        remedy = "Weights are read as safetensors alone, as open_clip.push_to_hf_hub and our export write them."
        raise ConfigError(f"is no folder of open_clip: {lacking[0]} is missing", folder, remedy=remedy)


def _wants(folder: str) -> bool:
    """Whether the folder's tokenizer is one of transformers.

    What open_clip_config.json names goes to transformers and timm as it is: a tokenizer may bring code and say that it
    is to be trusted, encoders may be asked for by their names on a hub. Raises ConfigError for such wishes.
    """
    where = str(Path(folder) / FILES[0])
    try:
        model = json.loads(Path(where).read_text(encoding="utf-8"))["model_cfg"]
        image, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
        wishes = sorted(set(text.get("tokenizer_kwargs") or {}) - set(WISHES))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"is no configuration of open_clip: {type(error).__name__} {error}", where) from error
    remedy = "Only files of the folder are read, and no code of it is run."
    if wishes:
        raise ConfigError("text_cfg.tokenizer_kwargs: a wish that is not granted", where, ", ".join(wishes), remedy)
    named = str(image.get("timm_model_name") or "")
    if text.get("hf_model_name") or (":" in named and not named.startswith("local-dir:")):
        found = text.get("hf_model_name") or named
        raise ConfigError("the model names an encoder of a hub", where, found, remedy)
    return bool(text.get("hf_tokenizer_name"))


def _grey() -> Pixels:
    return np.full((32, 32, 3), 127, dtype=np.uint8)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()
