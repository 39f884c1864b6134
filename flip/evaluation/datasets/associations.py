"""Instances of the task ``association``: cues, and candidate images (WinoGAViL, Bitton et al. 2022, arXiv 2207.12576).

The folder of the data set has ``associations.jsonl``, an instance per line, and the images below ``images/``:

    {"cue": "pogonophile", "candidates": ["bison.jpg", ...], "associations": ["bison.jpg", ...]}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from flip.evaluation.datasets.image_sources import File
from flip.files.creation import read_regular
from flip.runs.errors import DataError

FILE = "associations.jsonl"
LIMIT = 64 << 20
"""Largest file of instances that is read, bytes."""


class Association(NamedTuple):
    """One instance: a cue, and the numbers of its candidate images; the first ``right`` of them belong to the cue."""

    cue: str
    candidates: list[int]
    right: int


def read(folder: str) -> tuple[list[File], list[Association]]:
    """The images of all instances, each once, and the instances. Raises DataError."""
    path = Path(folder) / FILE
    numbers = dict[str, int]()
    instances = list[Association]()
    try:
        lines = read_regular(path, LIMIT).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        remedy = "Write it from the published data: docs/evaluation.md, Data sets."
        raise DataError("the instances cannot be read", str(path), str(error), remedy) from error
    for n, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            right = list(row["associations"])
            names = [*right, *(name for name in row["candidates"] if name not in right)]
            if not right or not set(right) <= set(row["candidates"]):
                raise ValueError("its associations are not among its candidates")
            candidates = [numbers.setdefault(str(name), len(numbers)) for name in names]
            instances.append(Association(str(row["cue"]), candidates, len(right)))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"line {n} is no instance: {type(error).__name__} {error}", str(path)) from error
    return [File(str(path.parent / "images" / name), number) for name, number in numbers.items()], instances
