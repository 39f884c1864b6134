"""The logged steps of a run as a table with all their fields: ``flip.read_metrics``. No torch.

``flip.monitoring.metrics_reader`` has columns of the few fields that reports need, and is faster.
"""

import os
from typing import Any

from flip.common.plain_data import flatten
from flip.runs.errors import ConfigError, DataError
from flip.runs.metric_lines import metric_files
from flip.runs.rundir import RunDir


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
    for n, file in metric_files(folder).items():
        for line in file:
            steps[line["step"]] = {"attempt": n, **flatten(line)}
        if file.damaged:
            raise DataError(file.problem, str(file.path))
    rows = [steps[step] for step in sorted(steps)]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
