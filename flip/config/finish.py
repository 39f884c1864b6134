"""Finishes a merged configuration: the only sequence of steps from what users write to what a run trains.

``merge`` makes the configuration of layers; ``finish`` resolves, adjusts and validates it. A stored config.yaml is
finished already: ``merge.read_config`` reads it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from flip.common.host import Host
from flip.config.identity import changes_since, concern_only_data, is_same_run
from flip.config.merge import read_config
from flip.config.resolve import DatasetFacts, dataset_facts, inherit_machine_fields, resolve_auto
from flip.config.schema import Config
from flip.config.validate import validate
from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir, read_record


class FinishedConfig(NamedTuple):
    """A configuration that a run can train, and notes about it for the plan."""

    config: Config
    notes: list[str]


def finish(
    config: Config,
    on: Host,
    data: Sequence[DatasetFacts] | None = None,
    runs: Sequence[Path] = (),
    adjust: Callable[[Config], Config] | None = None,
) -> FinishedConfig:
    """Resolve every ``auto`` of a merged configuration, adjust it, and validate the result.

    Args:
        config: as merged; it is not changed.
        on: a node that ranks run on.
        data: facts of the data sets; default: ``dataset_facts``.
        runs: run directories that hold this run; it stays the same run if that is possible.
        adjust: returns the configuration to validate, given the resolved one: for decisions that need more than a
            node, such as the memory of a cluster's GPUs.

    Raises ConfigError with values and a remedy, and DataError, PermissionDenied for the manifests.
    """
    facts = dataset_facts(config) if data is None else data
    resolved = resolve_auto_as_stored(config, on, facts, runs)
    if adjust is not None:
        resolved = adjust(resolved)
    return FinishedConfig(resolved, validate(resolved))


def resolve_auto_as_stored(config: Config, on: Host, data: Sequence[DatasetFacts], runs: Sequence[Path]) -> Config:
    """``config``, resolved so that an existing run at one of ``runs`` stays the same run if possible.

    That is so if only machine-dependent values differ (cores and memory of the submitting machine would otherwise make
    a new run), or only the data.
    """
    fresh = resolve_auto(config, on, data)
    for run in map(RunDir, runs):
        try:
            stored = read_record(run.identity)
            if not isinstance(stored, dict):
                continue
            stable = resolve_auto(inherit_machine_fields(config, read_config(run.config)), on, data)
        except (FlipError, OSError, ValueError):  # a damaged run is reported by the plan
            continue
        if is_same_run(stored, stable) or concern_only_data(changes_since(stored, stable)):
            return stable
    return fresh
