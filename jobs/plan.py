"""The sweep file is the desired state; this compares it with what exists, and carries the difference out in one commit.

``plan`` decides and touches nothing; ``apply`` is the only thing here that writes. No run directory is ever overwritten
or deleted: it is made whole under a temporary name and renamed, or moved to RUNS_ROOT/.trash/<time>/.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from flip.config.identity import Change, explain, identity
from flip.config.load import dump, read
from flip.config.resolve import DataFacts, Host, adopt, resolve
from flip.config.schema import Config
from flip.exitcodes import ConfigError, FlipError
from flip.results import read_run
from flip.rundir import RunDir, read_json, sync_folder, write_json, write_text
from jobs.cluster import Cluster, Job, Shape, states
from jobs.cost import Cost, Estimate, total
from jobs.disk import unwritable
from jobs.snapshot import Snapshot

KINDS = ("new", "stopped", "running", "waiting", "complete", "failed", "cancelled", "unknown", "changed")
"""What a run is to the plan. ``stopped``: nobody looks after it any more; it goes on from its newest commit."""

_OF_STATE = {"queued": "running"}
"""State of a cluster -> kind, where they differ in name."""

PACKAGES = ("torch", "torchvision", "timm", "numpy", "tokenizers", "omegaconf", "pillow", "simplejpeg", "safetensors")


@dataclass(frozen=True)
class Wanted:
    """A run of the sweep file: resolved, validated, estimated."""

    name: str
    config: Config
    identity: Mapping[str, Any]
    estimate: Estimate
    differs: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Found:
    """What exists of a run: its state and why, and the stored identity (None: it cannot be read)."""

    state: str
    detail: str = ""
    identity: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Action:
    wanted: Wanted
    kind: str
    reason: str = ""
    starts: bool = False
    moves: bool = False
    """Whether the run directory that is there goes to the trash first."""
    changes: Sequence[Change] = ()


@dataclass(frozen=True)
class Plan:
    folder: Path
    """RUNS_ROOT/<sweep>."""
    actions: Sequence[Action]
    dropped: Sequence[str] = ()
    """Runs in the folder that the sweep file no longer has; they are left alone."""

    @property
    def starting(self) -> list[Action]:
        return [action for action in self.actions if action.starts]

    @property
    def cost(self) -> Cost:
        """Of what starts now; a run that goes on is counted whole."""
        return total(action.wanted.estimate.cost for action in self.starting)

    def refuse_changed(self) -> None:
        """ConfigError for the first run whose directory holds another configuration than the sweep file asks for."""
        for action in self.actions:
            if action.kind == "changed" and not action.starts:
                remedy = (
                    "Put the old values back, give the run another name, or say --restart changed, which moves the old"
                    " directory to the trash beside it."
                )
                raise ConfigError(action.reason, str(self.folder / action.wanted.name), remedy=remedy)


def settle(config: Config, on: Host, data: Sequence[DataFacts], path: Path) -> Config:
    """``config`` resolved. Where the run at ``path`` differs from it in the machine alone, it stays that run.

    What follows a machine's cores and memory would else make another run of one that is submitted from elsewhere.
    """
    run, fresh = RunDir(path), resolve(config, on, data)
    try:
        stored = read_json(run.identity)
        if not isinstance(stored, dict):
            return fresh
        kept = resolve(adopt(config, read(run.config)), on, data)
    except (FlipError, OSError, ValueError):  # a damaged run is no help here; the plan says what is wrong with it
        return fresh
    return kept if identity(kept, "")["hash"] == stored.get("hash") else fresh


def observe(folder: Path, names: Collection[str], asking: bool = True) -> tuple[dict[str, Found], list[str]]:
    """(what exists of the named runs, names of other runs there), each run's state by the cluster that it is on.

    With ``asking`` False no scheduler is asked: states are as the files tell.
    """
    here = [RunDir(folder / name) for name in names if (folder / name).exists()]
    known = states(here) if asking else {}
    found = {}
    for run in here:
        try:
            identity = read_json(run.identity)
        except ValueError:
            identity = None
        if run.path in known:
            found[run.name] = Found(known[run.path].state, known[run.path].detail, identity)
        else:
            outcome = read_run(run.path)
            found[run.name] = Found(outcome.state, outcome.reason, identity)
    others = (path.parent.name for path in sorted(folder.glob("[!.]*/identity.json")))
    return found, [name for name in others if name not in names]


def plan(
    wanted: Sequence[Wanted],
    found: Mapping[str, Found],
    folder: Path,
    retry: bool = False,
    restart: bool = False,
    dropped: Sequence[str] = (),
) -> Plan:
    """What to do with each run. ``retry``: start failed and cancelled ones again; ``restart``: replace changed ones."""
    return Plan(folder, [_action(run, found.get(run.name), retry, restart) for run in wanted], dropped)


def _action(wanted: Wanted, found: Found | None, retry: bool, restart: bool) -> Action:
    if found is None:
        return Action(wanted, "new", starts=True)
    kind = _OF_STATE.get(found.state, found.state)
    active = kind in ("running", "waiting", "unknown")
    stored = found.identity
    if stored is None or stored.get("hash") != wanted.identity["hash"]:
        legible = bool(stored and "config" in stored)
        changes = explain(stored, wanted.config) if stored and legible else []
        what = "; ".join(map(str, changes[:5])) + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
        unnamed = "by its hash; no field differs" if legible else "its identity.json cannot be read"
        reason = f"the run directory holds another configuration ({what or unnamed})"
        if active and restart:
            raise ConfigError(reason + f" and is {kind}", wanted.name, remedy="Cancel it first: python jobs/cancel.py")
        return Action(wanted, "changed", reason, restart, restart, changes)
    starts = kind == "stopped" or (retry and kind in ("failed", "cancelled"))
    return Action(wanted, kind, found.detail, starts)


# -- the commit --------------------------------------------------------------------------------------------------------


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One submit at a time per sweep folder, which is made. Raises ConfigError where another is at work."""
    with _named_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "Wait for it, or end it."
            raise ConfigError("another submit is at work on this sweep", str(folder), remedy=remedy) from None
        yield
    finally:
        os.close(handle)


def apply(plan: Plan, snapshot: Snapshot, cluster: Cluster, about: Mapping[str, Any]) -> list[RunDir]:
    """Make the run directories of what starts, then hand them to the cluster; call it under ``lock``.

    All directories are written under temporary names before the first is renamed, so that an error leaves none.
    ``about`` becomes sweep.json, what a report shows of the sweep: name, title, notes, order of runs, expected numbers.
    """
    started = plan.starting
    fresh = [action for action in started if action.kind == "new" or action.moves]
    made: dict[str, Path] = {}
    with _named_errors(plan.folder, made):
        for action in fresh:
            made[action.wanted.name] = temporary = plan.folder / f".new-{action.wanted.name}.{os.getpid()}"
            temporary.mkdir()
            write_text(temporary / "config.yaml", dump(action.wanted.config))
            write_json(temporary / "identity.json", {**action.wanted.identity, **_recorded(snapshot)})
        write_json(plan.folder / "sweep.json", dict(about))
        for action in fresh:
            target = plan.folder / action.wanted.name
            if action.moves:
                trash(target)
            os.rename(made.pop(action.wanted.name), target)
        sync_folder(plan.folder)
        for action in started:
            if action not in fresh:  # the same run to science, but where and how it computes may be new
                write_text(plan.folder / action.wanted.name / "config.yaml", dump(action.wanted.config))
        jobs = [_job(action, plan.folder, snapshot) for action in started]
        cluster.submit(jobs)
    return [job.run for job in jobs]


def _job(action: Action, folder: Path, snapshot: Snapshot) -> Job:
    """The code of a run that merely goes on stays as it was; one that failed or is new gets the code of today."""
    run = RunDir(folder / action.wanted.name)
    code = folder / ".code" / str((read_json(run.identity) or {}).get("code"))
    if action.kind != "stopped" or not code.is_dir():
        code = snapshot.path
        write_json(run.identity, {**(read_json(run.identity) or {}), **_recorded(snapshot)})
    return Job(run, code, shape(action.wanted.config))


def shape(config: Config) -> Shape:
    """What a resolved run asks its cluster for."""
    asked = config.resources
    cpus = asked.cpus or config.compute.threads + config.data.workers
    return Shape(asked.nodes, asked.processes, asked.gpus, cpus, asked.hours)


def _recorded(snapshot: Snapshot) -> dict[str, Any]:
    return {"code": snapshot.digest, "environment": environment()}


def environment() -> dict[str, Any]:
    """Interpreter, platform and package versions, from their metadata: nothing is imported."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": versions}


def trash(path: Path) -> Path:
    """Move a run directory RUNS_ROOT/<sweep>/<run> to RUNS_ROOT/.trash/<time>/<sweep>/<run> and return where."""
    stamp, count = time.strftime("%Y%m%d-%H%M%S"), 0
    while True:
        bin_ = path.parent.parent / ".trash" / (f"{stamp}.{count}" if count else stamp) / path.parent.name
        target = bin_ / path.name
        if not target.exists():
            bin_.mkdir(parents=True, exist_ok=True)
            os.rename(path, target)
            return target
        count += 1


@contextmanager
def _named_errors(folder: Path, made: Mapping[str, Path] | None = None) -> Iterator[None]:
    """Errors of the file system by their names; directories in ``made``, not yet renamed, vanish."""
    try:
        yield
    except OSError as error:
        raise unwritable(error, folder) from error
    finally:
        for path in (made or {}).values():
            shutil.rmtree(path, ignore_errors=True)
