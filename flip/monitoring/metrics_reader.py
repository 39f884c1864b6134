"""The metric lines of a run as columns; 10,000 lines take 10 ms and 1 MB. No torch.

Lines are those of ``flip.runs.metric_lines``. pyarrow parses files whose lines are all valid, ten times as fast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.runs import records
from flip.runs.metric_lines import MetricFile, metric_files
from flip.runs.rundir import RunDir

Column = NDArray[np.float64]
Columns = Mapping[str, Column]

FIELDS = (
    "step", "samples", "seconds", "time", "samples_per_second", "loss", "accuracy", "data_wait", "saving",
    "cpu_seconds",
)  # fmt: skip
"""Fields that are read; NaN if a line lacks one."""

MIN_WINDOWS = 12
STEADY = 0.8
"""Fewest logged windows of a verdict on the speed; smallest ratio of the quartiles of a steady one."""


def is_varying(speeds: Column) -> bool | None:
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
    """A sentence for each file that is unreadable or has damaged lines, which are missing."""

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

    def throughput_varies(self, ends: Sequence[float]) -> bool | None:
        """``is_varying`` of any stage, without the first line of each stage and attempt. ``ends``: S at their ends."""
        rows = np.setdiff1d(self.effective_rows, [first for first, _ in self.bounds.values()])
        rows = rows[self.columns["samples_per_second"][rows] > 0]
        stages = np.searchsorted(ends, self.columns["samples"][rows])
        parts = [self.columns["samples_per_second"][rows[stages == stage][1:]] for stage in np.unique(stages)]
        verdicts = [verdict for part in parts if (verdict := is_varying(part)) is not None]
        if not verdicts:
            return None
        return any(verdicts)

    def last(self, name: str) -> float | None:
        """A field of the newest line that counts; None without a line or value."""
        if not len(self):
            return None
        value = float(self.columns[name][self.effective_rows[-1]])
        if np.isnan(value):
            return None
        return value

    def seconds_at(self, samples_seen: float) -> float | None:
        """Training seconds at the nearest line at or before S = ``samples_seen``."""
        index = int(np.searchsorted(self["samples"], samples_seen, side="right")) - 1
        if index < 0 or np.isnan(self["seconds"][index]):
            return None
        return float(self["seconds"][index])


def empty(damage: tuple[str, ...] = ()) -> Metrics:
    return Metrics({name: np.empty(0) for name in FIELDS}, damage=damage)


def read_columns(run: RunDir) -> Metrics:
    """Read the valid lines of all attempts. Damaged ones and unreadable files are reported in ``damage``."""
    tables: dict[int, dict[str, Column]] = {}
    damage = []
    for n, file in metric_files(run).items():
        try:
            table = _columns(file)
        except (OSError, ValueError) as error:
            damage.append(str(error) if str(file.path) in str(error) else f"{file.path}: {error}")
            continue
        if file.damaged:
            damage.append(f"{file.path}: {file.damaged} damaged lines are left out; {file.problem}")
        if len(table["step"]):
            tables[n] = table
    if not tables:
        return empty(tuple(damage))
    ends = np.cumsum([len(table["step"]) for table in tables.values()]).tolist()
    ranges = zip([0, *ends[:-1]], ends, strict=True)
    bounds = dict(zip(tables, ranges, strict=True))
    columns = {name: np.concatenate([table[name] for table in tables.values()]) for name in FIELDS}
    return Metrics(columns, bounds, tuple(damage))


def _columns(file: MetricFile) -> dict[str, Column]:
    """A column of each field of a file's valid lines."""
    text = file.complete_lines()
    if not text.strip():
        return {name: np.empty(0) for name in FIELDS}
    columns = _parsed_by_pyarrow(text)
    if columns is not None:
        return columns
    lines = list(file)
    return {name: np.array([line.get(name, np.nan) for line in lines], dtype=np.float64) for name in FIELDS}


def _parsed_by_pyarrow(text: bytes) -> dict[str, Column] | None:
    """The columns of complete lines; None if a line may be damaged."""
    import pyarrow
    from pyarrow.json import ParseOptions, ReadOptions, read_json

    if not text.startswith(b"{"):  # pyarrow 26 ends the process if the first value is null
        return None
    integer = pyarrow.int64()
    string = pyarrow.string()
    types = {"step": integer, "samples": integer, "stage": string, "verdict": string}
    names = dict.fromkeys([*FIELDS, *types])
    schema = pyarrow.schema([(name, types.get(name, pyarrow.float64())) for name in names])
    try:
        table = read_json(
            pyarrow.BufferReader(text),
            read_options=ReadOptions(use_threads=False, block_size=max(1 << 20, len(text))),
            parse_options=ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pyarrow.ArrowInvalid:
        return None
    if table["step"].null_count or table["samples"].null_count:
        return None
    columns = {name: table[name].to_numpy() for name in FIELDS}
    if not all(_is_valid(name, column, table[name].null_count) for name, column in columns.items()):
        return None
    return {name: column.astype(np.float64) for name, column in columns.items()}


def _is_valid(name: str, column: NDArray[Any], absent: int) -> bool:
    """Whether the type of a field accepts all its values. ``absent``: lines without it; NaN of others is none."""
    known = column[~np.isnan(column)]
    extremes = []
    if len(known):
        extremes = [known.min().item(), known.max().item()]
    return len(known) + absent == len(column) and all(_fits(name, value) for value in extremes)


def _fits(name: str, value: float) -> bool:
    """Whether ``flip.runs.records.LINE`` accepts the value of a field."""
    try:
        records.checked(value, records.LINE[name])
    except ValueError:
        return False
    return True
