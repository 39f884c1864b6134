"""Checks that training can read an image of `shards make`, and states what training must know about it."""

import struct
from typing import NamedTuple

from flip.common import image_formats
from flip.data import decode

DECODE = "decode"
HEADER = "header"
CHECKS = (DECODE, HEADER)
"""``--check``: decode each image, or read only its header."""
_JPEG = b"\xff\xd8\xff"
_EXIF_MARKER = 0xE1
_START_OF_SCAN = 0xDA


class ImageFacts(NamedTuple):
    """``transparent``: a part of the image is not opaque; for a header, it has an alpha channel."""

    extension: str
    transparent: bool
    turned: bool


def image_facts(image: bytes, check: str) -> ImageFacts:
    """The facts of an encoded image. Raises DecodeError if training cannot read it, as far as ``check`` looks."""
    if image[:3] == _JPEG and decode.jpeg_is_readable(image, pixels=check == DECODE):
        return ImageFacts("jpg", False, _may_be_turned(image) and decode.is_turned(image))
    if check == DECODE:
        decode.decode(image)
        transparent = decode.is_transparent(image)
        form = decode.header(image)["format"]
    else:
        form, transparent = decode.check_header(image)
    return ImageFacts(image_formats.by_pillow(form).member, transparent, decode.is_turned(image))


def _may_be_turned(image: bytes) -> bool:
    """Whether a JPEG file has a segment that can hold an orientation (EXIF or XMP), or an unusual header."""
    at = 2
    while at + 4 <= len(image):
        mark, kind, length = struct.unpack_from(">BBH", image, at)
        if mark != 0xFF or kind == _EXIF_MARKER:
            return True
        if kind == _START_OF_SCAN:
            return False
        at += 2 + length
    return True
