"""``flip.submit`` and ``flip.plan``: a sweep from Python, as ``flip submit`` and its ``--dry-run`` do from a shell."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flip.monitoring.results import read_runs
from flip.runs.errors import StorageError
from flip.runs.lifecycle import ENDED, FINAL, RunState
from flip.runs.rundir import RunDir
from jobs.submission.request import SubmitOptions
from jobs.submission.submission import Submission
from jobs.submitted_runs import clusters

_SHOWN = 5
"""Names in the repr of submitted runs."""
_Changed = Literal["keep", "extend", "fork", "restart", "data"]


@dataclass(frozen=True, repr=False)
class SubmittedRuns:
    """The runs of a submitted sweep. They do not depend on this process: it may end before them."""

    folder: Path
    """RUNS_ROOT/<sweep>."""
    names: tuple[str, ...]

    def __repr__(self) -> str:
        shown = ", ".join(self.names[:_SHOWN])
        if len(self.names) > _SHOWN:
            shown += f" and {len(self.names) - _SHOWN} more"
        return f"<SubmittedRuns {self.folder}: {shown}>"

    @property
    def runs(self) -> list[RunDir]:
        return [RunDir(self.folder / name) for name in self.names]

    def states(self) -> dict[str, RunState]:
        """Run -> its state now."""
        state_by_run = clusters.states(self.runs)
        return {run.name: state_by_run[run.path] for run in self.runs}

    def wait(self, timeout: float | None = None) -> dict[str, RunState]:
        """Return the states when every run is complete, failed, cancelled or stopped.

        Raises TimeoutError after ``timeout`` seconds; the runs continue.
        """
        if timeout is None:
            limit = float("inf")
        else:
            limit = time.monotonic() + timeout
        while True:
            states = self.states()
            active = [name for name, state in states.items() if state.state not in ENDED]
            if not active:
                return states
            if time.monotonic() >= limit:
                raise TimeoutError(f"not ended within {timeout:g} s: {', '.join(active)}")
            time.sleep(min(clusters.poll_interval(self.runs), max(0.0, limit - time.monotonic())))

    def results(self) -> list[dict[str, Any]]:
        """A row per run, as ``flip.read_runs`` gives it."""
        return [row for row in read_runs(self.folder, clusters.seen(self.runs)) if row["run"] in self.names]

    def cancel(self, why: str = "") -> None:
        """Save and stop the runs that have not ended; they do not start again by themselves."""
        states = self.states()
        clusters.request_cancel([run for run in self.runs if states[run.name].state not in FINAL], why)


def submit(
    sweep: str | os.PathLike[str],
    cluster: str | None = "local",
    *,
    only: str | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    changed: _Changed | None = None,
    retry: bool = False,
    yes: bool = False,
) -> SubmittedRuns:
    """Start the missing runs of a sweep and print the plan; complete and running runs are left alone.

    Args:
        sweep: the sweep file, or its name in sweeps/.
        cluster: the profile; None: the sweep's.
        only: shell patterns of run names, separated by spaces.
        seeds: start every run once per seed.
        overrides: ``KEY=VALUE`` each.
        changed: what to do with runs whose configuration has changed; None: refuse.
        retry: restart failed and cancelled runs.
        yes: do not ask for confirmation.

    Raises:
        FlipError: the message of the command. Nothing was started, unless it says how many runs were.
    """
    options = SubmitOptions(
        sweep=os.fspath(sweep), cluster=cluster, only=only, seeds=None if seeds is None else list(seeds),
        overrides=list(overrides), changed=changed, retry=retry, yes=yes, watch=True,
    )  # fmt: skip
    submission = Submission(options)
    _, paths = submission.run()
    if paths is None:
        raise StorageError("the state of no run is known", str(submission.folder), remedy="Submit again later.")
    return SubmittedRuns(submission.folder, tuple(path.name for path in paths))


def plan(
    sweep: str | os.PathLike[str],
    cluster: str | None = "local",
    *,
    only: str | None = None,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    changed: _Changed | None = None,
    retry: bool = False,
    yes: bool = False,
) -> dict[str, Any]:
    """What ``submit`` with the same arguments would do, its checks and its cost. Prints, writes and starts nothing.

    Returns:
        the document of ``flip submit SWEEP --dry-run --json`` (docs/automation.md): ``runs``, ``cost``, ``checks`` and
        more. ``yes`` changes nothing: ``question`` is what it would confirm.

    Raises:
        FlipError: the message of the command.
    """
    options = SubmitOptions(
        sweep=os.fspath(sweep), cluster=cluster, only=only, seeds=None if seeds is None else list(seeds),
        overrides=list(overrides), changed=changed, retry=retry, yes=yes, dry_run=True, json=True,
    )  # fmt: skip
    return Submission(options).plan()
