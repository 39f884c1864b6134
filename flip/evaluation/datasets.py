"""Data sets by name (``datasets.yaml``) or by place: what a person types -> what is scored, or how to get it."""

from __future__ import annotations

import difflib
import logging
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from flip.config.yaml_io import read_yaml
from flip.data.storage.base import is_remote
from flip.data.storage.retry import RetryPolicy
from flip.evaluation import forms, prompts
from flip.evaluation.forms import Place
from flip.evaluation.prompts import Prompts
from flip.evaluation.task import COLUMNS
from flip.runs.errors import ConfigError

log = logging.getLogger(__name__)

HOST = "https://huggingface.co/datasets/clip-benchmark"
ORDERED = re.compile(r"[0-9]+|n[0-9]{8}")
"""Folder names that are class numbers or WordNet ids: these go by their order."""


@dataclass(frozen=True)
class Wanted:
    """One data set as it is asked for: plain values, kept in the job's file."""

    name: str
    task: str = ""
    """Empty: as the registry says, else as its captions or labels say."""
    path: str = ""
    """Empty: below the data root, by its name."""
    templates: str = ""
    """A JSON file with names and templates, or 7 or 80 (ImageNet's); empty: what the data set brings."""

    @classmethod
    def parse(cls, text: str) -> Wanted:
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
class Found:
    """A data set that is there: plain data, the same for all ranks."""

    name: str
    task: str
    place: Place
    wording: Prompts | None = None
    train: Place | None = None
    note: str = ""
    """What the user should know about the result; stands in its file and below the table."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Found:
        """From plain values, as ``dataclasses.asdict`` and JSON have them."""
        places = {key: Place.of(facts[key]) for key in ("place", "train") if facts[key] is not None}
        wording = None if facts["wording"] is None else Prompts(**facts["wording"])
        return cls(**{**facts, **places, "wording": wording})


def entries() -> dict[str, Mapping[str, Any]]:
    """Name -> what datasets.yaml says of it."""
    return dict(read_yaml(Path(__file__).with_name("datasets.yaml")))


def root(given: str = "") -> str:
    """Where data sets lie: as given, else FLIP_DATA, else ./data."""
    chosen = given or os.environ.get("FLIP_DATA") or "data"
    return chosen if is_remote(chosen) else str(Path(chosen).expanduser().absolute())


def find(wanted: Wanted, below: str, patience: RetryPolicy | None = None) -> Found:
    """The data set, wherever it lies. Raises ConfigError that says how to get one that is missing, DataError."""
    entry = entries().get(wanted.name, {})
    path, place = _place(wanted, entry, below)
    task = wanted.task or str(entry.get("task") or "") or _task(place, patience)
    train = forms.required(forms.find(path, "train"), path, "train") if task == "probe" else None
    if train and train.classes != place.classes:
        a, b = next((a, b) for a, b in zip_longest(place.classes, train.classes, fillvalue="none") if a != b)
        remedy = "Classes are numbered by their folders: give both splits the same ones; empty ones count."
        raise ConfigError("test and train have not the same folders of classes", path, f"{a} beside {b}", remedy)
    wording = _wording(wanted, entry, path) if task == "zeroshot" else None
    note = ""
    if wording and place.classes:
        place, note = label_by_name(place, wording.names, wanted.templates or path)
    if note:
        log.info("%s: %s", wanted.name, note)
    return Found(wanted.name, task, place, wording, train, note)


def label_by_name(place: Place, names: Sequence[str], source: str) -> tuple[Place, str]:
    """The image folder with the class numbers of ``names``, and a note if folders and names were paired by order.

    Folders are matched by name. Case, ``_``, ``-`` and spaces do not count. If no folder matches and all are numbers or
    WordNet ids, folder c is name c. ``source``: where the names are from. Raises ConfigError for everything else.
    """
    folders = place.classes
    remedy = (
        f"The class names are from {source}. Correct a name there or rename the folder; folders called 0, 1, ... go by"
        " order, and a list (*.jsonl) gives each image its class number."
    )
    if all(map(ORDERED.fullmatch, folders)) and {*map(_key, folders)}.isdisjoint(map(_key, names)):
        if len(folders) != len(names):
            counts = f"{len(folders)} folders, {len(names)} names"
            raise ConfigError("there are not as many class names as folders of classes", place.where, counts, remedy)
        pairs = f"{folders[0]} = {names[0]} ... {folders[-1]} = {names[-1]}"
        return place, f"folders are numbers or WordNet ids, so folder c is class name c: {pairs}"
    numbers, keys = _by_key(names, "two class names", source), _by_key(folders, "two folders", place.where)
    unmatched = [key for key in keys if key not in numbers]
    if unmatched:
        shown = [folders[keys[key]] + _nearest(key, numbers, names) for key in unmatched[:5]]
        more = f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else ""
        what = f"{len(unmatched)} of {len(folders)} folders match no class name: {', '.join(shown)}{more}"
        raise ConfigError(what, place.where, f"{len(names)} names", remedy)
    absent = [name for key, name in zip(numbers, names, strict=True) if key not in keys]
    if absent:
        what = f"there is no folder for {len(absent)} of {len(names)} class names: {', '.join(absent[:5])}"
        raise ConfigError(what, place.where, remedy="A class without images needs an empty folder.")
    order = [numbers[key] for key in keys]
    files = tuple(file._replace(label=order[file.label or 0]) for file in place.files)
    return replace(place, files=files, classes=tuple(names)), ""


def _key(name: str) -> str:
    """A name without case, ``_``, ``-`` and spaces."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold())


def _by_key(names: Sequence[str], what: str, where: str) -> dict[str, int]:
    """Key of a name -> its position. Raises ConfigError if different names have one key.

    Names that are equal as they stand are told apart by their number: ImageNet has two such pairs.
    """
    found: dict[str, int] = {}
    for number, name in enumerate(names):
        key = _key(name)
        if key in found and name != names[found[key]]:
            pair = f"{names[found[key]]}, {name}"
            raise ConfigError(f"{what} are the same but for case, _, - and spaces", where, pair)
        found.setdefault(key if key not in found else f"{key} {number}", number)
    return found


def _nearest(key: str, numbers: Mapping[str, int], names: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, numbers, n=1, cutoff=0.5)
    return f" (nearest: {names[numbers[near[0]]]})" if near else ""


def missing(wanted: Wanted, below: str) -> str:
    """Why a data set cannot be there, empty where it may be: what can be said without reading it."""
    try:
        _names(wanted, entries().get(wanted.name, {}), below)
    except ConfigError as error:
        return str(error)
    return ""


def source(entry: Mapping[str, Any]) -> str:
    """Where a data set comes from, in words; empty where that is not known."""
    return str(entry.get("get", "")).replace("HF/", f"{HOST}/")


def expected(name: str) -> int | None:
    """How many images the test split of a data set of this name has, where that is known."""
    count = entries().get(name, {}).get("count")
    return None if count is None else int(count)


def _names(wanted: Wanted, entry: Mapping[str, Any], below: str) -> list[str]:
    """Places where it may lie. Raises ConfigError where there is none that exists."""
    if wanted.path:
        places = [wanted.path]
    else:
        names = [wanted.name, f"wds_{wanted.name}", *entry.get("folders", ())]
        places = [f"{below.rstrip('/')}/{name}" for name in names]
    there = [place for place in places if is_remote(place) or Path(place).expanduser().exists()]
    if not there:
        known = "" if entry or wanted.path else f" Known names: {', '.join(entries())}; others need NAME=PATH."
        get = source(entry)
        remedy = (f"Get it from {get}. " if get else "") + "Put it there, or give NAME=PATH or --data." + known
        raise ConfigError(f"the data set {wanted.name} is not here", ", ".join(places), remedy=remedy)
    return there


def _place(wanted: Wanted, entry: Mapping[str, Any], below: str) -> tuple[str, Place]:
    tried = _names(wanted, entry, below)
    for path in tried:
        place = forms.find(path)
        if place is not None:
            return path, place
    return tried[0], forms.required(None, ", ".join(tried), "test")


def _task(place: Place, patience: RetryPolicy | None) -> str:
    """As the first sample says."""
    _, sample = next(iter(place.open(patience).samples(range(1))))
    return "zeroshot" if "cls" in sample else "retrieval"


def _wording(wanted: Wanted, entry: Mapping[str, Any], path: str) -> Prompts:
    if wanted.templates in ("7", "80"):
        return prompts.imagenet(int(wanted.templates))
    if wanted.templates:
        return prompts.read(wanted.templates)
    folder = path if Path(path).is_dir() else os.path.dirname(path)
    found = None if is_remote(path) else prompts.of_folder(folder)
    if found is None and entry.get("words") == "imagenet":
        found = prompts.imagenet(int(entry["templates"]))
    if found is None:
        remedy = "Put a classes.json there, or give one with --classes. " + prompts.FORM
        raise ConfigError("the data set brings no names of its classes", path, remedy=remedy)
    return found
