"""The logged steps of a run as a table with all their fields: ``flip.read_metrics``. No torch.

``flip.monitoring.metrics_reader`` reads the few fields that reports need, and faster.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flip.config.identity import flatten
from flip.runs import records
from flip.runs.errors import ConfigError, DataError
from flip.runs.files import open_regular
from flip.runs.rundir import RunDir, parse_int, sorted_glob


def read_metrics(run: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """The logged steps of the run directory ``run``: field -> a value per step, ready for a data frame.

    Each step stands once, by its newest attempt, in order. Fields are those of metric lines (docs/monitoring.md), such
    as step, samples, stage, attempt, loss, accuracy, lr and samples_per_second; those of groups are dotted
    (``shares.compute``). None: the step has no such value. Empty before the first logged step.
    Raises ConfigError if ``run`` is no run directory, DataError if a line is damaged.
    """
    folder = RunDir(run)
    if not folder.identity.is_file():
        raise ConfigError("is no run directory", str(run), remedy="Name one, such as runs/quickstart/masked.")
    steps: dict[int, dict[str, Any]] = {}
    numbered = {parse_int(path.stem): path for path in sorted_glob(folder.metrics, "*.jsonl")}
    for n in sorted(n for n in numbered if n is not None):
        for line in _lines(numbered[n]):
            steps[line["step"]] = {"attempt": n, **flatten(line)}
    rows = [steps[step] for step in sorted(steps)]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The complete lines of one attempt: a process that was killed may leave a part of a line at the end."""
    with open_regular(path) as file:
        lines = file.read().split(b"\n")
    for number, text in enumerate(lines[:-1], 1):
        try:
            line = records.checked(records.parse(text), records.LINE)
            yield {"step": line["step"], **line}
        except (ValueError, KeyError) as error:
            raise DataError(f"line {number} cannot be read: {error}", str(path)) from error
