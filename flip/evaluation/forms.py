"""The forms in which data sets lie on disk or in object storage, and how each becomes images in a fixed order.

    manifest    a folder with manifest.json (tools/shards.py index)
    shards      SPLIT/*.tar, as CLIP_benchmark's wds_* sets, or *.tar: those whose names tell of the split, where any
                does (timm's imagenet1k-train-0000.tar), else all are the test; local or s3://
    folder      SPLIT/CLASS/*.jpg, or CLASS/*.jpg: classes are paired with class names by registry.label_by_name
    a file      that names images with labels or captions (listings.py)

What lies there says which form it is. All is decided once, by rank 0: the result is plain data for the others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flip.config.resolve import cache_root
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.build import index
from flip.data.manifest.manifest import MARK
from flip.data.manifest.tar import EXTENSIONS
from flip.data.storage.base import ObjectStat, is_remote
from flip.data.storage.retry import RetryPolicy
from flip.evaluation import annotations as listings
from flip.evaluation.images import File, Files, Images, Shards
from flip.runs.errors import ConfigError

SPLITS = {"test": ("test", "val", "validation"), "train": ("train", "training")}
"""Names that a split's folder goes by."""
FILES = "*.jsonl", "dataset*.json", "captions*.json", "annotations/captions*.json", "*karpathy*", "*.csv"
"""Names of files that name images."""


@dataclass(frozen=True)
class Place:
    """Where the images of one split are: the folder of a manifest, or single files."""

    where: str
    manifest: str = ""
    files: tuple[File, ...] = ()
    classes: tuple[str, ...] = ()
    """Of an image folder: its folders, in the order of their numbers."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Place:
        """From plain values, as ``dataclasses.asdict`` and JSON have them."""
        files = tuple(File(key, label, tuple(captions)) for key, label, captions in facts["files"])
        return cls(facts["where"], facts["manifest"], files, tuple(facts["classes"]))

    def open(self, patience: RetryPolicy | None = None) -> Images:
        if self.manifest:
            return Shards(self.manifest, patience)
        return Files(self.files, str(_folder(Path(self.where))), self.where, patience)


def find(path: str, split: str = "test") -> Place | None:
    """The split of the data set at ``path``; None where nothing of any form lies there. Shards without a manifest are
    indexed into the cache, which reads them once. Raises ConfigError, DataError, StorageError, PermissionDenied.
    """
    if is_remote(path):
        return _shards(path.rstrip("/"), split)
    place = Path(path).expanduser().absolute()
    if place.is_file():
        return _named(place, split)
    folders = [place / name for name in SPLITS[split]] + ([place] if split == "test" else [])
    for folder in folders:
        if (folder / MARK).is_file():
            return Place(str(folder), manifest=str(folder))
    found = _shards(str(place), split)
    if found is not None:
        return found
    for pattern in FILES:
        for file in sorted(place.glob(pattern)):
            if _of_split(file, split):
                return _named(file, split)
    return next((found for folder in folders if (found := _classes(folder)) is not None), None)


def _of_split(file: Path, split: str) -> bool:
    """A file that names another split alone is not meant."""
    told = _tells(file.name)
    return file.name.startswith("dataset_") or not told or split in told


def _tells(name: str) -> set[str]:
    """The splits that a file's name tells of, as imagenet1k-train-0000.tar or captions_val2017.json."""
    words = set(re.split("[^a-z]+", name.lower()))
    return {split for split, names in SPLITS.items() if words & set(names)}


def _named(file: Path, split: str) -> Place:
    return Place(str(file), files=listings.read(file, split))


def _shards(root: str, split: str) -> Place | None:
    """Of a split's own folder, or of those directly in ``root``."""
    reader = ChunkReader()
    for prefix in [f"{root}/{name}/" for name in SPLITS[split]] + [f"{root}/"]:
        if not is_remote(prefix) and not Path(prefix).is_dir():
            continue
        listed = {key: stat for key, stat in reader.list(prefix).items() if key.endswith(".tar")}
        listed = {key: stat for key, stat in listed.items() if "/" not in key.removeprefix(prefix)}
        if prefix == f"{root}/":
            listed = _told(listed, split)
        if listed:
            return Place(prefix, manifest=str(_indexed(listed)))
    return None


def _told(listed: dict[str, ObjectStat], split: str) -> dict[str, ObjectStat]:
    """Of shards beside each other, those whose names tell of the split; where none tells of any, all are the test."""
    tell = {key: _tells(key.rpartition("/")[2]) for key in listed}
    if not any(tell.values()):
        return listed if split == "test" else {}
    return {key: stat for key, stat in listed.items() if split in tell[key]}


def _indexed(listed: dict[str, ObjectStat]) -> Path:
    """Their manifest in the cache: begun once, it goes on; of evaluations beside each other the first one makes it."""
    text = json.dumps([[key, *stat] for key, stat in listed.items()])
    made = cache_root() / "manifests" / hashlib.sha256(text.encode()).hexdigest()[:32]
    if not (made / MARK).is_file():
        try:
            index(list(listed), made)
        except ConfigError:  # another one was first: its manifest is of the same shards
            if not (made / MARK).is_file():
                raise
    return made


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
    names = tuple(one.name for one in folders)
    return Place(str(folder), files=tuple(files), classes=names) if files else None


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def required(place: Place | None, path: str, split: str) -> Place:
    if place is None:
        remedy = f"Forms that are read: docs/evaluation.md; this split is called {' or '.join(SPLITS[split])}."
        raise ConfigError(f"there is no data set with a split {split} here", path, remedy=remedy)
    return place
