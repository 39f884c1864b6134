"""Files that name images with labels or captions, in the forms that people have.

list        *.jsonl: {"image": PATH, "label": 3} or {"image": PATH, "captions": [...]}, a line each
Karpathy    dataset_*.json: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}
COCO        *.json: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
table       *.csv, *.txt: image,caption under a head line, a caption a line, quoted or, as CLIP_benchmark's, not
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flip.evaluation.images import File
from flip.runs.errors import DataError
from flip.runs.ownership import read_regular

KARPATHY = {"test": ("test",), "train": ("train", "restval")}
HEAD = ["image", "caption"]
TEXT = "utf-8-sig"
"""UTF-8, with or without the mark that spreadsheets put in front."""


LIMIT = 512 << 20
"""Bytes of a list. COCO's captions of its training set have 91 MB."""


def read(file: Path, split: str) -> tuple[File, ...]:
    """The images of a split that it names. Raises DataError."""
    readers: Mapping[str, Callable[[Path, str], Iterator[File]]] = {".jsonl": _lines, ".json": _json}
    try:
        files = tuple(readers.get(file.suffix, _table)(file, split))
        for caption in (caption for one in files for caption in one.captions):
            if not isinstance(caption, str):
                raise TypeError(f"a caption is no text: {caption!r}")
    except (
        ValueError,
        OverflowError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OSError,
        csv.Error,
    ) as error:
        remedy = "docs/evaluation.md says which forms are read."
        raise DataError(f"is no list of images: {type(error).__name__} {error}", str(file), remedy=remedy) from error
    if not files:
        raise DataError(f"names no image of the split {split}", str(file))
    return files


def _text(file: Path) -> str:
    return read_regular(file, LIMIT).decode(TEXT).replace("\r\n", "\n").replace("\r", "\n")


def _lines(file: Path, split: str) -> Iterator[File]:
    for line in _text(file).split("\n"):  # splitlines would cut a caption at U+2028
        if line.strip():
            one = json.loads(line)
            label, captions = one.get("label"), one.get("captions", [])
            if not isinstance(captions, list):
                raise TypeError(f"captions are no list: {captions!r}")
            yield File(_path(file, one["image"]), None if label is None else int(label), tuple(captions))


def _json(file: Path, split: str) -> Iterator[File]:
    content = json.loads(_text(file))
    if "annotations" in content:
        yield from _coco(file, content)
        return
    for one in content["images"]:
        if one["split"] in KARPATHY[split]:
            name = f"{one['filepath']}/{one['filename']}" if one.get("filepath") else one["filename"]
            yield File(_path(file, name), None, tuple(sentence["raw"] for sentence in one["sentences"]))


def _coco(file: Path, content: Mapping[str, Any]) -> Iterator[File]:
    captions: dict[Any, list[str]] = {}
    for one in content["annotations"]:
        captions.setdefault(one["image_id"], []).append(one["caption"])
    for image in content["images"]:
        if image["id"] in captions:
            yield File(_path(file, image["file_name"]), None, tuple(captions[image["id"]]))


def _table(file: Path, split: str) -> Iterator[File]:
    captions: dict[str, list[str]] = {}
    text = _text(file)
    for name, caption in _quoted(text) or _plain(text):
        captions.setdefault(name, []).append(caption)
    for name, told in captions.items():
        yield File(_path(file, name), None, tuple(told))


def _quoted(text: str) -> list[tuple[str, str]]:
    """Rows of a table that quotes what holds commas; empty where this one does not."""
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    found = []
    try:
        for row in rows:
            if None in row and list(row)[:2] == HEAD:
                return []
            found.append((row["image"], row["caption"]))
    except csv.Error:
        if rows.fieldnames != HEAD:
            raise
        return []
    return found


def _plain(text: str) -> Iterator[tuple[str, str]]:
    """Rows as CLIP_benchmark reads them: up to the first comma an image, the rest is its caption, quotes and all."""
    for line in text.split("\n")[1:]:
        if line.strip():
            name, comma, caption = line.strip().partition(",")
            if not comma:
                raise ValueError(f"a line without a comma: {line!r}")
            yield name, caption


def _path(file: Path, name: str) -> str:
    """Of an image: beside the file that names it, or in the one folder of images there that has it."""
    if "://" in name or Path(name).is_absolute():
        return name
    beside = file.parent / name
    if beside.is_file():
        return str(beside)
    places = (folder / name for folder in _folders(file.parent))
    return str(next((place for place in places if place.is_file()), beside))


@cache
def _folders(beside: Path) -> tuple[Path, ...]:
    """Where images may lie; COCO's annotations have a folder of their own, beside those of its images."""
    more = sorted(beside.parent.glob("*/")) if beside.name == "annotations" else []
    return *sorted(beside.glob("*/")), *more
