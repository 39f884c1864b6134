"""From the bytes of an image file to pixels and patches."""

from __future__ import annotations

import contextlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from flip.common import image_formats
from flip.runs.errors import FlipError

if TYPE_CHECKING:
    from flip.data.manifest.manifest import Manifest

_T = TypeVar("_T")

Pixels = NDArray[np.uint8]
"""(height, width, 3), RGB."""

LIMIT = 1 << 26
"""Maximum number of pixels of an image, checked by its header before anything is decompressed."""
LONGEST_SIDE = 1 << 24
"""Maximum width or height: for a row of more than 2^31 bits Pillow raises MemoryError, which would stop the worker."""

STRIP = 1 << 20
"""Pixels converted to RGB at once, so that conversion needs no second copy of a large image. A decoder needs at most 8
bytes per pixel (for ``LIMIT`` pixels 0.5 GiB), for WebP 17 (1.1 GiB)."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF orientation -> the operation that turns the image upright (EXIF 2.32, tag 0x0112)."""

_WHITE = (255, 255, 255)
_JPEG = b"\xff\xd8\xff"
_INKS = ("CMYK", "YCCK")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class DecodeError(Exception):
    """A sample, or one of its members, cannot be decoded."""


class DecoderError(DecodeError):
    """A third-party decoder raised an error for an image. ``kind``: the decoder and the class of the error."""

    def __init__(self, decoder: str, error: Exception) -> None:
        name = type(error).__name__
        self.kind = f"{decoder} {name}"
        if isinstance(error, Image.DecompressionBombError):
            reason = f"too many pixels, at most {LIMIT} are read"
        else:
            reason = _ADDRESS.sub("", f"{name}: {error}")  # reasons must be reproducible
        super().__init__(reason)


class ThirdPartyDecoder:
    """Context of each call of a third-party decoder: turns what it raises into DecoderError.

    The bytes of an image were read and have the right CRC, so that any error of a decoder is about this image, and the
    next decoder decides. The class of the error is not limited: simplejpeg raises KeyError for a sampling that its
    table lacks, Pillow's plugins raise a dozen classes for damaged files. So nothing but calls of a decoder may be in
    the context: errors of our own code keep their class, and so does MemoryError, which is not about the image.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, MemoryError):
            raise DecoderError(self._name, error) from error


PILLOW = ThirdPartyDecoder("pillow")
"""For Pillow's operations on images of files, which can fail for rare modes."""
_SIMPLEJPEG = ThirdPartyDecoder("simplejpeg")


class noting_place:  # noqa: N801  # used as a function
    """Context of the work on a sample: an unexpected error keeps its class, and gets a note with the sample's place.

    DecodeError and FlipError pass as they are: callers add the place to the first, the second names it.
    """

    def __init__(self, place: Callable[[], str]) -> None:
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, (DecodeError, FlipError)):
            error.add_note(self._place())


def place_of(manifest: Manifest, id: int) -> str:
    """The shard and the position of a sample, for a message."""
    shard, ordinal = manifest.locate(id)
    return f"{shard}, sample {ordinal}"


def decode(
    data: bytes | memoryview, decoder: str = "pillow", conversion: str = "flatten", exif: str = "ignore",
    fallbacks: Counter[str] | None = None,
) -> Pixels:  # fmt: skip
    """RGB pixels (height, width, 3) uint8 of an image file; of an animation its first image. Raises DecodeError.

    ``decoder``: "pillow", or "simplejpeg" for intact JPEG files. Pillow decodes CMYK files, other formats, and files
    for which simplejpeg raises an error, so that both refuse the same files. ``conversion``: as for ``to_rgb``.
    ``exif``: ``data.exif``. ``fallbacks``: counts JPEG files that simplejpeg did not decode, by the decoder and the
    class of its error.
    """
    if decoder == "simplejpeg" and bytes(data[:3]) == _JPEG:
        try:
            pixels = strict_jpeg(data)
        except DecoderError as error:  # refused, or read with a warning: Pillow decides
            reason = error.kind
        else:
            if pixels is not None and exif == "apply":
                return _turned_jpeg(pixels, data)
            if pixels is not None:
                return pixels
            reason = "simplejpeg CMYK"
        if fallbacks is not None:
            fallbacks[reason] += 1
    return _by_pillow(data, conversion, exif)


def is_for_simplejpeg(data: bytes | memoryview) -> bool:
    """Whether simplejpeg accepts the header of a JPEG file: its colours and its sampling, not yet its pixels."""
    import simplejpeg

    try:
        with _SIMPLEJPEG:
            space = simplejpeg.decode_jpeg_header(data)[2]
    except DecoderError:
        return False
    return space not in _INKS


def strict_jpeg(data: bytes | memoryview) -> Pixels | None:
    """The RGB pixels of a JPEG file by simplejpeg; None for CMYK, which it converts otherwise than Pillow.

    Raises DecoderError if simplejpeg refuses the file or reads it with a warning, DecodeError for too many pixels.
    """
    import simplejpeg

    with _SIMPLEJPEG:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    if space in _INKS:
        return None
    _limit(width, height)
    with _SIMPLEJPEG:
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB")
    return pixels


def jpeg_is_readable(data: bytes | memoryview, pixels: bool = True) -> bool:
    """Whether simplejpeg reads a JPEG file without an error; if not, Pillow decides. CMYK files are Pillow's.

    ``pixels``: decode all data, at an eighth of the size, which raises the same errors as the full size at a third of
    its time; False: only the header. Raises DecodeError for too many pixels.
    """
    import simplejpeg

    try:
        with _SIMPLEJPEG:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _limit(width, height)
        if pixels and space not in _INKS:
            # Of lossless JPEG the decoder writes the full size, although simplejpeg allocates an eighth.
            room = np.empty(height * width * 3, np.uint8)
            with _SIMPLEJPEG:
                simplejpeg.decode_jpeg(data, "RGB", min_height=1, min_width=1, min_factor=8, buffer=room)
    except DecoderError:
        return False
    return space not in _INKS


def _by_pillow(data: bytes | memoryview, conversion: str, exif: str) -> Pixels:
    with _opened(data) as image:
        _limit_image(image)
        if image.width * image.height <= STRIP:
            pixels = _array(_to_rgb(image, conversion))
        else:
            with PILLOW:
                image.load()  # turns a TIFF file
            pixels = np.empty((image.height, image.width, 3), np.uint8)
            for top, strip in _strips(image):
                pixels[top : top + strip.height] = _array(_to_rgb(strip, conversion))
        if exif == "apply":
            return _turned(pixels, _orientation(image))
        return pixels


def _turned_jpeg(pixels: Pixels, data: bytes | memoryview) -> Pixels:
    """The pixels of a JPEG file, turned as its EXIF orientation says, if it can be read."""
    try:
        with _opened(data, ("JPEG",)) as image:
            orientation = _orientation(image)
    except DecodeError:
        return pixels
    return _turned(pixels, orientation)


def upright(image: Image.Image) -> Image.Image:
    """A decoded image, turned as its EXIF orientation says (``data.exif: apply``)."""
    turn = _TURNS.get(_orientation(image))
    if turn is None:
        return image
    return image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 2 to 8; 1 if none can be read. Pillow applies that of TIFF files itself."""
    with contextlib.suppress(DecoderError), PILLOW:
        value = image.getexif().get(ExifTags.Base.Orientation)
        if value in _TURNS:
            return int(value)
    return 1


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """As ``upright``, without Pillow's copies."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    rows = orientation in (3, 4, 7, 8)
    columns = orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if rows else 1, :: -1 if columns else 1])


def open_image(data: bytes | memoryview) -> Image.Image:
    """The decoded image in its own mode (RGB, RGBA, L, I;16, P, ...). Raises DecodeError."""
    with _opened(data) as image:
        _limit_image(image)
        load(image)
        return image


def load(image: Image.Image) -> None:
    """Decode an image that Pillow has opened. Raises DecodeError."""
    with PILLOW:
        image.load()


def converted(image: Image.Image, mode: str, matrix: tuple[float, ...] | None = None) -> Image.Image:
    """Pillow's ``convert``. Raises DecodeError: for some modes there is no conversion."""
    with PILLOW:
        return image.convert(mode, matrix)


def header(data: bytes | memoryview) -> dict[str, Any]:
    """Format, width, height and Pillow's mode, from the header of an image file. Raises DecodeError."""
    with _opened(data) as image:
        return {"format": image.format or "", "width": image.width, "height": image.height, "mode": image.mode}


def check_header(data: bytes | memoryview) -> tuple[str, bool]:
    """Format, and whether the image has an alpha channel, without decoding. Raises DecodeError, also for too many
    pixels."""
    with _opened(data) as image:
        _limit_image(image)
        return image.format or "", _has_alpha(image)


def format_name(data: bytes | memoryview) -> str:
    """The format of a file by its first bytes, for counts: "PNG", or "not a known format"."""
    form = image_formats.by_start(data)
    if form is None:
        return "not a known format"
    return form.name


def is_transparent(data: bytes | memoryview) -> bool:
    """Whether a part of an image is not opaque (``data.to_rgb``). Raises DecodeError."""
    if bytes(data[:3]) == _JPEG:  # JPEG has no transparency
        return False
    image = open_image(data)
    if not _has_alpha(image):
        return False
    return any(_array(converted(strip, "RGBA").getchannel("A")).min() < 255 for _, strip in _strips(image))


def is_turned(data: bytes | memoryview) -> bool:
    """Whether ``data.exif: apply`` turns an image. Raises DecodeError."""
    with _opened(data) as image:
        return not isinstance(image, TiffImageFile) and _orientation(image) != 1


def _has_alpha(image: Image.Image) -> bool:
    return "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa")


def patches(
    image: Pixels, patch: int, keep: NDArray[np.integer[Any]] | None = None, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Patches of a square image, or those of ``keep``: (P, p*p*3) by row, column and channel, in ``out``."""
    dtype, rows = _patch_rows(image.shape[0] // patch, patch)
    rows = rows if keep is None else rows.take(keep, axis=0)
    if out is None:
        out = np.empty((len(rows), dtype.itemsize * patch), np.uint8)
    # "clip" avoids NumPy's check of each index and a second copy; all are in range.
    np.ascontiguousarray(image).reshape(-1).view(dtype).take(rows, out=out.view(dtype), mode="clip")
    return out


@cache
def _patch_rows(side: int, patch: int) -> tuple[np.dtype[np.void], NDArray[np.intp]]:
    """A dtype for one row of a patch, and the indices (P, p) of the rows in an image of ``side`` x ``side`` patches."""
    first = np.arange(side * side, dtype=np.intp)[:, None]
    return np.dtype(f"V{3 * patch}"), first // side * side * patch + first % side + side * np.arange(patch)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(first row, strip) of strips of about ``STRIP`` pixels."""
    load(image)
    height = max(1, STRIP // image.width)
    for top in range(0, image.height, height):
        with PILLOW:
            strip = image.crop((0, top, image.width, min(top + height, image.height)))
        yield top, strip


@contextmanager
def _opened(data: bytes | memoryview, formats: tuple[str, ...] = image_formats.PILLOW) -> Iterator[Image.Image]:
    """The image of a file, not yet decoded. Raises DecodeError."""
    try:
        with PILLOW:
            image = Image.open(io.BytesIO(data), formats=formats)
    except DecoderError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise DecodeError(_why_unidentified(bytes(data[:256]))) from error
        raise
    with image:
        yield image


def _array(image: Image.Image) -> NDArray[Any]:
    """The pixels of an image, which are decoded now if they were not."""
    with PILLOW:
        return np.asarray(image)


def _why_unidentified(head: bytes) -> str:
    if not head:
        return "an empty file"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<head")):
        return "a web page, not an image"
    return f"not an image of a known format ({image_formats.NAMES})"


def to_rgb(image: Image.Image, conversion: str = "flatten") -> Image.Image:
    """``image`` in RGB (``data.to_rgb``).

    ``flatten`` composites transparency on white and scales 16-bit grey to 8 bits. ``convert`` is Pillow's
    ``convert("RGB")``: drops the alpha channel, clips 16-bit values at 255. Raises DecodeError.
    """
    if image.width * image.height <= STRIP or (image.mode == "RGB" and "transparency" not in image.info):
        return _to_rgb(image, conversion)
    converted = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        converted.paste(_to_rgb(strip, conversion), (0, top))
    return converted


def _to_rgb(image: Image.Image, conversion: str) -> Image.Image:
    if conversion == "convert":
        return converted(image, "RGB")
    if image.mode == "RGB" and "transparency" not in image.info:
        load(image)
        return image
    if image.mode.startswith("I"):  # 16-bit grey: Pillow clips instead of scaling
        image = Image.fromarray((_array(image) >> 8).clip(0, 255).astype(np.uint8))
    if _has_alpha(image):
        image = converted(image, "RGBA")
        background = Image.new("RGB", image.size, _WHITE)
        background.paste(image, mask=image.getchannel("A"))
        return background
    return converted(image, "RGB")


def _limit_image(image: Image.Image) -> None:
    """Raises DecodeError if an image has too many pixels. A tile of a TIFF file can be larger than the image."""
    _limit(*image.size)
    if isinstance(image, TiffImageFile):
        with PILLOW:
            width, height = (int(image.tag_v2.get(side, 1)) for side in (TILEWIDTH, TILELENGTH))
        _limit(width, height)


def _limit(width: int, height: int) -> None:
    if width * height > LIMIT or max(width, height) > LONGEST_SIDE:
        raise DecodeError(f"{width} x {height} pixels, at most {LIMIT} are read, {LONGEST_SIDE} in a row")
