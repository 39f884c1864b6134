"""From the members of a sample to pixels, patches, captions and labels."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from flip.common import image_formats
from flip.data.manifest.labels import parse_label
from flip.runs.errors import ConfigError, FlipError

if TYPE_CHECKING:
    from flip.data.chunk_reader import Sample
    from flip.data.manifest.manifest import Manifest

_T = TypeVar("_T")

Pixels = NDArray[np.uint8]
CaptionGroups = list[tuple[float, list[str]]]
"""Weight and texts of members with captions."""
"""(height, width, 3), RGB."""

LIMIT = 1 << 26
"""Maximum number of pixels of an image, checked by its header before anything is decompressed."""
LONGEST_SIDE = 1 << 24
"""Maximum width or height: for a row of more than 2^31 bits Pillow raises MemoryError, which would stop the worker."""

STRIP = 1 << 20
"""Pixels converted to RGB at once, so that conversion needs no second copy of a large image. A decoder needs at most 8
bytes per pixel (for ``LIMIT`` pixels 0.5 GiB), for WebP 17 (1.1 GiB)."""

TEXT_LIMIT = 4 << 20
"""Bytes of a member with captions: a longer text is cut, a larger JSON member is refused."""

FILE_FIELD = "file"
"""Field of the json member with the name of the image in the source that ``shards make`` packed."""
CAPTION_NOT_UTF8 = "caption is not UTF-8"
"""What ``verify`` and ``inspect`` count if ``captions_are_utf8`` is false."""

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


def image_of(
    sample: Sample, decoder: str, conversion: str = "flatten", exif: str = "ignore",
    fallbacks: Counter[str] | None = None,
) -> Pixels:  # fmt: skip
    """RGB pixels (height, width, 3) uint8 of a sample's image member. Raises DecodeError.

    ``fallbacks``: as for ``decode``.
    """
    return decode(encoded_image(sample), decoder, conversion, exif, fallbacks)


def encoded_image(sample: Sample) -> memoryview:
    """The encoded image of a sample. Raises DecodeError if it has none."""
    for extension in image_formats.EXTENSIONS:
        if extension in sample:
            return sample[extension]
    raise DecodeError(f"no image among its members {sorted(sample)}")


def captions_of(sample: Sample, members: Sequence[str]) -> list[str]:
    """The captions of a sample, in the order of ``members`` (``data.captions``).

    ``txt``: each line of that member is a caption. ``json:FIELD``: a string, or a list of strings, at the top level of
    that JSON member. Missing members and fields are skipped; if all texts are empty, there is one empty caption.
    Raises DecodeError if none of them exists, or a JSON member cannot be used.
    """
    captions = [texts for name in members if (texts := _texts(sample, name)) is not None]
    if not captions:
        raise DecodeError(f"no caption {list(members)} among its members {sorted(sample)}")
    return [text for texts in captions for text in texts if text] or [""]


def caption_groups(sample: Sample, members: Sequence[str], weights: Sequence[float]) -> CaptionGroups:
    """The captions of a sample for ``choose_caption``: (weight, texts) of each of ``members`` that has any.

    Without weights, all in one group; without ``members``, an empty caption. Raises as ``captions_of``.
    """
    if not members:
        return [(1.0, [""])]
    if not weights:
        return [(1.0, captions_of(sample, members))]
    found = [(weight, _texts(sample, name)) for name, weight in zip(members, weights, strict=True)]
    if all(texts is None for _, texts in found):
        raise DecodeError(f"no caption {list(members)} among its members {sorted(sample)}")
    groups = [(weight, [text for text in texts or () if text]) for weight, texts in found]
    return [(weight, texts) for weight, texts in groups if texts] or [(1.0, [""])]


def choose_caption(groups: CaptionGroups, weights: Sequence[float], first: float, second: float) -> str:
    """The caption that two draws, uniform in [0, 1), choose. ``weights``: ``data.caption_weights``.

    Without weights, ``first`` chooses of all; with weights, ``first`` chooses a group, and ``second`` one of its texts.
    """
    if not weights:
        texts = groups[0][1]
        return texts[int(first * len(texts))]
    sums = list(accumulate(weight for weight, _ in groups))
    texts = groups[next(i for i, total in enumerate(sums) if total > first * sums[-1])][1]
    return texts[int(second * len(texts))]


def fields_of(sample: Sample, names: Sequence[str]) -> list[float]:
    """The numbers in these fields at the top level of a sample's ``json`` member (``data.fields``).

    Raises DecodeError if one is missing, or is no finite number.
    """
    if not names:
        return []
    if "json" not in sample:
        raise DecodeError(f"no json with the fields {list(names)} among its members {sorted(sample)}")
    content = _parse(sample, "json")
    return [_number(content, name) for name in names]


def _number(content: dict[str, Any], name: str) -> float:
    """A field of a JSON object as a number. Raises DecodeError."""
    if name not in content:
        raise DecodeError(f"no field {name!r} in its json")
    value = content[name]
    if type(value) in (int, float):
        with contextlib.suppress(OverflowError):  # a whole number above 1e308
            if math.isfinite(value):
                return float(value)
    raise DecodeError(f"field {name!r} in its json is no finite number: {str(value)[:40]!r}")


def captions_are_utf8(sample: Sample, members: Sequence[str]) -> bool:
    """Whether all captions can be read without replacement characters, with which training reads others."""
    for name in members:
        member, _, field = name.partition(":")
        if member in sample and not _is_utf8(sample[member], field if _is_json(member) else ""):
            return False
    return True


def _is_utf8(data: memoryview, field: str) -> bool:
    """Whether a member, or a field of a JSON member, is UTF-8."""
    try:
        if field:
            content = json.loads(bytes(data[: TEXT_LIMIT + 1]).decode("utf-8", "surrogateescape"))
            text = None
            if isinstance(content, dict):
                text = content.get(field)
            json.dumps(text, ensure_ascii=False).encode()
        else:
            decoder = codecs.getincrementaldecoder("utf-8")()
            decoder.decode(bytes(data[:TEXT_LIMIT]), final=len(data) <= TEXT_LIMIT)
    except UnicodeError:
        return False
    except (ValueError, RecursionError):  # no JSON: ``captions_of`` reports that
        return True
    return True


def file_name(sample: Sample) -> str:
    """The name of an image in the source that ``shards make`` packed; empty if it is not recorded."""
    name = None
    with contextlib.suppress(DecodeError):
        if "json" in sample:
            name = _parse(sample, "json").get(FILE_FIELD)
    if isinstance(name, str):
        return name
    return ""


def json_fields(sample: Sample) -> list[str]:
    """The fields of JSON members with text, as ``data.captions`` names them; likely captions first."""
    names = list[str]()
    for member in filter(_is_json, sample):
        with contextlib.suppress(DecodeError):
            names += [f"{member}:{field}" for field, value in _parse(sample, member).items() if _is_text(value)]
    return sorted(names, key=lambda name: not any(word in name.lower() for word in ("caption", "text")))


def refuse_json_members(members: Sequence[str], key: str, fields: Iterable[str] = ()) -> None:
    """Raise ConfigError if one of ``members`` is a JSON member without a field.

    ``key``: the option that names them. ``fields``: fields of the data (``json_fields``) for the remedy, read lazily.
    """
    for name in members:
        member, _, field = name.partition(":")
        if _is_json(member) and not field:
            known = list(dict.fromkeys(fields))
            remedy = f"Name the field that holds captions, as {known[0] if known else f'{member}:caption'}."
            if known:
                remedy += f" Fields with text in the data: {', '.join(known)}."
            raise ConfigError(f"{key}: {member} is a whole JSON file, not a caption", value=name, remedy=remedy)


def _texts(sample: Sample, name: str) -> list[str] | None:
    """The texts of one entry of ``data.captions``; None if the sample has no such member or field."""
    member, _, field = name.partition(":")
    if field == "whole" and not _is_json(member):
        if member not in sample:
            return None
        return [" ".join(bytes(sample[member][:TEXT_LIMIT]).decode("utf-8", "replace").split())]
    if not (field and _is_json(member)):
        # Only line feeds end lines: ``str.splitlines`` would also split at U+2028 and others.
        if name not in sample:
            return None
        lines = bytes(sample[name][:TEXT_LIMIT]).decode("utf-8", "replace").split("\n")
        return [line.strip() for line in lines]
    value = None
    if member in sample:
        value = _parse(sample, member).get(field)
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not _is_text(texts):
        raise DecodeError(f"{field!r} in its {member} is neither text nor a list of texts")
    return [" ".join(text.split()) for text in texts]


def _is_json(member: str) -> bool:
    return member.rpartition(".")[2] == "json"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def _parse(sample: Sample, member: str) -> dict[str, Any]:
    """The top level of a JSON member; empty if it is not an object. Raises DecodeError."""
    if len(sample[member]) > TEXT_LIMIT:
        raise DecodeError(f"its {member} has {len(sample[member]):,} bytes, at most {TEXT_LIMIT:,} are read")
    try:
        content = json.loads(bytes(sample[member]).decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"its {member} is not JSON: {error}") from error
    if isinstance(content, dict):
        return content
    return {}


def label_of(sample: Sample, member: str = "cls") -> int:
    """The class label of a sample. Raises DecodeError."""
    if member not in sample:
        raise DecodeError(f"no label {member!r} among its members {sorted(sample)}")
    label = parse_label(bytes(sample[member]))
    if label is None:
        raise DecodeError(f"the label {bytes(sample[member])[:40]!r} is not a whole number from 0 on")
    return label


def next_decodable(
    ids: Sequence[int] | NDArray[np.int64], places: Iterable[int], bad: dict[int, str], load: Callable[[int], _T]
) -> tuple[int, _T] | None:
    """(m, load(id)) of the first of ``places`` in ``ids`` whose sample can be used; None if there is none.

    ``bad``: reasons of unusable samples by id; samples for which ``load`` raises DecodeError are added.
    """
    for m in places:
        id = int(ids[m])
        if id not in bad:
            try:
                return m, load(id)
            except DecodeError as error:
                bad[id] = str(error)
    return None
