"""From the members of a sample to pixels, patches, captions and labels."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from flip.data.manifest import tar
from flip.runs.errors import ConfigError

if TYPE_CHECKING:
    from flip.data.chunk_reader import Sample

_T = TypeVar("_T")

Pixels = NDArray[np.uint8]
"""(height, width, 3), RGB."""

LIMIT = 1 << 26
"""Most pixels that an image may have; read from its header before anything is decompressed."""

STRIP = 1 << 20
"""Pixels that are converted to RGB at once, so that a conversion needs no second copy of a large picture. A decoder
needs at most 8 bytes per pixel (a picture of ``LIMIT`` pixels: 0.5 GiB), of WebP 17 (1.1 GiB)."""

TEXT_LIMIT = 4 << 20
"""Bytes of a member with captions: of a text the first ones are read, a larger JSON member is refused."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_WHITE = (255, 255, 255)
# What Pillow's decoders let out on damaged files.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)


class DecodeError(Exception):
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
    ``conversion``: as ``to_rgb`` takes it. Raises DecodeError.
    """
    if decoder == "simplejpeg" and bytes(data[:3]) == b"\xff\xd8\xff":
        return _decode_jpeg(data, conversion)
    return _decode_pillow(data, conversion)


def open_image(data: bytes | memoryview) -> Image.Image:
    """The decoded image in its own mode (RGB, RGBA, L, I;16, P, ...). Raises DecodeError."""
    with _judged(data), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _limit_image(image)
        image.load()
        return image


def header(data: bytes | memoryview) -> Header:
    """What an image file says of itself, nothing unpacked. Raises DecodeError."""
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
    """What Pillow raises inside is DecodeError."""
    try:
        yield
    except UnidentifiedImageError as error:  # its own words hold an address in memory: reasons must be the same again
        raise DecodeError(_unidentified(bytes(data[:256]))) from error
    except Image.DecompressionBombError as error:
        raise DecodeError(f"too many pixels, at most {LIMIT} are read") from error
    except (*_DAMAGE, OverflowError) as error:
        raise DecodeError(f"{type(error).__name__}: {error}") from error


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
    """Raises DecodeError if an image has too many pixels. A tile of a TIFF file can be larger than the image."""
    _limit(*image.size)
    if isinstance(image, TiffImageFile):
        _limit(*(int(image.tag_v2.get(side, 1)) for side in (TILEWIDTH, TILELENGTH)))


def _limit(width: int, height: int) -> None:
    if width * height > LIMIT:
        raise DecodeError(f"{width} x {height} pixels, at most {LIMIT} are read")


def image_of(sample: Sample, decoder: str, conversion: str = "flatten") -> Pixels:
    """RGB pixels of a sample's image member. Raises DecodeError."""
    return decode(encoded_image(sample), decoder, conversion)


def encoded_image(sample: Sample) -> memoryview:
    """A sample's image member as it is stored. Raises DecodeError if there is none."""
    for extension in tar.EXTENSIONS:
        if extension in sample:
            return sample[extension]
    raise DecodeError(f"no image among its members {sorted(sample)}")


def captions_of(sample: Sample, members: Sequence[str]) -> list[str]:
    """The captions of a sample, in the order of ``members`` (``data.captions``).

    ``txt``: each line of that member is a caption. ``json:FIELD``: a string, or a list of strings, at the top level of
    that JSON member. Members and fields that a sample lacks are skipped; without any text there is one empty caption.
    Raises DecodeError where none of them is there, or a JSON member cannot be used.
    """
    found = [texts for name in members if (texts := _texts(sample, name)) is not None]
    if not found:
        raise DecodeError(f"no caption {list(members)} among its members {sorted(sample)}")
    return [text for texts in found for text in texts if text] or [""]


def json_fields(sample: Sample) -> list[str]:
    """The fields of JSON members that could be captions, as ``data.captions`` names them; likely names first."""
    found = list[str]()
    for member in filter(_is_json, sample):
        with contextlib.suppress(DecodeError):
            found += [f"{member}:{field}" for field, value in _parsed(sample, member).items() if _strings(value)]
    return sorted(found, key=lambda name: not any(word in name.lower() for word in ("caption", "text")))


def refuse_whole_json(members: Sequence[str], key: str, fields: Iterable[str] = ()) -> None:
    """ConfigError where one of ``members`` is a JSON member without a field: its source text is not a caption.

    ``key``: the option or field that names them. ``fields``: those that the data have (``json_fields``), for the
    remedy; they are read only then.
    """
    for name in members:
        member, _, field = name.partition(":")
        if _is_json(member) and not field:
            known = list(dict.fromkeys(fields))
            remedy = f"Name the field that holds captions, as {known[0] if known else f'{member}:caption'}."
            remedy += f" Fields with text in the data: {', '.join(known)}." if known else ""
            raise ConfigError(f"{key}: {member} is a whole JSON file, not a caption", value=name, remedy=remedy)


def _texts(sample: Sample, name: str) -> list[str] | None:
    """The texts that one entry of ``data.captions`` names; None where the sample has no such member or field."""
    member, _, field = name.partition(":")
    if not (field and _is_json(member)):
        # Lines end with a line feed alone: ``str.splitlines`` would also cut at U+2028 and others.
        if name not in sample:
            return None
        lines = bytes(sample[name][:TEXT_LIMIT]).decode("utf-8", "replace").split("\n")
        return [line.strip() for line in lines]
    value = _parsed(sample, member).get(field) if member in sample else None
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not _strings(texts):
        raise DecodeError(f"{field!r} in its {member} is neither text nor a list of texts")
    return [" ".join(text.split()) for text in texts]


def _is_json(member: str) -> bool:
    return member.rpartition(".")[2] == "json"


def _strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _parsed(sample: Sample, member: str) -> dict[str, Any]:
    """The top level of a JSON member, empty where it is not an object. Raises DecodeError."""
    if len(sample[member]) > TEXT_LIMIT:
        raise DecodeError(f"its {member} has {len(sample[member]):,} bytes, at most {TEXT_LIMIT:,} are read")
    try:
        found = json.loads(bytes(sample[member]).decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"its {member} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def label_of(sample: Sample, member: str = "cls") -> int:
    """The number of a sample's class. Raises DecodeError."""
    try:
        label = int(bytes(sample[member]))
        if 0 <= label < 1 << 31:
            return label
    except KeyError:
        raise DecodeError(f"no label {member!r} among its members {sorted(sample)}") from None
    except ValueError:
        pass
    raise DecodeError(f"the label {bytes(sample[member])[:40]!r} is not a whole number from 0 on")


def next_decodable(
    ids: Sequence[int] | NDArray[np.int64], n: int, bad: dict[int, str], load: Callable[[int], _T]
) -> tuple[int, _T] | None:
    """(m, load(id)) of the first index m of ``ids`` from n on, cyclic, whose sample can be used; None if there is none.

    ``bad``: reasons of unusable samples by id; samples for which ``load`` raises DecodeError are added.
    """
    for m in chain(range(n, len(ids)), range(n)):
        id = int(ids[m])
        if id not in bad:
            try:
                return m, load(id)
            except DecodeError as error:
                bad[id] = str(error)
    return None
