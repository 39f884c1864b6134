"""The training view of an image: random crop, flip, affine map and colour.

Crop, flip, affine map and resize are one resampling; brightness, contrast, saturation and grey are one 3 x 4 matrix.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flip.config import schema
from flip.data import masking
from flip.data.decode import Pixels

TRIES = 10
"""Random boxes tried before the central crop."""

_WHITE = (255, 255, 255)
_LUMA = (0.299, 0.587, 0.114)
_GREY = 127.5
"""Contrast is relative to mid-grey, a constant, so that colour stays one matrix."""


class Draws(NamedTuple):
    """Uniform numbers of n samples: crop (n, 4 * TRIES): area, aspect, column, row; flip (n,); augment (n, 8)."""

    crop: NDArray[np.float64]
    flip: NDArray[np.float64]
    augment: NDArray[np.float64]
    """Rotation, shift right, shift down, zoom, brightness, contrast, saturation, grey."""

    @classmethod
    def of(cls, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> Draws:
        return cls(
            masking.draw(seed, epochs[:, None], ids[:, None], masking.CROP, np.arange(4 * TRIES)),
            masking.draw(seed, epochs, ids, masking.FLIP, 0),
            masking.draw(seed, epochs[:, None], ids[:, None], masking.AUGMENT, np.arange(8)),
        )


def view(image: Pixels, size: int, augment: schema.Augment, draws: Draws, row: int, resize: str = "pillow") -> Pixels:
    """The (size, size, 3) training view for row ``row`` of the draws.

    ``resize``: "pillow" or "torchvision", both bicubic with antialiasing. A view with an affine map uses Pillow's
    bicubic transform after a reduction by an integer factor.
    """
    height, width = image.shape[:2]
    box = crop_box(width, height, augment, draws.crop[row])
    mirrored = bool(draws.flip[row] < augment.flip)
    picture: Image.Image | Pixels
    if augment.rotate or augment.translate or augment.zoom:
        picture = _transform(image, affine(box, size, mirrored, augment, draws.augment[row]), size)
    else:
        left, top, right, bottom = box
        cut = image[top:bottom, left:right].copy()  # before the resize, whose kernel must not see pixels outside
        picture = (_resize_torchvision if resize == "torchvision" else _resize_pillow)(cut, size, mirrored)
    matrix = colour_matrix(augment, draws.augment[row])
    if matrix is not None:
        picture = (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).convert("RGB", matrix)
    return np.asarray(picture)


def crop_box(width: int, height: int, augment: schema.Augment, draws: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the first box, of ``TRIES`` with random area and log-uniform aspect, that fits.

    If none fits, the largest central box with an aspect in the range. Draws: (4 * TRIES,).
    """
    low, high = augment.crop_aspect
    for values in draws.reshape(TRIES, 4):  # not all at once: usually the first box fits
        area, aspect, column, row = values.tolist()
        target = width * height * (augment.crop_area[0] + area * (augment.crop_area[1] - augment.crop_area[0]))
        ratio = low * (high / low) ** aspect
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(column * (width - w + 1)), int(row * (height - h + 1))
            return left, top, left + w, top + h
    w, h = max(1, min(width, round(height * high))), max(1, min(height, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def affine(
    box: tuple[int, int, int, int], size: int, mirrored: bool, augment: schema.Augment, draws: NDArray[np.float64]
) -> tuple[float, float, float, float, float, float]:
    """Coefficients (a, b, c, d, e, f) that map a point (x, y) of the view to the image: (ax+by+c, dx+ey+f).

    In the view's unit square about its centre: mirror, rotate, zoom, shift; then onto the crop box.
    """
    angle = math.radians((2 * draws[0] - 1) * augment.rotate)
    right, down = (2 * draws[1] - 1) * augment.translate, (2 * draws[2] - 1) * augment.translate
    scale = (1 + augment.zoom) ** (1 - 2 * draws[3]) / size
    width, height = box[2] - box[0], box[3] - box[1]
    cos, sin, sign = math.cos(angle) * scale, math.sin(angle) * scale, -1 if mirrored else 1
    a, b, d, e = sign * cos * width, sin * width, -sign * sin * height, cos * height
    half = size / 2
    c = (box[0] + box[2]) / 2 + right * width - half * (a + b)
    f = (box[1] + box[3]) / 2 + down * height - half * (d + e)
    return a, b, c, d, e, f


def colour_matrix(augment: schema.Augment, draws: NDArray[np.float64]) -> tuple[float, ...] | None:
    """Twelve numbers, row by row, of the map RGB -> RGB; None if colour augmentation is off."""
    limits = augment.brightness, augment.contrast, augment.saturation
    if not any(limits) and not augment.grey:
        return None
    brightness, contrast, saturation = (
        1 + (2 * u - 1) * x for u, x in zip(draws[4:7].tolist(), limits, strict=True)
    )  # fmt: skip
    if draws[7] < augment.grey:
        saturation = 0.0
    gain, offset = brightness * contrast, (1 - contrast) * _GREY
    red, green, blue = (gain * (1 - saturation) * luma for luma in _LUMA)
    own = gain * saturation
    return (
        red + own, green, blue, offset,
        red, green + own, blue, offset,
        red, green, blue + own, offset,
    )  # fmt: skip


def _transform(image: Pixels, coefficients: tuple[float, ...], size: int) -> Image.Image:
    a, b, _, d, e, _ = coefficients
    picture = Image.fromarray(image)
    # The transform samples points; average first the pixels that it would skip.
    factor = max(1, int(min(math.hypot(a, d), math.hypot(b, e))))
    if factor > 1:
        picture, coefficients = picture.reduce(factor), tuple(value / factor for value in coefficients)
    return picture.transform(
        (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=_WHITE
    )


def _resize_pillow(image: Pixels, size: int, mirrored: bool) -> Image.Image:
    picture = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture


def _resize_torchvision(image: Pixels, size: int, mirrored: bool) -> Pixels:
    """The same as torchvision's ``resize``, without its overhead of a fifth of the time."""
    import torch
    from torch.nn.functional import interpolate

    # Channels last, the kernel's own order, as a view; NumPy transposes back in half of torch's time.
    pixels = torch.from_numpy(image.reshape(1, *image.shape).transpose(0, 3, 1, 2))
    if image.shape[:2] != (size, size):
        pixels = interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    if mirrored:
        pixels = pixels.flip(3)
    return np.ascontiguousarray(pixels.numpy()[0].transpose(1, 2, 0))
