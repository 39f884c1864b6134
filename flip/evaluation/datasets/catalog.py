"""Finds data sets by name (``datasets.yaml``) or path, in any of the formats that are read.

manifest    a folder with manifest.json (flip shards index)
shards      SPLIT/*.tar (CLIP_benchmark's wds_*) or *.tar with the split in their names; local or s3://
folder      SPLIT/CLASS/*.jpg, or CLASS/*.jpg
a file      that lists images with labels or captions (``annotations``)

``suites.yaml`` names lists of data sets, such as those of a table of the paper.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flip.common.cache import cache_root
from flip.common.host import cores
from flip.common.image_formats import is_image_name
from flip.common.yaml_io import read_yaml
from flip.config.schema import EvaluationSet
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.build import index
from flip.data.manifest.labels import LabelCounts, defect_of
from flip.data.manifest.manifest import MARK, Manifest
from flip.data.storage.base import ObjectStat, is_remote
from flip.data.storage.retry import DEFAULT_POLICY, RetryPolicy
from flip.evaluation.datasets import associations
from flip.evaluation.datasets.annotations import is_other_table, read_annotations
from flip.evaluation.datasets.image_sources import File, ImageFiles, Images, Shards
from flip.evaluation.datasets.prompts import (
    FORMAT_HELP,
    IMAGENET_CLASSES,
    Prompts,
    imagenet_prompts,
    read_folder,
    read_prompts,
)
from flip.evaluation.metrics.result_files import COLUMNS
from flip.runs.errors import ConfigError, suggestion

log = logging.getLogger(__name__)

HOST = "https://huggingface.co/datasets/clip-benchmark"
DATACOMP_HOST = "https://huggingface.co/datasets/djghosh"
_HERE = Path(__file__).parent
SPLITS = {"test": ("test", "val", "validation"), "train": ("train", "training")}
"""Split -> names of its folder."""
PROBE_REMEDY = "Name another split for training; give both splits the classes of one classes.json (docs/evaluation.md)."
LIST_PATTERNS = "*.jsonl", "dataset*.json", "captions*.json", "annotations/captions*.json", "*karpathy*", "*.csv"
"""Names of files that list images."""
BARE = "bare"
"""In place of templates: the class names alone."""
ORDERED = re.compile(r"[0-9]+|n[0-9]{8}")
"""Folder names that are class numbers or WordNet ids: folders are numbered in their order."""


@dataclass(frozen=True)
class DatasetRequest:
    """One data set as requested on the command line; the fields are written to the job's task file."""

    name: str
    task: str = ""
    """Empty: the task in datasets.yaml, or else by what comes with the images: labels or captions."""
    path: str = ""
    """Empty: below the data root, by its name."""
    templates: str = ""
    """A JSON file with names and templates, or 7 or 80 (ImageNet's); empty: those of the data set."""

    @classmethod
    def parse(cls, text: str) -> DatasetRequest:
        """NAME, NAME=PATH, TASK:NAME or TASK:NAME=PATH."""
        name, _, path = text.partition("=")
        task, colon, rest = name.partition(":")
        if colon and task not in COLUMNS:
            raise ConfigError(f"a task is one of {', '.join(COLUMNS)}", "--sets", text)
        name = rest if colon else name
        if not name or not all(c.isalnum() or c in "_-." for c in name):
            raise ConfigError("a data set is given as NAME, NAME=PATH or TASK:NAME=PATH", "--sets", text)
        return cls(name, task if colon else "", path)


@dataclass(frozen=True)
class DatasetLocation:
    """Location of the images of one split: the folder of a manifest, or single files."""

    where: str
    manifest: str = ""
    files: tuple[File, ...] = ()
    classes: tuple[str, ...] = ()
    """Class folders by class number, if this is a folder of images."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DatasetLocation:
        files = tuple(File(key, label, tuple(captions)) for key, label, captions in values["files"])
        return cls(values["where"], values["manifest"], files, tuple(values["classes"]))

    def open(self, retry_policy: RetryPolicy = DEFAULT_POLICY) -> Images:
        if self.manifest:
            return Shards(self.manifest, retry_policy)
        if os.path.isfile(self.where):
            root = os.path.dirname(self.where)
        else:
            root = self.where
        return ImageFiles(self.files, root, self.where, retry_policy)


@dataclass(frozen=True)
class ResolvedDataset:
    """A data set with the locations of its images and its prompts; rank 0 sends it to the other ranks as JSON."""

    name: str
    task: str
    location: DatasetLocation
    prompts: Prompts | None = None
    train: DatasetLocation | None = None
    note: str = ""
    """A warning about the result, stored in its file and shown below the table."""
    metric: str = ""
    """A metric of ``flip.evaluation.metrics.measures``, in addition to the accuracy."""
    group: int | None = None
    """Column of the metadata with the group that a metric needs."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ResolvedDataset:
        """The inverse of ``dataclasses.asdict``."""
        locations = {k: DatasetLocation.from_dict(values[k]) for k in ("location", "train") if values[k] is not None}
        prompts = None
        if values["prompts"] is not None:
            prompts = Prompts(**values["prompts"])
        return cls(**{**values, **locations, "prompts": prompts})

    @classmethod
    def from_config(cls, item: EvaluationSet) -> ResolvedDataset:
        """A data set of ``evaluate.sets``. A defect of a probe becomes its note: it must not end a trained run.

        Raises ConfigError.
        """
        location, train = (DatasetLocation(path, manifest=path) for path in (item.manifest, item.train))
        prompts = None
        if item.task == "zeroshot":
            prompts = read_prompts(item.classes)
        if item.task != "probe":
            return cls(item.name, item.task, location, prompts)
        return cls(item.name, item.task, location, prompts, train, probe_defect(item.manifest, item.train))


def entries() -> dict[str, Mapping[str, Any]]:
    """The known data sets: name -> its entry in datasets.yaml."""
    return dict(read_yaml(_HERE / "datasets.yaml"))


def suites() -> dict[str, list[str]]:
    """Name of a suite -> its data sets, as ``DatasetRequest.parse`` reads them."""
    return {name: [str(item) for item in items] for name, items in read_yaml(_HERE / "suites.yaml").items()}


def root(given: str = "") -> str:
    """The folder of data sets: ``given``, or else FLIP_DATA, or else ./data."""
    chosen = given or os.environ.get("FLIP_DATA") or "data"
    if is_remote(chosen):
        return chosen
    return str(Path(chosen).expanduser().absolute())


def source(entry: Mapping[str, Any]) -> str:
    """Where to download a data set; empty if unknown."""
    return str(entry.get("get", "")).replace("HF/", f"{HOST}/").replace("DC/", f"{DATACOMP_HOST}/")


def expected(name: str) -> int | None:
    """Number of images in the test split of a known data set; None if unknown."""
    count = entries().get(name, {}).get("count")
    if count is None:
        return None
    return int(count)


def missing(request: DatasetRequest, below: str) -> str:
    """Why a data set cannot be read, by its paths alone; empty if one of them exists or is remote."""
    try:
        _existing_paths(request, entries().get(request.name, {}), below)
    except ConfigError as error:
        return str(error)
    return ""


def resolve_dataset(request: DatasetRequest, below: str, retry_policy: RetryPolicy = DEFAULT_POLICY) -> ResolvedDataset:
    """Find a data set below the data root ``below``, or at its path.

    Raises ConfigError, which says how to get a missing data set, or DataError.
    """
    entry = entries().get(request.name, {})
    paths = _existing_paths(request, entry, below)
    if (request.task or entry.get("task")) == "association":
        files, _ = associations.read(paths[0])
        return ResolvedDataset(request.name, "association", DatasetLocation(paths[0], files=tuple(files)))
    path, location = next(((p, split) for p in paths if (split := locate_split(p))), (", ".join(paths), None))
    location = _require(location, path, "test")
    task = request.task or str(entry.get("task") or "")
    if not task:
        _, sample = next(iter(location.open(retry_policy).samples(range(1))))
        task = "zeroshot" if "cls" in sample else "retrieval"
    train = None
    if task == "probe":
        train = _require(locate_split(path, "train"), path, "train")
    if train and train.classes != location.classes:
        a, b = next((a, b) for a, b in zip_longest(location.classes, train.classes, fillvalue="none") if a != b)
        remedy = "Classes are numbered by their folders: give both splits the same ones; empty ones count."
        raise ConfigError("test and train have not the same folders of classes", path, f"{a} beside {b}", remedy)
    if train and (defect := _probe_defect(location, train)):
        raise ConfigError(f"linear probe: {defect}", path, remedy=PROBE_REMEDY)
    prompts = _prompts(request, entry, path) if task == "zeroshot" else None
    note = ""
    if prompts and location.classes:
        location, note = label_by_name(location, prompts.names, request.templates or path)
    if note:
        log.info("%s: %s", request.name, note)
    if task == "zeroshot":
        metric = entry.get("metric", "")
        group = entry.get("group")
    else:
        metric = ""
        group = None
    return ResolvedDataset(request.name, task, location, prompts, train, note or entry.get("note", ""), metric, group)


def label_defect(request: DatasetRequest, below: str) -> str:
    """Why the labels of a zero-shot set do not fit its class names, by the counts of its manifest.

    Empty if they fit, and if this machine cannot tell: it has no manifest with counts. No sample is read. Raises
    ConfigError if the data set has no class names, or if they are not those of its folders of images.
    """
    entry = entries().get(request.name, {})
    task = request.task or entry.get("task")
    if task not in (None, "zeroshot") or missing(request, below):
        return ""
    paths = _existing_paths(request, entry, below)
    for path in paths:
        folder = _local_manifest(path)
        if folder is None and path == paths[0] and (location := _class_folders(path)):
            source = _prompt_source(request, entry, path)
            if not isinstance(source, int):  # the names of ImageNet come with open_clip, and so with torch
                label_by_name(location, source.names, request.templates or path)
            return ""
        if folder is None:
            continue
        manifest = Manifest.load(folder)
        if task is None and not LabelCounts.of_manifest(manifest).counts:  # for retrieval
            return ""
        source = _prompt_source(request, entry, path)
        if isinstance(source, int):
            classes = IMAGENET_CLASSES
        else:
            classes = len(source.names)
        return defect_of(manifest, classes)
    return ""


def _local_manifest(path: str) -> Path | None:
    """The folder of the manifest of the test split at ``path``; None if it is in another form, or remote."""
    if is_remote(path):
        return None
    root = Path(path).expanduser().absolute()
    folders = [*(root / name for name in SPLITS["test"]), root]
    return next((folder for folder in folders if (folder / MARK).is_file()), None)


def _class_folders(path: str) -> DatasetLocation | None:
    """The folders of classes of the test split at ``path``, without the images; None if it has another form."""
    root = Path(path).expanduser().absolute()
    if is_remote(path) or not root.is_dir() or any(any(root.glob(pattern)) for pattern in LIST_PATTERNS):
        return None
    for folder in [*(root / name for name in SPLITS["test"]), root]:
        if any(folder.glob("*.tar")):
            return None
        classes = _classes(folder)
        if any(_is_image(file) for of_class in classes for file in of_class.rglob("*")):
            return DatasetLocation(str(folder), classes=tuple(path.name for path in classes))
    return None


def probe_defect(test: str, train: str) -> str:
    """Why a probe of two manifests would mean nothing; empty if nothing is wrong."""
    return _probe_defect(*(DatasetLocation(path, manifest=path) for path in (test, train)))


def _probe_defect(test: DatasetLocation, train: DatasetLocation) -> str:
    if test.open().digest == train.open().digest:
        return "it would be fitted on the images that it scores"
    places = [location.manifest for location in (test, train)]
    if all(places) and not any(map(is_remote, places)):
        names = [prompts.names if (prompts := read_folder(place)) else None for place in places]
        if None not in names and names[0] != names[1]:
            return f"test and train have different classes.json ({', '.join(places)}): a label means two classes"
    return ""


def _existing_paths(request: DatasetRequest, entry: Mapping[str, Any], below: str) -> list[str]:
    """Remote paths and existing local ones under which the data set may be stored. Raises ConfigError if none is."""
    if request.path:
        paths = [request.path]
    else:
        names = [request.name, f"wds_{request.name}", *entry.get("folders", ())]
        paths = [f"{below.rstrip('/')}/{name}" for name in names]
    existing = [path for path in paths if is_remote(path) or Path(path).expanduser().exists()]
    if not existing:
        if entry or request.path:
            known = ""
        else:
            near = suggestion(request.name, entries()) or f"Known names: {', '.join(entries())}."
            known = f" {near} Others need NAME=PATH."
        get = ""
        if source(entry):
            get = f"Get it from {source(entry)}. "
        remedy = f"{get}Put it there, or give NAME=PATH or --data.{known}"
        raise ConfigError(f"the data set {request.name} is not here", ", ".join(paths), remedy=remedy)
    return existing


def _require(location: DatasetLocation | None, path: str, split: str) -> DatasetLocation:
    if location is None:
        remedy = f"docs/evaluation.md lists the formats; this split is called {' or '.join(SPLITS[split])}."
        raise ConfigError(f"no data set with a split {split} here", path, remedy=remedy)
    return location


def _prompts(request: DatasetRequest, entry: Mapping[str, Any], path: str) -> Prompts:
    source = _prompt_source(request, entry, path)
    if isinstance(source, int):
        return imagenet_prompts(source)
    return source


def _prompt_source(request: DatasetRequest, entry: Mapping[str, Any], path: str) -> Prompts | int:
    """The prompts of a data set, or the number of templates if it has those of ImageNet."""
    of_imagenet = request.templates in ("7", "80")
    if request.templates and not of_imagenet:
        return read_prompts(request.templates)
    if Path(path).is_dir():
        folder = path
    else:
        folder = os.path.dirname(path)
    prompts = None if is_remote(path) else read_folder(folder)
    if of_imagenet and (entry.get("words") == "imagenet" or not (entry or prompts)):  # others have names of their own
        return int(request.templates)
    if prompts is None and entry.get("words") == "imagenet":
        return int(entry["templates"])
    if prompts is None:
        remedy = f"Put a classes.json there, or give one with --classes. {FORMAT_HELP}"
        raise ConfigError("the data set has no names of its classes", path, remedy=remedy)
    if entry.get("templates") == BARE:
        return replace(prompts, templates=["{}"])
    return prompts


def locate_split(path: str, split: str = "test") -> DatasetLocation | None:
    """Find a split of the data set at ``path``, in any format; None if it has none.

    Shards without a manifest are indexed into the cache. Raises ConfigError, DataError, StorageError, PermissionDenied.
    """
    if is_remote(path):
        return _locate_shards(path.rstrip("/"), split)
    root = Path(path).expanduser().absolute()
    if root.is_file():
        other = split != "test" and not _lists(root, split)
        if other:
            return None
        return DatasetLocation(str(root), files=read_annotations(root, split))
    folders = [root / name for name in SPLITS[split]] + ([root] if split == "test" else [])
    for folder in folders:
        if (folder / MARK).is_file():
            return DatasetLocation(str(folder), manifest=str(folder))
    if shards := _locate_shards(str(root), split):
        return shards
    lists = [file for pattern in LIST_PATTERNS for file in sorted(root.glob(pattern)) if file.is_file()]
    unnamed = [file for file in lists if split == "test" and not _splits_in_name(file.name)]
    chosen = [file for file in lists if _lists(file, split)] + unnamed
    images = None
    if all(map(is_other_table, chosen)):  # they describe something else, or are an error if there are no images
        images = next((images for folder in folders if (images := _locate_images(folder))), None)
    if images or not chosen:
        return images
    file = next((file for file in chosen if not is_other_table(file)), chosen[0])
    return DatasetLocation(str(file), files=read_annotations(file, split))


def _words(name: str) -> set[str]:
    """The words of a file name, such as imagenet1k-train-0000.tar or captions_val2017.json."""
    return set(re.split("[^a-z]+", name.lower()))


def _lists(file: Path, split: str) -> bool:
    """Whether a list of images contains the split by its name: Karpathy's contains all."""
    return file.name.startswith("dataset_") or split in _splits_in_name(file.name)


def _splits_in_name(name: str) -> set[str]:
    """Splits that a file name mentions."""
    return {split for split, names in SPLITS.items() if _words(name) & set(names)}


def _locate_shards(root: str, split: str) -> DatasetLocation | None:
    """Shards in the folder of the split, or directly in ``root``."""
    reader = ChunkReader()
    for prefix in [f"{root}/{name}/" for name in SPLITS[split]] + [f"{root}/"]:
        if not is_remote(prefix) and not Path(prefix).is_dir():
            continue
        shards = {key: stat for key, stat in reader.list(prefix).items() if key.endswith(".tar")}
        shards = {key: stat for key, stat in shards.items() if "/" not in key.removeprefix(prefix)}
        if prefix == f"{root}/":
            shards = _filter_by_split(shards, split)
        if shards:
            return DatasetLocation(prefix, manifest=str(_index(shards)))
    return None


def _filter_by_split(shards: dict[str, ObjectStat], split: str) -> dict[str, ObjectStat]:
    """Shards whose names mention the split, by the first of its names that one mentions, as for folders; if no name
    mentions any split, all belong to the test split."""
    names = {key: key.rpartition("/")[2] for key in shards}
    if not any(map(_splits_in_name, names.values())):
        return shards if split == "test" else {}
    chosen = ({key: shards[key] for key in shards if word in _words(names[key])} for word in SPLITS[split])
    return next(filter(None, chosen), {})


def _index(shards: dict[str, ObjectStat]) -> Path:
    """The folder in the cache with a manifest of the shards, which the first of concurrent evaluations writes."""
    text = json.dumps([[key, *stat] for key, stat in shards.items()])
    folder = cache_root() / "manifests" / hashlib.sha256(text.encode()).hexdigest()[:32]
    if not (folder / MARK).is_file():
        try:
            index(list(shards), folder, workers=cores())
        except ConfigError:  # another process was faster: its manifest lists the same shards
            if not (folder / MARK).is_file():
                raise
    return folder


def _locate_images(folder: Path) -> DatasetLocation | None:
    """A folder with a folder of images per class."""
    classes = _classes(folder)
    files: list[File] = []
    for label, of_class in enumerate(classes):
        files += [File(str(path), label) for path in sorted(filter(_is_image, of_class.rglob("*")))]
    names = tuple(path.name for path in classes)
    if files:
        return DatasetLocation(str(folder), files=tuple(files), classes=names)
    return None


def _classes(folder: Path) -> list[Path]:
    """The folders of classes in a folder, which may not exist, in the order of their numbers or names."""
    if not folder.is_dir():
        return []
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if all(path.name.isascii() and path.name.isdigit() for path in classes):
        classes.sort(key=lambda path: int(path.name))  # 0, 1, ..., 10: class numbers
    return classes


def _is_image(path: Path) -> bool:
    return is_image_name(path) and path.is_file()


def label_by_name(location: DatasetLocation, names: Sequence[str], source: str) -> tuple[DatasetLocation, str]:
    """The image folder with labels that index ``names``, and a note if folders and names were matched by order.

    Folders are matched by name. Case, ``_``, ``-`` and spaces do not count. If no folder matches and all are numbers or
    WordNet ids, folder c is name c. ``source``: the file of the names. Raises ConfigError in all other cases.
    """
    folders = location.classes
    where = location.where
    remedy = (
        f"The class names are from {source}. Correct a name there or rename the folder; folders called 0, 1, ... go by"
        " order, and a list (*.jsonl) gives each image its class number."
    )
    if all(map(ORDERED.fullmatch, folders)) and {*map(_key, folders)}.isdisjoint(map(_key, names)):
        if len(folders) != len(names):
            counts = f"{len(folders)} folders, {len(names)} names"
            raise ConfigError("there are not as many class names as folders of classes", where, counts, remedy)
        pairs = f"{folders[0]} = {names[0]} ... {folders[-1]} = {names[-1]}"
        return location, f"folders are numbers or WordNet ids, so folder c is class name c: {pairs}"
    numbers = _by_key(names, "two class names", source)
    keys = _by_key(folders, "two folders", where)
    unmatched = [key for key in keys if key not in numbers]
    if unmatched:
        shown = [folders[keys[key]] + _nearest(key, numbers, names) for key in unmatched[:5]]
        more = ""
        if len(unmatched) > 5:
            more = f" and {len(unmatched) - 5} more"
        counts = f"{len(unmatched)} of {len(folders)} folders match no class name (of {len(names)})"
        raise ConfigError(f"{counts}: {', '.join(shown)}{more}", where, remedy=remedy)
    absent = [name for key, name in zip(numbers, names, strict=True) if key not in keys]
    if absent:
        what = f"there is no folder for {len(absent)} of {len(names)} class names: {', '.join(absent[:5])}"
        raise ConfigError(what, where, remedy="A class without images needs an empty folder.")
    order = [numbers[key] for key in keys]
    files = tuple(file._replace(label=order[file.label or 0]) for file in location.files)
    return replace(location, files=files, classes=tuple(names)), ""


def _key(name: str) -> str:
    """A name without case, ``_``, ``-`` and spaces."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold())


def _by_key(names: Sequence[str], what: str, where: str) -> dict[str, int]:
    """Key of a name -> its position. Raises ConfigError if different names have the same key.

    Equal names get distinct keys, with their position: ImageNet has two such pairs.
    """
    positions: dict[str, int] = {}
    for number, name in enumerate(names):
        key = _key(name)
        if key in positions and name != names[positions[key]]:
            pair = f"{names[positions[key]]}, {name}"
            raise ConfigError(f"{what} are the same but for case, _, - and spaces", where, pair)
        positions.setdefault(key if key not in positions else f"{key} {number}", number)
    return positions


def _nearest(key: str, numbers: Mapping[str, int], names: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, numbers, n=1, cutoff=0.5)
    if near:
        return f" (nearest: {names[numbers[near[0]]]})"
    return ""
