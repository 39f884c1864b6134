"""The metric lines of a run as columns: 10,000 logged steps take a hundredth of a second and a megabyte. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.runs.ownership import open_regular
from flip.runs.rundir import RunDir, matching, newest_first, number

Column = NDArray[np.float64]
Columns = Mapping[str, Column]

FIELDS = (
    "step", "samples", "seconds", "time", "samples_per_second", "loss", "accuracy", "data_wait", "saves", "saving",
    "cpu_seconds",
)  # fmt: skip
"""What is read of a line; where a line lacks it, NaN."""


@dataclass(frozen=True)
class Metrics:
    """What all attempts of a run have logged. ``columns``: field -> one value per line, attempt after attempt."""

    columns: Columns
    bounds: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Attempt -> its first line and the one after its last."""
    damage: tuple[str, ...] = ()
    """A sentence for each file that cannot be read; its lines are missing here."""

    def attempt(self, n: int) -> Columns:
        """The lines of attempt n alone, as it wrote them; views."""
        first, stop = self.bounds.get(n, (0, 0))
        return {name: column[first:stop] for name, column in self.columns.items()}

    @cached_property
    def standing(self) -> NDArray[np.intp]:
        """Indices of the lines that count, by step: of a step done twice the one of the highest attempt."""
        steps = self.columns["step"][::-1]
        _, first = np.unique(steps, return_index=True)  # of the reversed lines: the last one written
        return len(steps) - 1 - first

    def __len__(self) -> int:
        return len(self.standing)

    def __getitem__(self, name: str) -> Column:
        """A field of the lines that count."""
        return self.columns[name][self.standing]

    def last(self, name: str) -> float | None:
        """A field of the newest line that counts; None where there is no line, or none in it."""
        if not len(self):
            return None
        value = float(self.columns[name][self.standing[-1]])
        return None if np.isnan(value) else value

    def seconds_at(self, samples: float) -> float | None:
        """Training seconds at the nearest line at or before S = ``samples``."""
        place = int(np.searchsorted(self["samples"], samples, side="right")) - 1
        if place < 0 or np.isnan(self["seconds"][place]):
            return None
        return float(self["seconds"][place])

    def ends(self) -> list[dict[str, float]]:
        """Of each attempt of which a line counts the last such line."""
        found = []
        for first, stop in self.bounds.values():
            mine = self.standing[(self.standing >= first) & (self.standing < stop)]
            if len(mine):
                found.append({name: float(column[mine[-1]]) for name, column in self.columns.items()})
        return found


def nothing(damage: tuple[str, ...] = ()) -> Metrics:
    return Metrics({name: np.empty(0) for name in FIELDS}, damage=damage)


def read(run: RunDir) -> Metrics:
    """The lines of every attempt of the run. A damaged file adds none and is named in ``damage``."""
    tables, damage = [], []
    for n, path in sorted(_numbered(run).items()):
        try:
            tables.append((n, _lines(path)))
        except (OSError, ValueError) as error:
            damage.append(str(error) if str(path) in str(error) else f"{path}: {error}")
    tables = [(n, table) for n, table in tables if len(table["step"])]
    if not tables:
        return nothing(tuple(damage))
    bounds, at = {}, 0
    for n, table in tables:
        bounds[n] = (at, at := at + len(table["step"]))
    columns = {name: np.concatenate([table[name] for _, table in tables]) for name in FIELDS}
    return Metrics(columns, bounds, tuple(damage))


def _numbered(run: RunDir) -> dict[int, Path]:
    """Attempt -> its file."""
    found = {number(path.stem): path for path in matching(run.metrics, "*.jsonl")}
    return {n: path for n, path in found.items() if n is not None}


def newest(run: RunDir) -> dict[str, Any]:
    """The newest whole metric line with every field; empty if there is none yet."""
    lines = (line for _, path in sorted(_numbered(run).items(), reverse=True) for line in newest_first(path))
    return next(lines, {})


def _lines(path: Path) -> dict[str, Column]:
    """The columns of one file. A line that was cut off by a kill is not a line."""
    import pyarrow
    from pyarrow.json import ParseOptions, ReadOptions, read_json

    with open_regular(path) as file:
        text = file.read()
    text = text[: text.rfind(b"\n") + 1]
    if not text.strip():
        return {name: np.empty(0) for name in FIELDS}
    if not text.lstrip().startswith(b"{"):  # pyarrow 26 ends the process if the first value is null
        raise ValueError(f"{path}: the first line is not a JSON object")
    schema = pyarrow.schema([(name, pyarrow.float64()) for name in FIELDS])
    table = read_json(
        pyarrow.BufferReader(text),
        read_options=ReadOptions(use_threads=False, block_size=max(1 << 20, len(text))),
        parse_options=ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    columns = {name: table[name].to_numpy() for name in FIELDS}
    if np.isnan(columns["step"]).any() or np.isnan(columns["samples"]).any():
        raise ValueError(f"{path}: a line has no step or no samples")
    return columns
