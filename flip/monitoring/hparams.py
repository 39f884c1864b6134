"""A run's hyperparameters as TensorBoard's hparams plugin reads them, from the run's own event file.

``SummaryWriter.add_hparams`` would make another run in a folder below; here the run itself gets a row. The metrics of
that row are scalars of the run, so the last score and loss stand in it and nothing is written twice.
"""

from __future__ import annotations

from typing import Any

from torch.utils.tensorboard.summary import hparams

from flip.config.identity import flatten
from flip.config.merge import to_dict
from flip.config.schema import Config
from flip.evaluation.task import COLUMNS, curve

_LEFT_OUT = ("schema", "checkpoint", "evaluate", "monitor")
"""Sections that say nothing of the model or its speed."""


def start(config: Config) -> list[Any]:
    """The summaries at a run's begin: which hyperparameters and metrics there are, and the run's values."""
    names = [curve(item.name + end, item.task) for item in config.evaluate.sets for end in COLUMNS[item.task]]
    experiment, session, _ = hparams(values(config), dict.fromkeys([*names, "train/loss", "speed/samples_per_second"]))
    return [experiment, session]


def end() -> Any:
    """The summary of a run that is complete."""
    return hparams({}, {})[2]


def values(config: Config) -> dict[str, Any]:
    """Dotted key -> number, text or truth; lists as text. Stages and data sets go by their names."""
    tree = {section: value for section, value in to_dict(config).items() if section not in _LEFT_OUT}
    found = flatten(tree)
    return {key: v if isinstance(v, (bool, int, float, str)) else str(v) for key, v in found.items() if v != ""}
