"""The view of an image in evaluation and inference: a square RGB image, without augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from flip.config.schema import Config
from flip.data.decode import PILLOW, Pixels, converted, to_rgb, upright


@dataclass(frozen=True)
class EvaluationView:
    """Makes the (size, size, 3) view of an image, as ``evaluate.preprocess``, ``data.to_rgb`` and ``data.exif`` define
    it.

    Args:
        size: side of the view, pixels.
        preprocess: ``crop_resize`` resizes the central square over the short side, whose edges may lie between pixels.
            ``resize_crop`` resizes the short side to ``size``, then crops at whole pixels, as open_clip, timm and
            torchvision do: the crop's corner is the nearest pixel. ``resize_crop_floor`` rounds it down and converts
            the image to RGB first, as transformers does.
        conversion: ``flatten`` converts the image to RGB before the resize (``flip.data.decode.to_rgb``).
            ``convert`` resizes it in its own mode, then converts it, as open_clip does.
        exif: ``apply`` turns a PIL image upright first.
    """

    size: int
    preprocess: str = "crop_resize"
    conversion: str = "flatten"
    exif: str = "ignore"

    @classmethod
    def of(cls, config: Config) -> EvaluationView:
        """The view that a run evaluates with."""
        return cls(config.model.image.size, config.evaluate.preprocess, config.data.to_rgb, config.data.exif)

    @property
    def label(self) -> str:
        """Names the view in results and in the keys of cached features; values of the defaults are left out."""
        changed = [name for name in (self.preprocess, self.conversion) if name not in ("crop_resize", "flatten")]
        return "-".join([f"{self.size}px", *changed, *(["exif"] if self.exif == "apply" else [])])

    def __call__(self, image: Pixels | Image.Image) -> Pixels:
        """The view of an image. Raises DecodeError if Pillow cannot convert or resize its mode."""
        if isinstance(image, Image.Image):
            pil_image = image
        else:
            pil_image = Image.fromarray(image)
        if self.exif == "apply":
            pil_image = upright(pil_image)
        if self.conversion == "flatten" or self.preprocess == "resize_crop_floor":
            pil_image = to_rgb(pil_image, self.conversion)
        if self.preprocess == "crop_resize":
            crop = self._crop_resize
        else:
            crop = self._resize_crop
        return np.asarray(converted(crop(pil_image), "RGB"))

    def _crop_resize(self, pil_image: Image.Image) -> Image.Image:
        width, height = pil_image.size
        side = min(height, width)
        left = (width - side) / 2
        top = (height - side) / 2
        box = (left, top, left + side, top + side)
        with PILLOW:
            return pil_image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)

    def _resize_crop(self, pil_image: Image.Image) -> Image.Image:
        """As torchvision's Resize and CenterCrop: rounds the long side down, and the corner to the nearest, or down."""
        short = min(pil_image.size)
        width, height = (int(self.size * side / short) for side in pil_image.size)
        if pil_image.size != (width, height):
            with PILLOW:
                pil_image = pil_image.resize((width, height), Image.Resampling.BICUBIC)
        corner = math.floor if self.preprocess == "resize_crop_floor" else round
        left = corner((width - self.size) / 2)
        top = corner((height - self.size) / 2)
        return pil_image.crop((left, top, left + self.size, top + self.size))
