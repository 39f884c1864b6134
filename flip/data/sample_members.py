"""What a sample's members say: its image, captions, numbers, label and file name."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flip.common import image_formats
from flip.data.decode import DecodeError, Pixels, decode
from flip.data.manifest.labels import parse_label
from flip.runs.errors import ConfigError

if TYPE_CHECKING:
    from flip.data.chunk_reader import Sample

_T = TypeVar("_T")

CaptionGroups = list[tuple[float, list[str]]]
"""Weight and texts of members with captions."""

TEXT_LIMIT = 4 << 20
"""Bytes of a member with captions: a longer text is cut, a larger JSON member is refused."""

FILE_FIELD = "file"
"""Field of the json member with the name of the image in the source that ``shards make`` packed."""
CAPTION_NOT_UTF8 = "caption is not UTF-8"
"""What ``verify`` and ``inspect`` count if ``captions_are_utf8`` is false."""


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
