"""The interface of experiment trackers, and the table of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from flip.files import python_path
from flip.files.creation import open_append
from jobs.common.paths import REPOSITORY

if TYPE_CHECKING:
    from flip.runs.rundir import RunDir

TRACKERS = {"wandb": "jobs.tracking.wandb_tracker:WandbTracker"}
"""Name of a tracker, which is also its field of ``monitor`` -> MODULE:CLASS."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is given about a run."""

    id: str
    """Letters and digits; the same in all attempts, another for a copy of the run directory."""
    project: str
    """The value of ``monitor.<tracker>``."""
    name: str
    group: str
    """The sweep."""
    config: Mapping[str, Any]
    """The resolved configuration, dotted key -> value, without credentials in addresses."""
    folder: Path
    """The tracker's own folder in the run directory; may not exist yet."""


class Tracker(Protocol):
    """A connection to a tracker, for one run.

    Errors are raised as FlipErrors: StorageError if it may pass, ConfigError if the user must act.
    """

    def open(self, run: TrackedRun, step: int) -> int:
        """Start or continue the run, and return the last step that the tracker holds; -1: none.

        ``step``: the last step when the tracker was closed for the last time, -1 at first. It holds more if its process
        was killed since, unless it discards them.
        """

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values at a step. Steps increase. ``samples`` (S) and ``time`` are among the values."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Replace the results of the run."""

    def close(self) -> None:
        """Return when everything is recorded."""


def warnings(names: Iterable[str]) -> list[str]:
    """A sentence per tracker whose package this Python lacks."""
    text = "monitor.{0}: {0} is not installed for this Python: nothing will be sent until it is (pip install {0})"
    return [text.format(name) for name in names if find_spec(name) is None]


def start_follower(run: RunDir, n: int, tracker: str) -> subprocess.Popen[bytes]:
    """Start a follower of attempt n in its own session. Its output goes to ``logs/<n>/follow-<tracker>.log``."""
    command = [sys.executable, "-m", "jobs.follow", str(run.path), "--attempt", str(n), "--tracker", tracker]
    with open_append(run.logs / str(n) / f"follow-{tracker}.log") as output:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env={**os.environ, **python_path.variables(REPOSITORY)}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip


def load_tracker(name: str) -> Tracker:
    """A new connection to the tracker of this name."""
    module, _, kind = TRACKERS[name].partition(":")
    return cast(Tracker, getattr(import_module(module), kind)())
