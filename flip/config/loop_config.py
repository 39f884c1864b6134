"""The configuration of a loader for a loop without a run: ``flip.batches`` and the adapter for webdataset.

The fields of a run that a loader reads get their values as at a submission. The number of lanes does not depend on the
world size or the machine, so that a loop continues with other ranks.
"""

import operator
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flip.common import user_classes
from flip.common.host import Host
from flip.config.derived import check_position, rank_lanes
from flip.config.finish import finish
from flip.config.merge import merge
from flip.config.resolve import dataset_facts
from flip.config.schema import Config
from flip.runs.errors import ConfigError

DEFAULT_BUFFER = 1 << 33
"""Bytes of raw samples that all ranks together hold for shuffling, if the number of lanes is not given."""
_WHERE = "arguments"
_STAGE = "loop"
_HOST = Host(cores=1, memory=DEFAULT_BUFFER)
"""Decides about fields that no loader reads."""


def loop_config(
    manifest: str | os.PathLike[str], batch: int, start: int, rank: int, world: int, lanes: int | None,
    block: int | None, settings: Mapping[str, Any],
) -> Config:  # fmt: skip
    """A resolved, valid configuration with one stage of this batch.

    ``settings``: further fields by dotted keys. ``lanes`` and ``block``: None for the default. Raises ConfigError,
    DataError or PermissionDenied, also if the numbers do not fit each other.
    """
    data = {
        "data.manifest": path_text(manifest),
        "data.lanes": 0 if lanes is None else whole_number("lanes", lanes, 1),
        "data.buffer": DEFAULT_BUFFER,
    }
    if block is not None:
        data["data.block"] = whole_number("block", block, 1)
    stage = {"name": _STAGE, "batch": whole_number("batch", batch, 1), "samples": batch}
    layer = data | {"stages": [stage], "monitor.hang_minutes": 0}
    start = whole_number("start", start, 0)
    rank = whole_number("rank", rank, 0)
    world = whole_number("world", world, 1)

    def at_world(config: Config) -> Config:
        """After the number of lanes is chosen, which must not depend on the world size."""
        rank_lanes(config.data.lanes, rank, world)
        check_position(start, config.stages[0].batch, config.data.lanes)
        return replace(config, resources=replace(config.resources, nodes=world))

    config = merge([(_WHERE, layer), (_WHERE, settings)])
    if config.augment.steps:
        remedy = "Apply it to the batches of your own loop. Classes in files need a run: flip submit."
        raise ConfigError("flip.batches takes no FILE.py:Class", "augment.steps", config.augment.steps[0], remedy)
    way = config.stages[0].patch_masking
    if user_classes.is_entry(way):
        remedy = "Name a row of PATCH_MASKINGS. Classes in files need a run: flip submit."
        raise ConfigError("flip.batches takes no FILE.py:Class", "patch_masking", way, remedy)
    return finish(config, _HOST, dataset_facts(config, nominal=False), adjust=at_world).config


def path_text(path: str | os.PathLike[str]) -> str:
    """A path as a configuration has it. Other values stay as they are, and are refused there."""
    if isinstance(path, os.PathLike):
        return os.fspath(path)
    return path


def whole_number(name: str, value: Any, least: int) -> int:
    """An argument as an int. Raises ConfigError if it is none, or below ``least``."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ConfigError("must be a whole number", name, value, "Give an int.") from error
    if number < least:
        raise ConfigError(f"must be at least {least}", name, value, f"Give {least} or more.")
    return number
