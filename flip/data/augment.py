"""The training view of an image: random crop, flip, affine map and colour.

The steps of ``AUGMENTATIONS`` describe the view before it is computed: crop, flip, affine map and resize are one
resampling; brightness, contrast, saturation and grey are one 3 x 4 matrix. A new step is a class here and a row of the
table; it changes the view's pixels (``View.changes``), or what is computed. Its fields are in ``Augment``,
flip/config/schema.py, and each is 0 by default. ``augment.steps`` names classes in files of a user, which follow.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flip.common import user_classes
from flip.config import schema
from flip.data import masking
from flip.data.decode import Pixels
from flip.runs.errors import ConfigError

TRIES = 10
"""Random boxes tried before the central crop."""

USER_PURPOSES = 100
"""The lowest purpose number of a user's class."""

_WHITE = (255, 255, 255)
_LUMA = (0.299, 0.587, 0.114)
_GREY = 127.5
"""Contrast is relative to mid-grey, a constant, so that colour stays one matrix."""


Draws = Mapping[str, NDArray[np.float64]]
"""Uniform numbers of n samples: name of a step in use -> (n, ``count``)."""


@dataclass
class View:
    """The training view of one image, as the steps describe it before it is computed."""

    width: int
    height: int
    """Of the image, pixels."""
    size: int
    """Side of the view, pixels."""
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    """(left, top, right, bottom) of the crop."""
    is_mirrored: bool = False
    affine: tuple[float, ...] | None = None
    """Map of a point of the view to the image, if it is more than crop and mirror."""
    colour: tuple[float, ...] | None = None
    """Twelve numbers of the map RGB -> RGB."""
    changes: list[Callable[[Pixels], Pixels]] = field(default_factory=list)
    """Functions of the (size, size, 3) view, applied last and in order; they may not write to their argument."""


class AugmentationStep(ABC):
    """One step of the augmentation. Its draws are ``key(seed, epoch, id, purpose, i)``, i from ``first`` on."""

    purpose: int
    """Purpose number of its draws (docs/contracts.md, Randomness). A new step gets a new one; a user's class one from
    ``USER_PURPOSES`` on."""
    first: int = 0
    count: int
    """Draws per sample."""
    fields: tuple[str, ...] = ()
    """Its fields of ``augment``; all 0: the step is off, which must be the default. A user's class has none."""
    probability: str = ""
    """The field with the probability that it is applied to an image, by draw 0; "": always."""
    changes_pixels: bool = True
    """Whether it sets ``View.affine`` or appends to ``View.changes``. The visible-patch kernel cannot compute such
    views, and plans count them. ``describe`` refuses a step that does so and declares False."""

    def is_used(self, augment: schema.Augment) -> bool:
        """Whether any of its fields is set."""
        return any(getattr(augment, field) for field in self.fields)

    @abstractmethod
    def apply(self, view: View, augment: schema.Augment, draws: NDArray[np.float64]) -> None:
        """Change what ``view`` describes. ``draws``: (count,), uniform in [0, 1)."""


class Crop(AugmentationStep):
    """A random box of the image: area uniform in ``crop_area``, aspect log-uniform in ``crop_aspect``."""

    changes_pixels = False
    purpose = masking.CROP
    count = 4 * TRIES
    fields = ("crop_area", "crop_aspect")

    def apply(self, view: View, augment: schema.Augment, draws: NDArray[np.float64]) -> None:
        view.box = crop_box(view.width, view.height, augment, draws)


class Flip(AugmentationStep):
    """A horizontal flip with probability ``flip``."""

    changes_pixels = False
    purpose = masking.FLIP
    count = 1
    fields = ("flip",)
    probability = "flip"

    def apply(self, view: View, augment: schema.Augment, draws: NDArray[np.float64]) -> None:
        view.is_mirrored = True


class AffineMap(AugmentationStep):
    """Rotation, shift right, shift down and zoom of the crop, as one resampling."""

    changes_pixels = True
    purpose = masking.AUGMENT
    count = 4
    fields = ("rotate", "translate", "zoom")

    def apply(self, view: View, augment: schema.Augment, draws: NDArray[np.float64]) -> None:
        view.affine = affine(view.box, view.size, view.is_mirrored, augment, draws)


class Colour(AugmentationStep):
    """Brightness, contrast, saturation and grey, as one matrix."""

    changes_pixels = False  # the kernel's patches can be mapped afterwards
    purpose = masking.AUGMENT
    first = 4
    count = 4
    fields = ("brightness", "contrast", "saturation", "grey")

    def apply(self, view: View, augment: schema.Augment, draws: NDArray[np.float64]) -> None:
        view.colour = colour_matrix(augment, draws)


#: Name of a step -> step, in the order in which they are applied.
AUGMENTATIONS: dict[str, AugmentationStep] = {
    "crop": Crop(),
    "flip": Flip(),
    "affine": AffineMap(),
    "colour": Colour(),
}


def draw(augment: schema.Augment, seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> Draws:
    """The draws of the steps in use, in the order in which they are applied, for n samples.

    ``epochs`` and ``ids``: (n,). Of each step (n, count), uniform in [0, 1).
    """
    draws = {}
    used = [name for name, step in AUGMENTATIONS.items() if step.is_used(augment)]
    for name in [*used, *augment.steps]:
        step = step_kind(name)
        numbers = np.arange(step.first, step.first + step.count)
        draws[name] = masking.draw(seed, epochs[:, None], ids[:, None], step.purpose, numbers)
    return draws


def step_kind(name: str) -> AugmentationStep:
    """The step of a name, or of a member of ``augment.steps``. Executes a user's file."""
    return user_classes.named(name, AUGMENTATIONS, AugmentationStep)  # type: ignore[type-abstract]


def declared(name: str) -> AugmentationStep:
    """As ``step_kind``, of a user's class its constants alone: for plans."""
    return user_classes.declared(name, AUGMENTATIONS, AugmentationStep, "affine")  # type: ignore[type-abstract]


def view(image: Pixels, size: int, augment: schema.Augment, draws: Draws, row: int, resize: str = "pillow") -> Pixels:
    """The (size, size, 3) training view for row ``row`` of the draws.

    ``resize``: "pillow" or "torchvision", both bicubic with antialiasing. A view with an affine map uses Pillow's
    bicubic transform after a reduction by an integer factor.
    """
    described = describe(image.shape[1], image.shape[0], size, augment, draws, row)
    resized = geometry(image, described, resize)
    if described.colour is not None:
        if not isinstance(resized, Image.Image):
            resized = Image.fromarray(resized)
        resized = resized.convert("RGB", described.colour)
    pixels = np.asarray(resized)
    for change in described.changes:
        pixels = change(pixels)
    return pixels


def describe(width: int, height: int, size: int, augment: schema.Augment, draws: Draws, row: int) -> View:
    """The training view of an image of ``width`` x ``height`` pixels for row ``row`` of the draws, not yet computed.

    Raises ConfigError if a step changes pixels and declares that it does not.
    """
    described = View(width, height, size)
    for name, rows in draws.items():
        step = step_kind(name)
        drawn = rows[row]
        if not step.probability or drawn[0] < getattr(augment, step.probability):
            before = described.affine, len(described.changes)
            step.apply(described, augment, drawn)
            if not step.changes_pixels and before != (described.affine, len(described.changes)):
                what = f"the augmentation step {name} declares changes_pixels = False and changes them"
                raise ConfigError(what, type(step).__name__, remedy="Set changes_pixels = True in its class.")
    return described


def unchanged_share(augment: schema.Augment) -> float:
    """The expected share of views whose pixels no step changes beyond crop, mirror and colour matrix."""
    share = 1.0
    for step in changing_steps(augment).values():
        if not step.probability:
            return 0.0
        share *= 1 - float(getattr(augment, step.probability))
    return share


def changing_steps(augment: schema.Augment) -> dict[str, AugmentationStep]:
    """Name -> step of the steps in use that change pixels."""
    used = {name: step for name, step in AUGMENTATIONS.items() if step.is_used(augment)}
    used |= {name: declared(name) for name in augment.steps}
    return {name: step for name, step in used.items() if step.changes_pixels}


def geometry(image: Pixels, view: View, resize: str) -> Image.Image | Pixels:
    """Crop, mirror, resize or affine map: (height, width, 3) -> (view.size, view.size, 3)."""
    if view.affine is not None:
        return _transform(image, view.affine, view.size)
    left, top, right, bottom = view.box
    cut = image[top:bottom, left:right].copy()  # before the resize, whose kernel must not see pixels outside
    if resize == "torchvision":
        return _resize_torchvision(cut, view.size, view.is_mirrored)
    return _resize_pillow(cut, view.size, view.is_mirrored)


def crop_box(width: int, height: int, augment: schema.Augment, draws: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the first box, of ``TRIES`` with random area and log-uniform aspect, that fits.

    If none fits, the largest central box with an aspect in the range. Draws: (4 * TRIES,).
    """
    low, high = augment.crop_aspect
    for values in draws.reshape(TRIES, 4):  # not all at once: usually the first box fits
        area, aspect, column, row = values.tolist()
        target = width * height * (augment.crop_area[0] + area * (augment.crop_area[1] - augment.crop_area[0]))
        ratio = low * (high / low) ** aspect
        w = round(math.sqrt(target * ratio))
        h = round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(column * (width - w + 1))
            top = int(row * (height - h + 1))
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * high)))
    h = max(1, min(height, round(width / low)))
    left = (width - w) // 2
    top = (height - h) // 2
    return left, top, left + w, top + h


def affine(
    box: tuple[int, int, int, int], size: int, mirrored: bool, augment: schema.Augment, draws: NDArray[np.float64]
) -> tuple[float, float, float, float, float, float]:
    """Coefficients (a, b, c, d, e, f) that map a point (x, y) of the view to the image: (ax+by+c, dx+ey+f).

    In the view's unit square about its centre: mirror, rotate, zoom, shift; then onto the crop box.
    """
    angle = math.radians((2 * draws[0] - 1) * augment.rotate)
    right = (2 * draws[1] - 1) * augment.translate
    down = (2 * draws[2] - 1) * augment.translate
    scale = (1 + augment.zoom) ** (1 - 2 * draws[3]) / size
    width = box[2] - box[0]
    height = box[3] - box[1]
    cos = math.cos(angle) * scale
    sin = math.sin(angle) * scale
    sign = -1 if mirrored else 1
    a = sign * cos * width
    b = sin * width
    d = -sign * sin * height
    e = cos * height
    half = size / 2
    c = (box[0] + box[2]) / 2 + right * width - half * (a + b)
    f = (box[1] + box[3]) / 2 + down * height - half * (d + e)
    return a, b, c, d, e, f


def colour_matrix(augment: schema.Augment, draws: NDArray[np.float64]) -> tuple[float, ...]:
    """Twelve numbers, row by row, of the map RGB -> RGB. Draws: (4,)."""
    limits = augment.brightness, augment.contrast, augment.saturation
    brightness, contrast, saturation = (
        1 + (2 * u - 1) * x for u, x in zip(draws[:3].tolist(), limits, strict=True)
    )  # fmt: skip
    if draws[3] < augment.grey:
        saturation = 0.0
    gain = brightness * contrast
    offset = (1 - contrast) * _GREY
    red, green, blue = (gain * (1 - saturation) * luma for luma in _LUMA)
    own = gain * saturation
    return (
        red + own, green, blue, offset,
        red, green + own, blue, offset,
        red, green, blue + own, offset,
    )  # fmt: skip


def _transform(image: Pixels, coefficients: tuple[float, ...], size: int) -> Image.Image:
    a, b, _, d, e, _ = coefficients
    pil_image = Image.fromarray(image)
    # The transform samples points; average first the pixels that it would skip.
    factor = max(1, int(min(math.hypot(a, d), math.hypot(b, e))))
    if factor > 1:
        pil_image = pil_image.reduce(factor)
        coefficients = tuple(value / factor for value in coefficients)
    return pil_image.transform(
        (size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=_WHITE
    )


def _resize_pillow(image: Pixels, size: int, mirrored: bool) -> Image.Image:
    pil_image = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    if mirrored:
        return pil_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return pil_image


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
