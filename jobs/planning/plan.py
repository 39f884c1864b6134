"""The sweep file is the desired state; this compares it with what exists. Nothing here writes:
``jobs.submission.apply`` does.

A run whose directory holds another configuration is *changed*. It is refused, or by wish kept as it is, started again
in its place, or forked: NAME-v2, NAME-v3, ... beside it, which from then on is where that configuration lives. Where
nothing but its data is another, it may also go on with that.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from flip.config.host import Host
from flip.config.identity import ConfigChange, diff_identity, digest, identity
from flip.config.merge import read_config
from flip.config.resolve import DatasetFacts, inherit_machine_fields, resolve
from flip.config.schema import Config
from flip.monitoring.results import read_run
from flip.runs import commit
from flip.runs.errors import ConfigError, FlipError
from flip.runs.rundir import RunDir, read_record
from jobs.common.job import JobResources
from jobs.planning.cost import Cost, Estimate, total
from jobs.runs.clusters import states

EVALUATIONS = ".evaluate"
"""Folder of a sweep with the run directories of its evaluations."""


@dataclass(frozen=True)
class ResolvedRun:
    """A run of the sweep file: resolved, validated, estimated."""

    name: str
    config: Config
    identity: Mapping[str, Any]
    estimate: Estimate
    differs: Mapping[str, Any] = field(default_factory=dict)
    against_base: Sequence[ConfigChange] = ()
    given: frozenset[str] = frozenset()
    """Keys that the sweep sets."""
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    cluster: str = ""
    """Name of the profile of the cluster that it starts on."""
    kept: Sequence[ConfigChange] = ()
    """What the sweep file asks for in vain: ``config`` is that of the directory."""


@dataclass(frozen=True)
class ExistingRun:
    """What exists of a run: its state and why, and the stored identity (None: it cannot be read)."""

    state: str
    detail: str = ""
    identity: Mapping[str, Any] | None = None
    cancel: bool = False
    """Whether its cancel.json was there."""

    @property
    def kind(self) -> str:
        return self.state

    @property
    def active(self) -> bool:
        """Whether a process of it may be there, or come."""
        return self.kind in ("queued", "running", "waiting", "unknown")

    def holds(self, wanted: ResolvedRun) -> bool:
        return self.identity is not None and self.identity.get("hash") == wanted.identity["hash"]


@dataclass(frozen=True)
class Action:
    wanted: ResolvedRun
    kind: str
    """``new`` (no folder), ``changed`` (another configuration), or its state, one of ``jobs.common.job.STATES``."""
    reason: str = ""
    starts: bool = False
    moves: bool = False
    """Whether the existing run directory, which is in state ``existing``, goes to the trash first."""
    existing: str = ""
    changes: Sequence[ConfigChange] = ()
    fork: str = ""
    """Name of its directory where that is a fork."""
    adopts: bool = False
    """Whether it goes on in its directory, from now on with the data that are wanted."""

    @property
    def name(self) -> str:
        """Of the run directory."""
        return self.fork or self.wanted.name


@dataclass(frozen=True)
class Plan:
    folder: Path
    """RUNS_ROOT/<sweep>."""
    actions: Sequence[Action]
    dropped: Mapping[str, ExistingRun] = field(default_factory=dict)
    """Runs in the folder that the sweep file no longer has, by name."""
    prunes: bool = False
    """Whether they go to the trash; else they are left alone."""
    left: int = 0
    """Number of runs there that the sweep file has."""
    cancelled: Collection[str] = ()
    """Names of those that were cancelled before this was planned: whose cancel.json came later is not to start."""

    @property
    def starting(self) -> list[Action]:
        return [action for action in self.actions if action.starts]

    @property
    def pruned(self) -> Mapping[str, ExistingRun]:
        return self.dropped if self.prunes else {}

    @property
    def cost(self) -> Cost:
        """Of what starts now; a run that goes on is counted whole."""
        return total(action.wanted.estimate.cost for action in self.starting)

    def refuse_changed(self) -> None:
        """ConfigError for the first run whose directory holds another configuration than the sweep file asks for."""
        for action in self.actions:
            if action.kind == "changed" and not action.starts:
                remedy = (
                    "Put the old values back, or say --changed keep (the run stays as it is), fork (the new one starts"
                    " beside it) or restart (the old one goes to the trash)"
                )
                remedy += ", or data (it goes on with the new data)." if _of_data(action.changes) else "."
                raise ConfigError(action.reason, str(self.folder / action.name), remedy=remedy)

    def refuse_prune(self, most: bool = False) -> None:
        """ConfigError where more than half of what exists would go, unless ``most``, or where a state is unknown."""
        for name, found in self.pruned.items():
            if found.kind == "unknown":
                what = f"nobody knows whether it runs: {found.detail}"
                raise ConfigError(what, str(self.folder / name), remedy="Once its state is known it can be pruned.")
        gone = len(self.pruned)
        if gone > self.left and not most:
            what = f"--prune would move {gone} of {gone + self.left} runs to the trash, more than half"
            remedy = "Is it the right sweep file, with its seeds? If so, add --allow-prune-majority."
            raise ConfigError(what, str(self.folder), ", ".join(self.pruned), remedy)

    def refuse_pinned(self) -> None:
        """ConfigError where a run would go to the trash that has a commit which another one needs."""
        moved = {action.name for action in self.actions if action.starts and action.moves}
        for name in [*self.pruned, *moved]:
            run = RunDir(self.folder / name)
            try:
                needing = {by for by in commit.pin_holders(run) if not _is_over(by)}
            except OSError as error:
                remedy = "Delete that file, if nothing begins from the run any more."
                raise ConfigError(
                    f"who needs its commits cannot be read: {error}", str(run.path), remedy=remedy
                ) from error
            needing -= {self.folder / other for other in self.pruned}
            if needing:
                what = f"may not go to the trash: a commit of it is needed by {', '.join(sorted(map(str, needing)))}"
                remedy = "Wait until that is complete, or prune it too."
                raise ConfigError(what, str(run.path), remedy=remedy)


def _is_over(by: Path) -> bool:
    """Whether nothing goes on any more with an evaluation; a run that failed may be started again."""
    return by.parent.name == EVALUATIONS and read_run(by).state in ("failed", "cancelled")


def forks(name: str, existing: Collection[str], others: Collection[str]) -> list[str]:
    """The forks of a run among existing directories, oldest first; ``others`` are runs by themselves."""
    numbers = [match.group(1) for other in existing if (match := re.fullmatch(rf"{re.escape(name)}-v(\d+)", other))]
    return [fork for number in sorted(numbers, key=int) if (fork := f"{name}-v{number}") not in others]


def resolve_stable(config: Config, on: Host, data: Sequence[DatasetFacts], paths: Sequence[Path]) -> Config:
    """``config`` resolved. Where a run at one of ``paths`` differs from it in the machine alone, it stays that run.

    What follows a machine's cores and memory would else make another run of one that is submitted from elsewhere. It
    stays as it is, too, where the data alone are others.
    """
    fresh = resolve(config, on, data)
    for run in map(RunDir, paths):
        try:
            stored = read_record(run.identity)
            if not isinstance(stored, dict):
                continue
            kept = resolve(inherit_machine_fields(config, read_config(run.config)), on, data)
        except (FlipError, OSError, ValueError):  # a damaged run is no help here; the plan says what is wrong with it
            continue
        if identity(kept, "")["hash"] == stored.get("hash") or _of_data(_changes(stored, kept)):
            return kept
    return fresh


def scan_runs(folder: Path, names: Collection[str], asking: bool = True) -> dict[str, ExistingRun]:
    """What exists of the named runs and of all others there, each run's state by the cluster that it is on.

    With ``asking`` False no scheduler is asked: states are as the files tell.
    """
    there = [path.parent.name for path in sorted(folder.glob("[!.]*/identity.json"))]
    here = [RunDir(folder / name) for name in dict.fromkeys([*names, *there]) if (folder / name).exists()]
    cancelled = {run.name for run in here if os.path.exists(run.cancel)}  # before states: what comes later is news
    known = states(here) if asking else {}
    found = {}
    for run in here:
        try:
            stored = read_record(run.identity)
        except (OSError, ValueError):
            stored = None
        if run.path in known:
            state, detail = known[run.path].state, known[run.path].detail
        else:
            outcome = read_run(run.path)
            state, detail = outcome.state, outcome.reason
        found[run.name] = ExistingRun(state, detail, stored, run.name in cancelled)
    return found


def plan(
    wanted: Sequence[ResolvedRun],
    found: Mapping[str, ExistingRun],
    folder: Path,
    names: Collection[str] = (),
    retry: bool = False,
    changed: str = "",
    prunes: bool = False,
    only: str = "*",
) -> Plan:
    """What to do with each run. ``names``: of all runs that the sweep file has, where ``wanted`` are some of them.

    ``retry``: start failed and cancelled ones again. ``changed``: keep, fork or restart such runs, or go on with other
    data; "": refuse. ``only``: pattern of the names of dropped runs that the plan is about.
    """
    names = {*names, *(run.name for run in wanted)}
    actions = [_action(run, found, names, retry, changed) for run in wanted]
    ours = names.union(*(forks(name, found, names) for name in names))
    dropped = {name: run for name, run in found.items() if name not in ours and fnmatchcase(name, only)}
    left = sum(name in ours for name in found)
    cancelled = {name for name, run in found.items() if run.cancel or run.kind == "cancelled"}
    return Plan(folder, actions, dropped, prunes, left, cancelled)


def _action(
    wanted: ResolvedRun, all_found: Mapping[str, ExistingRun], names: Collection[str], retry: bool, changed: str
) -> Action:
    found, fork = all_found.get(wanted.name), ""
    if found is None:
        return Action(wanted, "new", starts=True)
    forked = forks(wanted.name, all_found, names)
    if not found.holds(wanted):
        fork = next((name for name in reversed(forked) if all_found[name].holds(wanted)), "")
        if not fork:
            return _changed(wanted, found, forked, names, changed)
        found = all_found[fork]
    starts = found.kind == "stopped" or (retry and found.kind in ("failed", "cancelled"))
    kept = f"kept as it is ({_list(wanted.kept, wanted.given)})" if wanted.kept else ""
    return Action(wanted, found.kind, "; ".join(filter(None, [found.detail, kept])), starts, fork=fork)


def _changed(
    wanted: ResolvedRun, found: ExistingRun, forked: Sequence[str], names: Collection[str], changed: str
) -> Action:
    changes, why = _explained(found.identity, wanted)
    reason = f"the run directory holds another configuration ({why})"
    adopts = changed == "data" and _of_data(changes) and found.kind != "complete"
    if (changed == "restart" or adopts) and found.active:
        raise ConfigError(f"{reason} and is {found.kind}", wanted.name, remedy="Cancel it first: python jobs/cancel.py")
    if adopts:
        return Action(wanted, "changed", f"goes on with other data ({why})", True, changes=changes, adopts=True)
    if changed == "fork":
        newest = int(forked[-1].rpartition("-v")[2]) if forked else 1
        free = next(name for n in itertools.count(newest + 1) if (name := f"{wanted.name}-v{n}") not in names)
        beside = f"beside {wanted.name}, which holds another configuration ({why})"
        return Action(wanted, "new", beside, True, changes=changes, fork=free)
    starts = changed == "restart"
    return Action(wanted, "changed", reason, starts, starts, found.kind, changes)


def _changes(stored: Mapping[str, Any] | None, config: Config) -> list[ConfigChange]:
    """On which keys a stored identity differs; empty, too, where it cannot be read."""
    return diff_identity(stored, config) if stored and isinstance(stored.get("config"), dict) else []


def _of_data(changes: Sequence[ConfigChange]) -> bool:
    """Whether they are about the data alone, and there are some."""
    return bool(changes) and all(change.is_other_data for change in changes)


def _explained(stored: Mapping[str, Any] | None, wanted: ResolvedRun) -> tuple[list[ConfigChange], str]:
    """(on which keys a stored identity differs from the one wanted, that in words)."""
    changes = _changes(stored, wanted.config)
    if not stored or not isinstance(stored.get("config"), dict):
        return changes, "its identity.json cannot be read"
    words = [_list(changes, wanted.given)] if changes else []
    if digest(stored["config"]) != stored.get("hash"):
        words.append(
            "the text of its identity.json does not give its hash: edited, or of another version of the toolkit"
        )
    return changes, "; ".join(words)


def _list(changes: Sequence[ConfigChange], given: Collection[str], most: int = 5) -> str:
    """Changes in words; a key that nobody set did not move in the sweep file."""
    told = [
        f"{change}"
        if change.key in given or change.key == "world"
        else f"{change}, which the sweep does not set: a default moved"
        for change in changes[:most]
    ]
    return "; ".join(told) + (f"; and {len(changes) - most} more" if len(changes) > most else "")


def resources_of(config: Config) -> JobResources:
    """What a resolved run asks its cluster for."""
    asked = config.resources
    cpus = asked.cpus or config.compute.threads + config.data.workers
    return JobResources(asked.nodes, asked.processes, asked.gpus, cpus, asked.hours)
