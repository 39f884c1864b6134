"""Encoded bytes -> RGB pixels, and pixels -> patches."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

Pixels = NDArray[np.uint8]
"""(height, width, 3), RGB."""

LIMIT = 1 << 26
"""Most pixels that an image may have; read from its header before anything is decompressed."""

STRIP = 1 << 20
"""Pixels that are converted to RGB at once, so that a conversion needs no second copy of a large picture. A decoder
needs at most 8 bytes per pixel (a picture of ``LIMIT`` pixels: 0.5 GiB), of WebP 17 (1.1 GiB)."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_WHITE = (255, 255, 255)
# What Pillow's decoders let out on damaged files.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class Undecodable(Exception):
    """These bytes are no picture that we can read, with the reason."""


class Header(NamedTuple):
    """``mode`` as Pillow names it: RGB, L, CMYK, P, I;16, ..."""

    format: str
    width: int
    height: int
    mode: str


def decode(data: bytes | memoryview, decoder: str = "pillow", conversion: str = "flatten") -> Pixels:
    """RGB pixels of an image file.

    ``decoder``: "pillow", or "simplejpeg" for sound JPEG files (CMYK, damaged ones and other formats go to Pillow).
    Both refuse the same files. EXIF's orientation is not followed; of an animation it is the first picture.
    ``conversion``: as ``to_rgb`` takes it. Raises Undecodable.
    """
    if decoder == "simplejpeg" and bytes(data[:3]) == b"\xff\xd8\xff":
        return _decode_jpeg(data, conversion)
    return _decode_pillow(data, conversion)


def open_image(data: bytes | memoryview) -> Image.Image:
    """The decoded image in its own mode (RGB, RGBA, L, I;16, P, ...). Raises Undecodable."""
    with _judged(data), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _limit_image(image)
        image.load()
        return image


def header(data: bytes | memoryview) -> Header:
    """What an image file says of itself, nothing unpacked. Raises Undecodable."""
    with _judged(data), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        return Header(image.format or "", *image.size, image.mode)


def patches(
    image: Pixels, patch: int, keep: NDArray[np.integer[Any]] | None = None, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Patches of a square image, (P, p*p*3) by row, column, channel inside a patch, or those of ``keep`` alone.

    ``out``: where to write them, the elements of a patch without a gap.
    """
    kind, places = _rows(image.shape[0] // patch, patch)
    places = places if keep is None else places.take(keep, axis=0)
    if out is None:
        out = np.empty((len(places), kind.itemsize * patch), np.uint8)
    # "clip", as numpy would look at each place first and copy twice; none lies outside.
    np.ascontiguousarray(image).reshape(-1).view(kind).take(places, out=out.view(kind), mode="clip")
    return out


@cache
def _rows(side: int, patch: int) -> tuple[np.dtype[np.void], NDArray[np.intp]]:
    """A row of a patch as one element, so that it is moved as it is and not byte by byte; and where in an image of
    ``side`` x ``side`` patches those of each patch lie, (P, p).
    """
    first = np.arange(side * side, dtype=np.intp)[:, None]
    return np.dtype(f"V{3 * patch}"), first // side * side * patch + first % side + side * np.arange(patch)


def _decode_jpeg(data: bytes | memoryview, conversion: str) -> Pixels:
    """By simplejpeg; what it refuses, or reads only with a warning, is Pillow's to judge: one verdict for both."""
    import simplejpeg

    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _limit(width, height)
        if space not in ("CMYK", "YCCK"):
            return simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        pass
    return _decode_pillow(data, conversion)


def _decode_pillow(data: bytes | memoryview, conversion: str) -> Pixels:
    with _judged(data), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _limit_image(image)
        if image.width * image.height <= STRIP:
            return np.asarray(_to_rgb(image, conversion))
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for top, strip in _strips(image):
            pixels[top : top + strip.height] = np.asarray(_to_rgb(strip, conversion))
        return pixels


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The first row of each strip of about ``STRIP`` pixels, and the strip."""
    image.load()
    height = max(1, STRIP // image.width)
    for top in range(0, image.height, height):
        yield top, image.crop((0, top, image.width, min(top + height, image.height)))


@contextmanager
def _judged(data: bytes | memoryview) -> Iterator[None]:
    """What Pillow raises inside is Undecodable."""
    try:
        yield
    except UnidentifiedImageError as error:  # its own words hold an address in memory: reasons must be the same again
        raise Undecodable(_unidentified(bytes(data[:256]))) from error
    except Image.DecompressionBombError as error:
        raise Undecodable(f"too many pixels, at most {LIMIT} are read") from error
    except (*_DAMAGE, OverflowError) as error:
        raise Undecodable(f"{type(error).__name__}: {error}") from error


def _unidentified(head: bytes) -> str:
    if not head:
        return "an empty file"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<head")):
        return "a web page, not an image"
    return f"not an image of a known format ({', '.join(_FORMATS)})"


def to_rgb(image: Image.Image, conversion: str = "flatten") -> Image.Image:
    """``image`` in RGB (``data.to_rgb``).

    ``flatten``: transparency is laid on white, 16-bit grey is scaled to 8 bits. ``convert``: Pillow's
    ``convert("RGB")``: the alpha channel is dropped, 16-bit values above 255 become 255.
    """
    if image.width * image.height <= STRIP or (image.mode == "RGB" and "transparency" not in image.info):
        return _to_rgb(image, conversion)
    whole = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        whole.paste(_to_rgb(strip, conversion), (0, top))
    return whole


def _to_rgb(image: Image.Image, conversion: str) -> Image.Image:
    if conversion == "convert":
        return image.convert("RGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, _WHITE)
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")


def _limit_image(image: Image.Image) -> None:
    """Raises Undecodable if an image has too many pixels. A tile of a TIFF file can be larger than the image."""
    _limit(*image.size)
    if isinstance(image, TiffImageFile):
        _limit(*(int(image.tag_v2.get(side, 1)) for side in (TILEWIDTH, TILELENGTH)))


def _limit(width: int, height: int) -> None:
    if width * height > LIMIT:
        raise Undecodable(f"{width} x {height} pixels, at most {LIMIT} are read")
