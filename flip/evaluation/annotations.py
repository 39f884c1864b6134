"""Reads files that list images with labels or captions.

list        *.jsonl: {"image": PATH, "label": 3} or {"image": PATH, "captions": [...]}, one per line
Karpathy    dataset_*.json: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}
COCO        *.json: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
table       *.csv, *.txt: the header image,caption, then one caption per line, quoted or not (CLIP_benchmark)
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flip.evaluation.images import File
from flip.runs.errors import DataError
from flip.runs.files import read_regular

KARPATHY = {"test": ("test",), "train": ("train", "restval")}
HEAD = ["image", "caption"]
LIMIT = 512 << 20
"""Largest file that is read, bytes. COCO's captions of its training set have 91 MB."""
INVALID = (
    ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError, OSError, csv.Error,
)  # fmt: skip
"""Errors that an unreadable or malformed file causes."""


def read_annotations(file: Path, split: str) -> tuple[File, ...]:
    """The images of a split. Raises DataError."""
    readers: Mapping[str, Callable[[Path, str], Iterator[File]]] = {".jsonl": _lines, ".json": _json}
    try:
        files = tuple(readers.get(file.suffix, _table)(file, split))
        for caption in (caption for image in files for caption in image.captions):
            if not isinstance(caption, str):
                raise TypeError(f"a caption is no text: {caption!r}")
    except INVALID as error:
        remedy = "docs/evaluation.md lists the formats."
        raise DataError(f"is no list of images: {type(error).__name__} {error}", str(file), remedy=remedy) from error
    if not files:
        raise DataError(f"names no image of the split {split}", str(file))
    return files


def is_other_table(file: Path) -> bool:
    """Whether a CSV file is a table of something else: it lacks the columns image and caption."""
    if file.suffix != ".csv":
        return False
    try:
        with open(file, encoding="utf-8-sig", errors="replace") as lines:
            columns = {name.strip().strip('"') for name in lines.readline(LIMIT).split(",")}
    except OSError:  # whoever reads it reports that
        return False
    return not columns >= set(HEAD)


def _text(file: Path) -> str:
    # spreadsheets write a byte order mark
    return read_regular(file, LIMIT).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _lines(file: Path, split: str) -> Iterator[File]:
    for line in _text(file).split("\n"):  # splitlines would cut a caption at U+2028
        if line.strip():
            entry = json.loads(line)
            label, captions = entry.get("label"), entry.get("captions", [])
            if not isinstance(captions, list):
                raise TypeError(f"captions are no list: {captions!r}")
            yield File(_path(file, entry["image"]), None if label is None else int(label), tuple(captions))


def _json(file: Path, split: str) -> Iterator[File]:
    content = json.loads(_text(file))
    if "annotations" in content:  # COCO
        captions: dict[Any, list[str]] = {}
        for annotation in content["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for image in content["images"]:
            if image["id"] in captions:
                yield File(_path(file, image["file_name"]), None, tuple(captions[image["id"]]))
        return
    for image in content["images"]:
        if image["split"] in KARPATHY[split]:
            name = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
            yield File(_path(file, name), None, tuple(sentence["raw"] for sentence in image["sentences"]))


def _table(file: Path, split: str) -> Iterator[File]:
    captions: dict[str, list[str]] = {}
    text = _text(file)
    for name, caption in _quoted(text) or _plain(text):
        captions.setdefault(name, []).append(caption)
    for name, of_image in captions.items():
        yield File(_path(file, name), None, tuple(of_image))


def _quoted(text: str) -> list[tuple[str, str]]:
    """Rows of a table that quotes captions with commas; empty if this one does not."""
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    captions = []
    try:
        for row in rows:
            if None in row and list(row)[:2] == HEAD:
                return []
            captions.append((row["image"], row["caption"]))
    except csv.Error:
        if rows.fieldnames != HEAD:
            raise
        return []
    return captions


def _plain(text: str) -> Iterator[tuple[str, str]]:
    """Rows as CLIP_benchmark reads them: an image up to the first comma, then its caption, quotes included."""
    for line in text.split("\n")[1:]:
        if line.strip():
            name, comma, caption = line.strip().partition(",")
            if not comma:
                raise ValueError(f"a line without a comma: {line!r}")
            yield name, caption


def _path(file: Path, name: str) -> str:
    """The path of an image: relative to the file that lists it, or to the first subfolder that contains it."""
    if "://" in name or Path(name).is_absolute():
        return name
    paths = [folder / name for folder in _folders(file.parent)]
    return str(next((path for path in paths if path.is_file()), paths[0]))


@cache
def _folders(folder: Path) -> tuple[Path, ...]:
    """Folders that images may be in. COCO has a folder of annotations next to its folders of images."""
    more = sorted(folder.parent.glob("*/")) if folder.name == "annotations" else []
    return folder, *sorted(folder.glob("*/")), *more
