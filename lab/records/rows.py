"""The rows of the record page, docs/records/NAME.json, and docs/records/tried.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flip.files.creation import output_folder
from flip.runs.errors import ConfigError
from flip.runs.rundir import read_json, sorted_glob, write_json
from lab.records.rule import MARGIN, has_reached

SET = "twemoji"
GOAL = 0.213
"""Top-1 of the arm clipa of docs/cheapest.md on SET."""
REFERENCE_SECONDS = 360.0
"""Core-seconds of that arm, by definition of the unit."""
TRIED = "tried.json"


@dataclass(frozen=True)
class RecordRow:
    """A measured recipe."""

    run: str
    """Its name in sweeps/records.yaml."""
    scores: dict[str, float]
    """Seed -> top-1 on SET."""
    seconds: float
    """Core-seconds of training, in units in which the reference takes REFERENCE_SECONDS."""
    measured: dict[str, dict[str, float]]
    """``recipe``, ``reference`` -> stage -> processor seconds per sample on that machine."""
    samples: int
    commit: str
    date: str
    machine: dict[str, Any]

    @property
    def values(self) -> list[float]:
        return list(self.scores.values())

    @property
    def has_reached(self) -> bool:
        return has_reached(self.values, GOAL)


@dataclass(frozen=True)
class TriedRecipe:
    """Something that was tried, and what it gave on the validation set."""

    date: str
    what: str
    result: str


def write(folder: Path, row: RecordRow) -> Path:
    path = folder / f"{row.run}.json"
    output_folder(folder)
    write_json(path, asdict(row))
    return path


def read(folder: Path) -> list[RecordRow]:
    """The rows, cheapest first. Raises ConfigError if a file is no row."""
    rows = []
    for path in sorted_glob(folder, "*.json"):
        if path.name != TRIED:
            rows.append(_parsed(path, RecordRow))
    return sorted(rows, key=lambda row: row.seconds)


def trials(folder: Path) -> list[TriedRecipe]:
    path = folder / TRIED
    return [TriedRecipe(**each) for each in read_json(path) or []]


def records(rows: Sequence[RecordRow]) -> set[str]:
    """Names of the rows that were records when they were measured: the goal is reached at less cost, by MARGIN."""
    best = REFERENCE_SECONDS
    names = set()
    for row in sorted(rows, key=lambda row: row.date):
        if row.has_reached and row.seconds <= (1 - MARGIN) * best:
            best = row.seconds
            names.add(row.run)
    return names


def _parsed(path: Path, kind: type[RecordRow]) -> RecordRow:
    try:
        return kind(**(read_json(path) or {}))
    except (TypeError, ValueError) as error:
        remedy = "Restore it, or measure it again: make records ROW=NAME."
        raise ConfigError("is no row of the record page", str(path), str(error), remedy) from error
