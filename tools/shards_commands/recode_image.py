"""Encodes one image for `shards recode`, and checks the result.

`recode_image` makes a smaller JPEG of an image that training can read, or says why it must stay. `markers_are_safe`
tells whether a reader may skip from one restart marker of a JPEG to the next. `view_psnr` compares two images as
training sees them.
"""

import io
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from flip.config.schema import Augment
from flip.data import augment, decode
from flip.data.decode import DecodeError, Pixels

SUBSAMPLING = "4:2:0"
MCU = 16
"""Side of a minimum coded unit in pixels, with 4:2:0. Of a grey image it is half of that."""
LONGEST_JPEG_SIDE = 65_500
"""Largest width or height that libjpeg writes."""
GROWTH = 1.15
"""An image whose bytes would grow by a larger factor stays as it is. Markers alone take 3 to 12 %."""
VIEW = 224
"""Side of the views that are compared, in pixels."""
IDENTICAL = 100.0
"""PSNR of equal views, dB."""
_CREDITS = (ExifTags.Base.Artist, ExifTags.Base.Copyright)
_DAMAGED_EXIF = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error,
)  # fmt: skip
_INTERVAL_OF_1 = b"\xff\xdd\x00\x04\x00\x01"
"""The segment DRI that announces a restart marker after each MCU."""


@dataclass(frozen=True)
class Recoding:
    """How images are encoded. ``short``: pixels of the shorter side, of images that are larger than that."""

    short: int
    quality: int
    markers: bool


class Unsuitable(Exception):
    """An image must stay as it is. The message is the reason."""


def recode_image(data: bytes | memoryview, recoding: Recoding) -> bytes:
    """The image as a JPEG that has been decoded again. Raises Unsuitable; DecodeError if training cannot read it."""
    image = _shrunk(_open(data), recoding.short)
    if max(image.size) > LONGEST_JPEG_SIDE:
        raise Unsuitable("a side is longer than JPEG allows")
    # "optimize" would save 5 % of the bytes, but decoders would build tables for each image: 0.1 ms in the kernel.
    options: dict[str, Any] = {"exif": _exif(data), "quality": recoding.quality, "optimize": False}
    if recoding.markers:
        options["restart_marker_blocks"] = 1
    if image.mode == "RGB":
        options["subsampling"] = SUBSAMPLING
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", **options)
    except (OSError, ValueError) as error:
        raise Unsuitable(f"cannot be encoded: {error}") from error
    encoded = buffer.getvalue()
    # A file that simplejpeg reads with a warning is replaced by its pixels, whatever their bytes: readers that skip
    # from marker to marker would not see the warning.
    if len(encoded) > GROWTH * len(data) and markers_are_safe(data):
        raise Unsuitable("would take more bytes")
    if not _is_intact(encoded, image, recoding):
        raise Unsuitable("its encoded form does not pass the check")
    return encoded


def markers_are_safe(data: bytes | memoryview) -> bool:
    """Whether a reader may skip from one restart marker to the next and still refuse what simplejpeg refuses.

    True for files that are no JPEG or have no such markers, for those that simplejpeg reads without a warning, and for
    those that it never reads, intact or not: CMYK and rare samplings, such as 3x1. No reader skips in these.
    """
    data = bytes(data)
    if data[:3] != b"\xff\xd8\xff" or b"\xff\xdd" not in data:
        return True
    if not decode.is_for_simplejpeg(data):
        return True
    return _strictly_decoded(data) is not None


def view_psnr(source: bytes | memoryview, recoded: bytes | memoryview, id: int) -> float:
    """Peak signal-to-noise ratio between the views of a sample's image before and after, dB. Raises DecodeError."""
    settings = Augment()
    draws = augment.draw(settings, 0, np.zeros(1, dtype=np.int64), np.array([id], dtype=np.int64))
    before, after = (
        augment.view(decode.decode(data, "simplejpeg"), VIEW, settings, draws, 0).astype(np.float64)
        for data in (source, recoded)
    )
    error = float(np.mean((before - after) ** 2))
    if error == 0:
        return IDENTICAL
    return min(IDENTICAL, 10 * math.log10(255**2 / error))


def _open(data: bytes | memoryview) -> Image.Image:
    """The pixels as training reads them, grey ones as grey. Raises Unsuitable, DecodeError."""
    header = decode.header(data)
    if header["format"] not in ("JPEG", "MPO"):
        if header["mode"].startswith("I"):
            raise Unsuitable("more than 8 bits per colour")
        if decode.is_transparent(data):
            raise Unsuitable("transparent")
    pixels: Pixels = decode.decode(data, "simplejpeg")
    if header["mode"] == "L":
        return Image.fromarray(np.ascontiguousarray(pixels[..., 0]))
    return Image.fromarray(pixels)


def _shrunk(image: Image.Image, short: int) -> Image.Image:
    factor = short / min(image.size)
    if factor >= 1:
        return image
    width, height = (max(short, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _exif(data: bytes | memoryview) -> bytes:
    """EXIF data with the orientation, which ``data.exif: apply`` reads, and the names of artist and rights holder."""
    result = Image.Exif()
    try:
        with Image.open(io.BytesIO(data)) as image:
            exif = image.getexif()
            tags = [ExifTags.Base.Orientation, *_CREDITS]
            if image.format == "TIFF":  # the pixels are turned already
                tags = list(_CREDITS)
            result.update({tag: exif[tag] for tag in tags if tag in exif})
            if result:
                return result.tobytes()
            return b""
    except _DAMAGED_EXIF:  # training reads no orientation from it
        return b""


def _is_intact(encoded: bytes, image: Image.Image, recoding: Recoding) -> bool:
    """Whether the encoded image decodes without a warning to the right size, with all restart markers in place."""
    pixels = _strictly_decoded(encoded)
    if pixels is None or pixels.shape[:2] != (image.height, image.width):
        return False
    if not recoding.markers:
        return True
    side = MCU
    if image.mode == "L":
        side = MCU // 2
    units = math.ceil(image.width / side) * math.ceil(image.height / side)
    return _has_marker_per_unit(encoded, units)


def _strictly_decoded(data: bytes) -> Pixels | None:
    """The pixels of a JPEG; None if simplejpeg refuses it or reads it with a warning."""
    try:
        return decode.strict_jpeg(data)
    except DecodeError:
        return None


def _has_marker_per_unit(data: bytes, units: int) -> bool:
    """Whether the only scan of a JPEG has the restart markers 0 .. 7, 0 .. after all of its units but the last."""
    interval = data.find(_INTERVAL_OF_1)
    scan = data.find(b"\xff\xda", interval)
    if interval < 0 or scan < 0 or data[-2:] != b"\xff\xd9":
        return False
    start = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    entropy: NDArray[np.uint8] = np.frombuffer(data, np.uint8)[start:-2]
    markers = entropy[1:][entropy[:-1] == 0xFF]
    markers = markers[markers != 0]  # 0xff 0x00 is a byte of the data
    return len(markers) == units - 1 and bool((markers == 0xD0 + np.arange(units - 1) % 8).all())
