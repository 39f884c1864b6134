"""Compares the runs of a sweep file with the existing run directories. Writes nothing: ``jobs.submission.apply`` does.

A run whose directory holds another configuration is *changed*. It is refused or, with ``--changed``, kept as it is,
restarted in its place, or forked: the new configuration gets the directory NAME-v2, NAME-v3, ... A fork starts anew or,
with ``extend``, continues the changed run. If only its data have changed, it may also continue with the new data.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flip.common.plain_data import ConfigChange, digest
from flip.runs import checkpoint_folder
from flip.runs.errors import ConfigError
from flip.runs.lifecycle import ENDED, FINAL
from flip.runs.remote_owner import InheritedFolder, inherited
from flip.runs.rundir import RunDir, read_record
from jobs.common.submitter import other_submitter
from jobs.planning.run_cost import Cost, total
from jobs.submitted_runs.clusters import states
from jobs.sweeps.sweep_file import is_chosen
from jobs.workloads import submitted
from jobs.workloads.workload import SweepRun, forks


@dataclass(frozen=True)
class ExistingRun:
    """An existing run: its state and why, the stored identity (None: unreadable), whether cancel.json existed.

    ``submitter``: another user who submitted the original of a copied run, as ``jobs.common.submitter`` names it.
    ``defect``: why the identity is unreadable, or of which format it is.
    """

    state: str
    reason: str = ""
    identity: Mapping[str, Any] | None = None
    cancel: bool = False
    submitter: str = ""
    defect: str = ""

    @property
    def active(self) -> bool:
        """Whether a process of it may exist or start."""
        return self.state not in ENDED

    def matches(self, wanted: SweepRun) -> bool:
        if self.identity is None:
            return False
        return wanted.matches(self.identity)


@dataclass(frozen=True)
class PlanOptions:
    """The options of a submission that decide about existing runs."""

    retry: bool = False
    """Restart failed and cancelled runs."""
    changed: str = ""
    """keep, extend, fork, restart, data; empty: refuse changed runs. With ``extend`` the configuration of each that can
    be extended has its ``init`` already."""
    prunes: bool = False
    """Runs that are no longer in the sweep file go to the trash."""
    only: str = "*"
    """Patterns of the names of such runs to include."""


REFUSE_CHANGED = PlanOptions()


@dataclass(frozen=True)
class Action:
    """What happens to one run.

    ``kind``: ``new`` (no folder), ``changed`` (another configuration), or the state of the run, one of
    ``flip.runs.lifecycle.STATES``. ``moves``: the existing directory, in state ``existing``, goes to the trash first.
    ``fork``: name of the directory if it is a fork. ``adopts``: it continues in its directory with new data.
    ``submitter``: as in ``ExistingRun``: nothing that came with the copy is executed.
    """

    wanted: SweepRun
    kind: str
    reason: str = ""
    starts: bool = False
    moves: bool = False
    existing: str = ""
    changes: Sequence[ConfigChange] = ()
    fork: str = ""
    adopts: bool = False
    submitter: str = ""

    @property
    def identity_hash(self) -> str:
        return str(self.wanted.identity["hash"])

    @property
    def lacks_checkpoint(self) -> bool:
        """Whether the checkpoint that it starts from does not exist yet. Only dry runs plan such a run."""
        return self.starts and self.wanted.lacks_checkpoint

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return self.fork or self.wanted.name


@dataclass(frozen=True)
class Plan:
    """What a submission does in ``folder``, RUNS_ROOT/<sweep>.

    ``dropped``: existing runs that the sweep file no longer has; with ``prunes`` they go to the trash. ``left``: number
    of existing runs that it has. ``cancelled``: names of runs that were cancelled before the plan was made; a run whose
    cancel.json is newer does not start.
    """

    folder: Path
    actions: Sequence[Action]
    dropped: Mapping[str, ExistingRun] = field(default_factory=dict)
    prunes: bool = False
    left: int = 0
    cancelled: Collection[str] = ()

    @property
    def starting(self) -> list[Action]:
        return [action for action in self.actions if action.starts]

    @property
    def copied(self) -> Mapping[str, str]:
        """Runs that continue as copies of another user's run -> that user."""
        continuing = [action for action in self.starting if not action.moves]
        return {action.name: action.submitter for action in continuing if action.submitter}

    @property
    def inherited(self) -> Mapping[str, list[InheritedFolder]]:
        """Runs that continue -> the remote folders with checkpoints that they have inherited, if any."""
        folders_by_run = {}
        for action in self.starting:
            url = action.wanted.checkpoints.url
            if not url or action.kind == "new" or action.moves:
                continue
            run = RunDir(self.folder / action.name)
            folders = inherited(run, url, checkpoint_folder.checkpoints(run))
            if folders:
                folders_by_run[action.name] = folders
        return folders_by_run

    @property
    def pruned(self) -> Mapping[str, ExistingRun]:
        if self.prunes:
            return self.dropped
        return {}

    @property
    def cost(self) -> Cost:
        """Of the runs that start now; a run that continues counts in full."""
        return total(action.wanted.estimate.cost for action in self.starting)

    def refuse_changed(self) -> None:
        """ConfigError for the first run whose directory holds another configuration than the sweep file asks for."""
        for action in self.actions:
            if action.kind == "changed" and not action.starts:
                ways = "keep (the run stays as it is), fork (a new run starts next to it)"
                ways += " or restart (the old run goes to the trash)"
                if action.wanted.adopts(action.changes):
                    ways += ", or data (it continues with the new data)"
                why = self.why_not_extended(action)
                if not why:
                    ways += ", or extend (a new run continues from its newest checkpoint with the new values)"
                remedy = f"Restore the old values, or use --changed {ways}."
                if why:
                    remedy += f" It cannot be extended: {why}."
                raise ConfigError(action.reason, str(self.folder / action.name), remedy=remedy)

    def why_not_extended(self, action: Action) -> str:
        """Why ``--changed extend`` cannot continue a changed run; empty: it can."""
        return action.wanted.why_not_extended(RunDir(self.folder / action.name), action.changes)

    def refuse_prune(self, most: bool = False) -> None:
        """ConfigError if more than half of the existing runs would go, unless ``most``, or if a state is unknown."""
        for name, run in self.pruned.items():
            if run.state == "unknown":
                what = f"it is unknown whether it runs: {run.reason}"
                raise ConfigError(what, str(self.folder / name), remedy="Once its state is known it can be pruned.")
        gone = len(self.pruned)
        if gone > self.left and not most:
            what = f"--prune would move {gone} of {gone + self.left} runs to the trash, more than half"
            remedy = "Is it the right sweep file, with its seeds? If so, add --allow-prune-majority."
            raise ConfigError(what, str(self.folder), ", ".join(self.pruned), remedy)

    def refuse_pinned(self) -> None:
        """ConfigError if a run would go to the trash of which another run needs a checkpoint."""
        moved = {action.name for action in self.actions if action.starts and action.moves}
        for name in [*self.pruned, *moved]:
            run = RunDir(self.folder / name)
            try:
                holders = checkpoint_folder.pin_holders(run)
            except OSError as error:
                what = f"who needs its checkpoints cannot be read: {error}"
                remedy = "Delete that file if no run needs them."
                raise ConfigError(what, str(run.path), remedy=remedy) from error
            holders -= {self.folder / other for other in self.pruned}
            if holders:
                what = (
                    f"may not go to the trash: a checkpoint of it is needed by {', '.join(sorted(map(str, holders)))}"
                )
                remedy = "Wait until that is complete, or prune it too."
                release = [submitted.of_run(RunDir(holder)).release() for holder in sorted(holders)]
                remedy = " ".join([remedy, *list(filter(None, release))[:1]])
                raise ConfigError(what, str(run.path), remedy=remedy)


def scan_runs(folder: Path, names: Collection[str]) -> dict[str, ExistingRun]:
    """The named runs and all others in the folder, each with the state from its own cluster."""
    present = [path.parent.name for path in sorted(folder.glob("[!.]*/identity.json"))]
    runs = [RunDir(folder / name) for name in dict.fromkeys([*names, *present]) if (folder / name).exists()]
    cancelled = {run.name for run in runs if os.path.exists(run.cancel)}  # before states: a later cancel is new
    state_by_run = states(runs)
    existing = {}
    for run in runs:
        stored = None
        defect = ""
        try:
            stored = read_record(run.identity)
        except (OSError, ValueError) as error:
            defect = str(error)
        state = state_by_run[run.path]
        submitter = other_submitter(run)
        existing[run.name] = ExistingRun(state.state, state.reason, stored, run.name in cancelled, submitter, defect)
    return existing


def compare(
    wanted: Sequence[SweepRun],
    existing: Mapping[str, ExistingRun],
    folder: Path,
    names: Collection[str] = (),
    options: PlanOptions = REFUSE_CHANGED,
) -> Plan:
    """What to do with each run. ``names``: of all runs in the sweep file, if ``wanted`` is a selection."""
    names = {*names, *(run.name for run in wanted)}
    forked = forks(existing, names)
    actions = [_action(run, existing, forked.get(run.name, ()), names, options) for run in wanted]
    own = names.union(*(forked.get(name, ()) for name in names))
    dropped = {name: run for name, run in existing.items() if name not in own and is_chosen(name, options.only)}
    left = sum(name in own for name in existing)
    cancelled = {name for name, run in existing.items() if run.cancel or run.state == "cancelled"}
    return Plan(folder, actions, dropped, options.prunes, left, cancelled)


def _action(
    wanted: SweepRun,
    all_existing: Mapping[str, ExistingRun],
    forked: Sequence[str],
    names: Collection[str],
    options: PlanOptions,
) -> Action:
    existing = all_existing.get(wanted.name)
    fork = ""
    if existing is None:
        return Action(wanted, "new", starts=True)
    if not existing.matches(wanted):
        fork = next((name for name in reversed(forked) if all_existing[name].matches(wanted)), "")
        if not fork:
            return _changed(wanted, all_existing, forked, names, options.changed)
        existing = all_existing[fork]
    starts = existing.state == "stopped" or (options.retry and existing.state in ("failed", "cancelled"))
    unchanged = ""
    if wanted.ignored_changes:
        unchanged = f"kept as it is ({wanted.in_words(wanted.ignored_changes)})"
    outdated = ""
    if existing.state == "complete":
        outdated = wanted.outdated(existing.identity or {})
    reason = "; ".join(filter(None, [existing.reason, unchanged, outdated]))
    return Action(wanted, existing.state, reason, starts, fork=fork, submitter=existing.submitter)


def _changed(
    wanted: SweepRun,
    all_existing: Mapping[str, ExistingRun],
    forked: Sequence[str],
    names: Collection[str],
    changed: str,
) -> Action:
    """The action for a run whose configuration neither its directory nor a fork of it holds."""
    latest = forked[-1] if forked else ""  # a run is stored in its newest fork
    name = latest or wanted.name
    existing = all_existing[latest or wanted.name]
    changes, why = _explained(existing, wanted)
    reason = f"the run directory holds another configuration ({why})"
    adopts = changed == "data" and wanted.adopts(changes) and existing.state != "complete"
    extends = changed == "extend" and wanted.extends
    may_go_on = extends and existing.state not in FINAL  # a local supervisor starts stopped runs of its sweep
    if may_go_on or ((changed == "restart" or adopts) and existing.active):
        raise ConfigError(
            f"{reason} and is {existing.state}", name, remedy=f"Cancel it first: flip cancel SWEEP/{name}"
        )
    if adopts:
        reason = f"continues with other data ({why})"
        return Action(
            wanted, "changed", reason, True, changes=changes, fork=latest, adopts=True, submitter=existing.submitter
        )  # fmt: skip
    if changed == "fork" or extends:
        newest = int(latest.rpartition("-v")[2]) if latest else 1
        free = next(each for n in itertools.count(newest + 1) if (each := f"{wanted.name}-v{n}") not in names)
        if extends:
            reason = f"continues {name} with other values ({why})"
        else:
            reason = f"next to {name}, which holds another configuration ({why})"
        return Action(wanted, "new", reason, True, changes=changes, fork=free)
    starts = changed == "restart"
    return Action(wanted, "changed", reason, starts, starts, existing.state, changes, latest)


def _explained(existing: ExistingRun, wanted: SweepRun) -> tuple[list[ConfigChange], str]:
    """(changes of a stored identity, the same in words)."""
    stored = existing.identity
    changes = wanted.changes_since(stored)
    if not stored or not isinstance(stored.get("config"), dict):
        return changes, existing.defect or "its identity.json cannot be read"
    sentences = []
    if changes:
        sentences = [wanted.in_words(changes)]
    if digest(stored["config"]) != stored.get("hash"):
        sentences.append("the text of its identity.json does not match its hash: it was edited")
    return changes, "; ".join(sentences)
