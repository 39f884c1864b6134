"""Reads the metric lines of a run as columns; 10,000 lines take 10 ms and 1 MB. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.runs.files import open_regular
from flip.runs.rundir import RunDir, newest_first, parse_int, sorted_glob

Column = NDArray[np.float64]
Columns = Mapping[str, Column]

FIELDS = (
    "step", "samples", "seconds", "time", "samples_per_second", "loss", "accuracy", "data_wait", "saving",
    "cpu_seconds",
)  # fmt: skip
"""Fields that are read; NaN if a line lacks one."""

MIN_WINDOWS, STEADY = 12, 0.8
"""Fewest logged windows of a verdict on the speed; smallest ratio of the quartiles of a steady one."""


def is_unsteady(speeds: Column) -> bool | None:
    """Whether the speed varied so much that the training time is not the cost of the method, as on a shared node.

    ``speeds``: samples/s of the logged windows of one stage, without warm-up. True if the lower quartile is below
    ``STEADY`` of the upper one; None for fewer than ``MIN_WINDOWS``.
    """
    if len(speeds) < MIN_WINDOWS:
        return None
    low, high = np.quantile(speeds, (0.25, 0.75))
    return bool(low < STEADY * high)


@dataclass(frozen=True)
class Metrics:
    """The logged steps of all attempts of a run. ``columns``: field -> a value per line, by attempt."""

    columns: Columns
    bounds: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    """Attempt -> its range of lines [first, stop)."""
    damage: tuple[str, ...] = ()
    """A sentence for each unreadable file, whose lines are missing."""

    def attempt(self, n: int) -> Columns:
        """All lines of attempt n; views."""
        first, stop = self.bounds.get(n, (0, 0))
        return {name: column[first:stop] for name, column in self.columns.items()}

    @cached_property
    def effective_rows(self) -> NDArray[np.intp]:
        """Indices of the lines that count, by step: of a repeated step the line of the highest attempt."""
        steps = self.columns["step"][::-1]
        _, first = np.unique(steps, return_index=True)  # in the reversed lines: the one written last
        return len(steps) - 1 - first

    def __len__(self) -> int:
        return len(self.effective_rows)

    def __getitem__(self, name: str) -> Column:
        """A field of the lines that count."""
        return self.columns[name][self.effective_rows]

    def unsteady(self, ends: Sequence[float]) -> bool | None:
        """``is_unsteady`` of any stage, without the first line of each stage and attempt. ``ends``: S at their ends."""
        rows = np.setdiff1d(self.effective_rows, [first for first, _ in self.bounds.values()])
        rows = rows[self.columns["samples_per_second"][rows] > 0]
        stages = np.searchsorted(ends, self.columns["samples"][rows])
        parts = [self.columns["samples_per_second"][rows[stages == stage][1:]] for stage in np.unique(stages)]
        verdicts = [verdict for part in parts if (verdict := is_unsteady(part)) is not None]
        return any(verdicts) if verdicts else None

    def last(self, name: str) -> float | None:
        """A field of the newest line that counts; None without a line or value."""
        if not len(self):
            return None
        value = float(self.columns[name][self.effective_rows[-1]])
        return None if np.isnan(value) else value

    def seconds_at(self, samples: float) -> float | None:
        """Training seconds at the nearest line at or before S = ``samples``."""
        index = int(np.searchsorted(self["samples"], samples, side="right")) - 1
        if index < 0 or np.isnan(self["seconds"][index]):
            return None
        return float(self["seconds"][index])


def empty(damage: tuple[str, ...] = ()) -> Metrics:
    return Metrics({name: np.empty(0) for name in FIELDS}, damage=damage)


def read_metrics(run: RunDir) -> Metrics:
    """Read the lines of all attempts. A damaged file is reported in ``damage``."""
    tables, damage = [], []
    for n, path in sorted(_numbered(run).items()):
        try:
            tables.append((n, _lines(path)))
        except (OSError, ValueError) as error:
            damage.append(str(error) if str(path) in str(error) else f"{path}: {error}")
    tables = [(n, table) for n, table in tables if len(table["step"])]
    if not tables:
        return empty(tuple(damage))
    bounds, first = {}, 0
    for n, table in tables:
        bounds[n] = (first, first := first + len(table["step"]))
    columns = {name: np.concatenate([table[name] for _, table in tables]) for name in FIELDS}
    return Metrics(columns, bounds, tuple(damage))


def _numbered(run: RunDir) -> dict[int, Path]:
    """Attempt -> its file."""
    numbers = {parse_int(path.stem): path for path in sorted_glob(run.metrics, "*.jsonl")}
    return {n: path for n, path in numbers.items() if n is not None}


def newest(run: RunDir) -> dict[str, Any]:
    """The newest complete metric line with all its fields; empty without any line."""
    lines = (line for _, path in sorted(_numbered(run).items(), reverse=True) for line in newest_first(path))
    return next(lines, {})


def _lines(path: Path) -> dict[str, Column]:
    """The columns of one file, without an incomplete last line."""
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
