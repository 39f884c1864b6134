"""The forms in which data sets lie on disk or in object storage, and how each becomes images in a fixed order.

    manifest    a folder with manifest.json (tools/shards.py index)
    shards      SPLIT/*.tar, as CLIP_benchmark's wds_* sets, or *.tar; local or s3://
    folder      SPLIT/CLASS/*.jpg, or CLASS/*.jpg: class c is the c-th folder by name
    list        *.jsonl: {"image": PATH, "label": 3} or {"image": PATH, "captions": [...]}, a line each
    Karpathy    dataset_*.json: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}
    COCO        *.json: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    table       *.csv, *.txt: image,caption under a head line, a caption a line

What lies there says which form it is. All is decided once, by rank 0: the result is plain data for the others.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flip.config.resolve import cache_root
from flip.data.decode import EXTENSIONS
from flip.data.images import File, Files, Images, Shards
from flip.data.index import index
from flip.data.manifest import MARK
from flip.data.reader import Reader
from flip.data.retry import Patience
from flip.data.storage import is_remote
from flip.exitcodes import ConfigError, DataError

SPLITS = {"test": ("test", "val", "validation"), "train": ("train", "training")}
"""Names that a split's folder goes by."""
KARPATHY = {"test": ("test",), "train": ("train", "restval")}


@dataclass(frozen=True)
class Place:
    """Where the images of one split are: the folder of a manifest, or single files."""

    where: str
    manifest: str = ""
    files: tuple[File, ...] = ()

    def open(self, patience: Patience | None = None) -> Images:
        if self.manifest:
            return Shards(self.manifest, patience)
        return Files(self.files, str(_folder(Path(self.where))), self.where, patience)


def find(path: str, split: str = "test") -> Place | None:
    """The split of the data set at ``path``; None where nothing of any form lies there. Shards without a manifest are
    indexed into the cache, which reads them once. Raises ConfigError, DataError, StorageError, PermissionDenied.
    """
    if is_remote(path):
        return _shards([f"{path.rstrip('/')}/{name}/" for name in SPLITS[split]] + [path.rstrip("/") + "/"])
    place = Path(path).expanduser().absolute()
    if place.is_file():
        return _annotated(place, split)
    folders = [place / name for name in SPLITS[split]] + ([place] if split == "test" else [])
    for folder in folders:
        if (folder / MARK).is_file():
            return Place(str(folder), manifest=str(folder))
    found = _shards([f"{folder}/" for folder in folders])
    if found is not None:
        return found
    for pattern in ("*.jsonl", "dataset*.json", "captions*.json", "*karpathy*", "*.csv"):
        for file in sorted(place.glob(pattern)):
            if _of_split(file, split):
                return _annotated(file, split)
    return next((found for folder in folders if (found := _classes(folder)) is not None), None)


def _of_split(file: Path, split: str) -> bool:
    """A file that names another split alone is not meant."""
    others = [word for other, words in SPLITS.items() if other != split for word in words]
    return file.name.startswith("dataset_") or not any(word in file.stem.lower() for word in others)


def _shards(prefixes: list[str]) -> Place | None:
    """Of the first prefix below which there are tars."""
    reader = Reader()
    for prefix in prefixes:
        if not is_remote(prefix) and not Path(prefix).is_dir():
            continue
        listed = {key: stat for key, stat in reader.list(prefix).items() if key.endswith(".tar")}
        if listed:
            text = json.dumps([[key, *stat] for key, stat in listed.items()])
            made = cache_root() / "manifests" / hashlib.sha256(text.encode()).hexdigest()[:32]
            if not (made / MARK).is_file():
                index(list(listed), made)
            return Place(prefix, manifest=str(made))
    return None


def _classes(folder: Path) -> Place | None:
    """A folder of folders of images."""
    if not folder.is_dir():
        return None
    files: list[File] = []
    folders = sorted(one for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
    if folders and all(one.name.isascii() and one.name.isdigit() for one in folders):
        folders.sort(key=lambda one: int(one.name))  # 0, 1, ..., 10: they are numbers of classes
    for label, one in enumerate(folders):
        images = sorted(path for path in one.rglob("*") if path.suffix[1:].lower() in EXTENSIONS and path.is_file())
        files += [File(str(path), label) for path in images]
    return Place(str(folder), files=tuple(files)) if files else None


def _annotated(file: Path, split: str) -> Place:
    """A file that names images with labels or captions."""
    readers: Mapping[str, Callable[[Path, str], Iterator[File]]] = {".jsonl": _lines, ".json": _json}
    try:
        files = tuple(readers.get(file.suffix, _table)(file, split))
        for caption in (caption for one in files for caption in one.captions):
            if not isinstance(caption, str):
                raise TypeError(f"a caption is no text: {caption!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError, csv.Error) as error:
        remedy = "docs/evaluation.md says which forms are read."
        raise DataError(f"is no list of images: {type(error).__name__} {error}", str(file), remedy=remedy) from error
    if not files:
        raise DataError(f"names no image of the split {split}", str(file))
    return Place(str(file), files=files)


def _lines(file: Path, split: str) -> Iterator[File]:
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.strip():
            one = json.loads(line)
            label, captions = one.get("label"), one.get("captions", [])
            if not isinstance(captions, list):
                raise TypeError(f"captions are no list: {captions!r}")
            yield File(_path(file, one["image"]), None if label is None else int(label), tuple(captions))


def _json(file: Path, split: str) -> Iterator[File]:
    content = json.loads(file.read_text(encoding="utf-8"))
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
    with open(file, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines, skipinitialspace=True):
            captions.setdefault(row["image"], []).append(row["caption"])
    for name, told in captions.items():
        yield File(_path(file, name), None, tuple(told))


def _path(file: Path, name: str) -> str:
    """Of an image: beside the file that names it, or in the one folder of images there that has it."""
    if "://" in name or Path(name).is_absolute():
        return name
    places = [file.parent / name, *(folder / name for folder in sorted(file.parent.glob("*/")))]
    return str(next((place for place in places if place.is_file()), places[0]))


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def required(place: Place | None, path: str, split: str) -> Place:
    if place is None:
        remedy = f"Forms that are read: docs/evaluation.md; this split is called {' or '.join(SPLITS[split])}."
        raise ConfigError(f"there is no data set with a split {split} here", path, remedy=remedy)
    return place
