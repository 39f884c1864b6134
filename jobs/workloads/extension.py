"""Continues a changed run from its newest checkpoint with its new values: ``flip submit --changed extend``.

The new values get a run directory of their own, NAME-v2, whose ``init`` extends the run (docs/sweeps.md). Later
submissions of the same sweep recognise it there: the file itself does not need an ``init``.
"""

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from flip.common.plain_data import ConfigChange
from flip.config.identity import changes_since
from flip.config.merge import read_config
from flip.config.schema import Config
from flip.runs import checkpoint_folder
from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir, read_lenient

_OF_EXTENSION = re.compile(r"init\..*|data\.lanes")
"""Settings that belong to the extension itself: the source and its lanes."""


def why_not_extended(run: RunDir, changes: Sequence[ConfigChange]) -> str:
    """Why a run cannot continue from its newest checkpoint with changed settings; empty: it can."""
    try:
        checkpoints = checkpoint_folder.checkpoints(run)
        read_config(run.config)
    except (FlipError, OSError, ValueError) as error:
        return f"its files cannot be read: {error}"
    if not checkpoints:
        return "it has no checkpoint"
    if not changes:
        return "its identity.json cannot be compared"
    fixed = [change.key for change in changes if not _may_change(change.key, checkpoints[-1].stage)]
    if fixed:
        return f"an extended run cannot change {', '.join(fixed)}"
    return ""


def extended(config: Config, run: RunDir) -> Config:
    """``config``, with an ``init`` that continues ``run`` from its newest checkpoint, in the lanes of that run."""
    newest = checkpoint_folder.checkpoints(run)[-1]
    own = deepcopy(config)
    source = str(run.path)
    own.init = replace(Config().init, run=source, stage=newest.stage, samples=newest.samples_seen, extend=True)
    own.data.lanes = read_config(run.config).data.lanes
    return own


def earlier_extensions(config: Config, places: Sequence[Path]) -> Iterator[Config]:
    """``config``, continued as by each fork among the directories of a run (``places``) that extends another of them.

    The newest comes first.
    """
    for place in reversed(places[1:]):
        try:
            stored = read_config(place / "config.yaml")
        except (FlipError, OSError, ValueError):  # the plan reports damaged files
            continue
        if stored.init.extend and Path(stored.init.run).name in {other.name for other in places}:
            own = deepcopy(config)
            own.init = stored.init
            own.data.lanes = stored.data.lanes
            yield own


def notes(config: Config) -> list[str]:
    """What a run that extends another one continues, and a line for each setting that it changes."""
    if not config.init.extend:
        return []
    source = RunDir(config.init.run)
    changes = changes_since(read_lenient(source.identity), config)
    lines = [f"extends {source.path} from S = {config.init.samples} of stage {config.init.stage}"]
    lines += [f"changes {change}" for change in changes if not _OF_EXTENSION.fullmatch(change.key)]
    return lines


def newest_checkpoint(run: RunDir) -> str:
    """The newest checkpoint in words."""
    checkpoints = checkpoint_folder.checkpoints(run)
    if not checkpoints:
        return "it has no checkpoint"
    return f"its newest checkpoint is at S = {checkpoints[-1].samples_seen} of stage {checkpoints[-1].stage}"


def _may_change(key: str, stage: str) -> bool:
    """Whether a run that extends another may have another value: ranks, optimiser, and the schedule of its stage."""
    own = rf"stages\.{re.escape(stage)}\.(samples|mask|base_lr|min_lr|warmup|schedule|cooldown)"
    return bool(re.fullmatch(rf"world|resources\..*|optim\..*|{own}", key)) or bool(_OF_EXTENSION.fullmatch(key))
