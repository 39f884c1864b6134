"""Reads files that list images with labels or captions.

list        *.jsonl: {"image": PATH, "label": 3} or {"image": PATH, "captions": [...]}, one per line
Karpathy    dataset_*.json: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}
COCO        *.json: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
table       *.csv, *.txt: the header image,caption, then one caption per line, all quoted or none (CLIP_benchmark)
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flip.evaluation.datasets.image_sources import File
from flip.files.creation import read_regular
from flip.runs.errors import DataError

KARPATHY = {"test": ("test",), "train": ("train", "restval")}
HEAD = ["image", "caption"]
LIMIT = 512 << 20
"""Largest file that is read, bytes. COCO's captions of its training set have 91 MB."""
INVALID = (
    ValueError, OverflowError, KeyError, TypeError, AttributeError, RecursionError, OSError, csv.Error,
)  # fmt: skip
"""Errors that an unreadable or malformed file causes."""
_QUOTED = re.compile(r'\s*"(?:[^"]|"")*,(?:[^"]|"")*"\s*')
"""A caption that is quoted because it has a comma."""
_DELIMITERS = re.compile(r"[,;\t]")


def read_annotations(file: Path, split: str) -> tuple[File, ...]:
    """The images of a split. Raises DataError."""
    readers: Mapping[str, Callable[[Path, str], Iterator[File]]] = {".jsonl": _lines, ".json": _json}
    try:
        files = tuple(readers.get(file.suffix, _table)(file, split))
        for caption in (caption for image in files for caption in image.captions):
            if not isinstance(caption, str):
                raise TypeError(f"a caption is no text: {caption!r}")
    except UnicodeDecodeError as error:
        remedy = "Convert it, for example with iconv -f LATIN1 -t UTF-8."
        raise DataError("is not UTF-8", str(file), remedy=remedy) from error
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
            columns = _header(lines.readline(LIMIT))
    except OSError:  # whoever reads it reports that
        return False
    return not set(columns) >= set(HEAD)


def _header(line: str) -> list[str]:
    """The names of columns in the first line of a table, whatever separates them."""
    return [name.strip().strip('"') for name in _DELIMITERS.split(line)]


def _has_splits(file: Path) -> DataError:
    remedy = "Write the rows of each split to a file of its own, with the split in its name."
    return DataError(
        "names a split for each row, which is not read: all rows would be scored", str(file), remedy=remedy
    )


def _text(file: Path) -> str:
    # spreadsheets write a byte order mark
    return read_regular(file, LIMIT).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _lines(file: Path, split: str) -> Iterator[File]:
    for line in _text(file).split("\n"):  # splitlines would cut a caption at U+2028
        if line.strip():
            entry = json.loads(line)
            if "split" in entry:
                raise _has_splits(file)
            label = entry.get("label")
            captions = entry.get("captions", [])
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
            if image.get("filepath"):
                name = f"{image['filepath']}/{image['filename']}"
            else:
                name = image["filename"]
            yield File(_path(file, name), None, tuple(sentence["raw"] for sentence in image["sentences"]))


def _table(file: Path, split: str) -> Iterator[File]:
    captions: dict[str, list[str]] = {}
    text = _text(file)
    first = text.partition("\n")[0]
    if "split" in [name.lower() for name in _header(first)]:
        raise _has_splits(file)
    if "," not in first and set(_header(first)) >= set(HEAD):
        raise DataError("its columns are not separated by commas", str(file), first, "Save it with commas.")
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
    """Rows as CLIP_benchmark reads them: an image up to the first comma, then its caption, quotes included.

    Raises ValueError if some captions with commas are quoted and others are not: the quotes would become text.
    """
    quoted = 0
    plain = 0
    for number, line in enumerate(text.split("\n")[1:], 2):
        if line.strip():
            name, comma, caption = line.strip().partition(",")
            if not comma:
                raise ValueError(f"a line without a comma: {line!r}")
            if _QUOTED.fullmatch(caption):
                quoted = number
            elif "," in caption:
                plain = number
            if quoted and plain:
                raise ValueError(
                    f"line {quoted} quotes a caption with a comma, line {plain} does not: quote all of them"
                )
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
    more = []
    if folder.name == "annotations":
        more = sorted(folder.parent.glob("*/"))
    return folder, *sorted(folder.glob("*/")), *more
