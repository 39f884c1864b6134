"""The training view of a picture: crop, flip, affine map and colour, drawn by the counter hash.

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
"""Boxes tried before the central crop."""

_WHITE = (255, 255, 255)
_LUMA = (0.299, 0.587, 0.114)
_GREY = 127.5
"""Contrast turns about mid-grey, a constant, so that colour stays one matrix."""


class Draws(NamedTuple):
    """Uniform numbers of n samples: crop (n, 4 * TRIES): area, aspect, column, row; flip (n,); augment (n, 8)."""

    crop: NDArray[np.float64]
    flip: NDArray[np.float64]
    augment: NDArray[np.float64]
    """Rotation, shift right, shift down, zoom, brightness, contrast, saturation, grey."""

    @classmethod
    def of(cls, seed: int, visits: NDArray[np.int64], ids: NDArray[np.int64]) -> Draws:
        v, i = visits[:, None], ids[:, None]
        return cls(
            masking.draw(seed, v, i, masking.CROP, np.arange(4 * TRIES)),
            masking.draw(seed, visits, ids, masking.FLIP, 0),
            masking.draw(seed, v, i, masking.AUGMENT, np.arange(8)),
        )


def view(image: Pixels, size: int, augment: schema.Augment, draws: Draws, row: int, resize: str = "pillow") -> Pixels:
    """The (size, size, 3) training view by row ``row`` of the draws.

    ``resize``: "pillow" or "torchvision", both bicubic with antialiasing, for views without an affine map; with one,
    Pillow's bicubic transform after a reduction by whole factors.
    """
    height, width = image.shape[:2]
    box = crop_box(width, height, augment, draws.crop[row])
    mirrored = bool(draws.flip[row] < augment.flip)
    picture: Image.Image | Pixels
    if augment.rotate or augment.translate or augment.zoom:
        picture = _transform(image, box, size, mirrored, augment, draws.augment[row])
    else:
        left, top, right, bottom = box
        cut = image[top:bottom, left:right].copy()  # first: kernels must not see what lies outside
        picture = (_resize_torchvision if resize == "torchvision" else _resize_pillow)(cut, size, mirrored)
    matrix = colour_matrix(augment, draws.augment[row])
    if matrix is not None:
        picture = (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).convert("RGB", matrix)
    return np.asarray(picture)


def crop_box(width: int, height: int, augment: schema.Augment, draws: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): the first of ten boxes of random area and log-uniform aspect that fits the picture.

    Else the largest central box whose aspect lies in the range. Draws: (4 * TRIES,).
    """
    low, high = augment.crop_aspect
    for one in draws.reshape(TRIES, 4):  # the first one fits as a rule
        area, aspect, column, row = one.tolist()
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
    """Coefficients (a, b, c, d, e, f) that take a point (x, y) of the view to the picture: (ax+by+c, dx+ey+f).

    In the view's unit square about its centre: mirror, turn, zoom, shift; then onto the crop box.
    """
    angle = math.radians((2 * draws[0] - 1) * augment.rotate)
    right, down = (2 * draws[1] - 1) * augment.translate, (2 * draws[2] - 1) * augment.translate
    scale = (1 + augment.zoom) ** (1 - 2 * draws[3]) / size
    width, height = box[2] - box[0], box[3] - box[1]
    cos, sin, way = math.cos(angle) * scale, math.sin(angle) * scale, -1 if mirrored else 1
    a, b, d, e = way * cos * width, sin * width, -way * sin * height, cos * height
    half = size / 2
    c = (box[0] + box[2]) / 2 + right * width - half * (a + b)
    f = (box[1] + box[3]) / 2 + down * height - half * (d + e)
    return a, b, c, d, e, f


def colour_matrix(augment: schema.Augment, draws: NDArray[np.float64]) -> tuple[float, ...] | None:
    """Twelve numbers, row by row, of the map RGB -> RGB, or None where colour is off."""
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


def _transform(
    image: Pixels,
    box: tuple[int, int, int, int],
    size: int,
    mirrored: bool,
    augment: schema.Augment,
    draws: NDArray[np.float64],
) -> Image.Image:
    a, b, c, d, e, f = affine(box, size, mirrored, augment, draws)
    picture = Image.fromarray(image)
    # The transform samples points: what it would skip is averaged first.
    factor = max(1, int(min(math.hypot(a, d), math.hypot(b, e))))
    if factor > 1:
        picture = picture.reduce(factor)
        a, b, c, d, e, f = (value / factor for value in (a, b, c, d, e, f))
    return picture.transform(
        (size, size), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC, fillcolor=_WHITE
    )


def _resize_pillow(image: Pixels, size: int, mirrored: bool) -> Image.Image:
    picture = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture


def _resize_torchvision(image: Pixels, size: int, mirrored: bool) -> Pixels:
    """What torchvision's ``resize`` does, without its way there: that takes as long as a fifth of the resizing."""
    import torch
    from torch.nn.functional import interpolate

    # A view, channels last: the kernel's own order. Numpy turns it in half the time.
    pixels = torch.from_numpy(image.reshape(1, *image.shape).transpose(0, 3, 1, 2))
    if image.shape[:2] != (size, size):
        pixels = interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
    if mirrored:
        pixels = pixels.flip(3)
    return np.ascontiguousarray(pixels.numpy()[0].transpose(1, 2, 0))
