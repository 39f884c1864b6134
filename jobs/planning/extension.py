"""The entry of a sweep file that continues a changed run from its newest commit (``init.extend``, docs/sweeps.md)."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flip.config.identity import ConfigChange
from flip.config.merge import read_config
from flip.runs import commit
from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir


def extending_entry(run: RunDir, differs: Mapping[str, Any], changes: Sequence[ConfigChange]) -> str:
    """The line for ``runs`` of the sweep file; empty if the run has no commit, or if a change forbids to extend it.

    ``differs``: the settings by which the run differs from the base of its sweep.
    """
    try:
        commits = commit.commits(run)
        lanes = read_config(run.config).data.lanes
    except (FlipError, OSError, ValueError):  # the plan reports damaged files
        return ""
    if not commits or not changes or not all(_may_change(change.key, commits[-1].stage) for change in changes):
        return ""
    newest = commits[-1]
    settings = {"data.lanes": lanes, **{key: value for key, value in differs.items() if not key.startswith("init.")}}
    fields = "".join(f", {key}: {json.dumps(value)}" for key, value in settings.items())
    init = f"{{run: {run.name}, stage: {newest.stage}, samples: {newest.samples_seen}, extend: true}}"
    return f"{run.name}-more: {{init: {init}{fields}}}"


def newest_commit(run: RunDir) -> str:
    """The newest commit in words."""
    commits = commit.commits(run)
    if not commits:
        return "it has no commit"
    return f"its newest commit is at S = {commits[-1].samples_seen} of stage {commits[-1].stage}"


def _may_change(key: str, stage: str) -> bool:
    """Whether a run that extends another may have another value: ranks, optimiser, and the schedule of its stage."""
    own = rf"stages\.{re.escape(stage)}\.(samples|mask|base_lr|min_lr|warmup|schedule|cooldown)"
    return bool(re.fullmatch(rf"world|resources\..*|optim\..*|{own}", key))
