"""Converts images and texts of users to inputs of a trained model."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flip.data.decode import DecodeError, Pixels, load, open_image
from flip.data.manifest.tar import SAMPLE_LIMIT
from flip.data.view import EvaluationView
from flip.files.creation import read_regular
from flip.runs.errors import ConfigError, DataError, read_error

ImageInput = Image.Image | str | os.PathLike[str] | NDArray[np.uint8] | Tensor
"""The path of an image file, a PIL image, an array (height, width, 3) of uint8, or a tensor (3, height, width) of uint8
or of floats in [0, 1], of any height and width."""

_ACCEPTED = (
    "Give a path, a PIL image, an array (height, width, 3) of uint8, or a tensor (3, height, width) of uint8"
    " or of floats from 0 to 1"
)


@dataclass(frozen=True)
class Preprocess:
    """Transforms an image to a uint8 tensor (3, size, size), which ``encode_image`` accepts alone or stacked.

    Can be pickled for the worker processes of a ``torch.utils.data.DataLoader``.
    """

    view: EvaluationView

    def __call__(self, image: ImageInput) -> Tensor:
        """Raises ConfigError or StorageError if the file of ``image`` cannot be read, DataError if it is none."""
        return torch.from_numpy(np.ascontiguousarray(self.pixels(image).transpose(2, 0, 1)))

    def pixels(self, image: ImageInput) -> Pixels:
        """The same as an array (size, size, 3)."""
        return self.view(_decoded(image))


def as_images(images: ImageInput | Iterable[ImageInput]) -> list[ImageInput]:
    """One or many images as a list; an array (n, height, width, 3) or tensor (n, 3, height, width) is n images."""
    many = not isinstance(images, (str, bytes, os.PathLike, Image.Image)) and isinstance(images, Iterable)
    if isinstance(images, (np.ndarray, Tensor)):
        many = images.ndim == 4
    return list(images) if many else [images]  # type: ignore[arg-type, list-item]


def as_texts(given: str | Iterable[str]) -> list[str]:
    """One or many texts as a list. Raises DataError if one is no ``str``."""
    texts: list[Any]
    if isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        texts = list(given)
    else:
        texts = [given]
    for text in texts:
        if not isinstance(text, str):
            raise DataError("is no text", value=type(text).__name__, remedy="Give a str or a list of them.")
    return texts


def _decoded(image: ImageInput) -> Image.Image | Pixels:
    if isinstance(image, (str, os.PathLike)):
        if os.path.isdir(image):
            raise ConfigError("a folder, not an image", str(image), remedy="Name its files, for example FOLDER/*.jpg.")
        try:
            return open_image(read_regular(image, SAMPLE_LIMIT))
        except OSError as error:
            raise read_error(error, "cannot be read", image) from error
        except (DecodeError, ValueError) as error:
            raise DataError("is no image that can be decoded", str(image)) from error
    if isinstance(image, Image.Image):
        try:
            load(image)
        except DecodeError as error:
            where = getattr(image, "filename", "") or "a PIL image"
            raise DataError(f"is no image that can be decoded: {error}", where) from error
        return image
    if isinstance(image, Tensor):
        return _of_tensor(image)
    if not isinstance(image, np.ndarray):
        raise DataError("is no image", value=type(image).__name__, remedy=f"{_ACCEPTED}.")
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise _refused("an array", image.shape, str(image.dtype))
    return np.ascontiguousarray(image)


def _of_tensor(tensor: Tensor) -> Pixels:
    floats = tensor.is_floating_point()
    if tensor.ndim != 3 or tensor.shape[0] != 3 or not (floats or tensor.dtype == torch.uint8) or not tensor.numel():
        raise _refused("a tensor", tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    tensor = tensor.detach().cpu()
    if floats:
        low = tensor.min().item()
        high = tensor.max().item()
        if not (low >= 0 and high <= 1):
            remedy = f"{_ACCEPTED}, before any normalisation."
            raise DataError("is no image: a float tensor", value=f"values from {low:g} to {high:g}", remedy=remedy)
        tensor = (tensor.double() * 255).round().to(torch.uint8)
    return np.ascontiguousarray(tensor.permute(1, 2, 0).numpy())


def _refused(kind: str, shape: tuple[int, ...], dtype: str) -> DataError:
    return DataError(f"is no image: {kind} of shape {shape} and dtype {dtype}", remedy=f"{_ACCEPTED}.")
