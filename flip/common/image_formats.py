"""The image formats that are read. A row of ``FORMATS`` is all that a further format needs, if Pillow reads it."""

import os
from typing import NamedTuple


class ImageFormat(NamedTuple):
    """``name``: in messages and counts. ``member``: the name of a sample's member that this toolkit writes."""

    name: str
    pillow: tuple[str, ...]
    """Pillow's names: the one that opens it, and those that an opened image may have."""
    member: str
    extensions: tuple[str, ...]
    """Of files, and of members of shards, in lower case."""
    starts: tuple[bytes, ...]
    """First bytes of a file."""


_WEBP = ImageFormat("WebP", ("WEBP",), "webp", ("webp",), (b"RIFF",))
FORMATS = (
    ImageFormat("JPEG", ("JPEG", "MPO"), "jpg", ("jpg", "jpeg"), (b"\xff\xd8\xff",)),  # MPO: further images at its end
    ImageFormat("PNG", ("PNG",), "png", ("png",), (b"\x89PNG",)),
    _WEBP,
    ImageFormat("GIF", ("GIF",), "gif", ("gif",), (b"GIF8",)),
    ImageFormat("BMP", ("BMP",), "bmp", ("bmp",), (b"BM",)),
    ImageFormat("TIFF", ("TIFF",), "tiff", ("tif", "tiff"), (b"II*\0", b"MM\0*")),
    ImageFormat("PPM", ("PPM",), "ppm", ("ppm",), (b"P5", b"P6")),
)
NAMES = ", ".join(form.name for form in FORMATS)
"""For messages."""
EXTENSIONS = tuple(extension for form in FORMATS for extension in form.extensions)
"""Members that can be the image of a sample, in order of preference."""
PILLOW = tuple(form.pillow[0] for form in FORMATS)
"""The formats that Pillow may open."""
_BY_PILLOW = {name: form for form in FORMATS for name in form.pillow}


def is_image_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file has the extension of an image."""
    return os.path.splitext(name)[1][1:].lower() in EXTENSIONS


def by_start(data: bytes | memoryview) -> ImageFormat | None:
    """The format of a file by its first bytes; None if it is not known."""
    head = bytes(data[:12])
    for form in FORMATS:
        if head.startswith(form.starts) and (form is not _WEBP or head[8:] == b"WEBP"):
            return form
    return None


def by_pillow(name: str) -> ImageFormat:
    """The format of an image that Pillow has opened, one of ``PILLOW``, by the name that the image has."""
    return _BY_PILLOW[name]
