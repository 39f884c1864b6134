"""A plan as text for people and as JSON for programs."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from itertools import count as count_from
from pathlib import Path
from typing import Any

from flip.runs.checks import UNKNOWN, Check
from flip.runs.remote_owner import InheritedFolder
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import Job
from jobs.common.terminal import Page, TextTable, Verbatim
from jobs.common.text import count, duration, inherited_text, plain
from jobs.planning.run_cost import assumption, makespan
from jobs.submission.dry_run import PlannedJob
from jobs.submission.plan import Action, Plan
from jobs.sweeps.sweep_file import Sweep

DROPPED = ("FLOPs", "steps", "parameters", "cluster", "price", "", "attempts", "samples", "GPU-hours", "wall-clock")
"""Columns that a narrow terminal does not show; the first one disappears first."""

OF_TRAININGS = ("parameters", "samples", "steps", "FLOPs")
"""Columns that a plan of programs alone does not have."""


@dataclass(frozen=True)
class PlanView:
    """A plan, and what is shown with it."""

    plan: Plan
    sweep: Sweep
    profile: ClusterProfile
    """That of runs which name none."""
    checks: Mapping[Check, Sequence[str]] = field(default_factory=dict)
    """Row -> its runs; none: all."""
    question: str = ""
    """Which is asked before anything starts."""
    batches: Sequence[PlannedJob] = ()
    """The jobs that Slurm would get."""
    script: bool = False
    """Whether their batch scripts are shown."""
    files: Sequence[Path] = ()
    """The sweep file and cluster profiles."""
    takes_over: bool = False
    """Whether --take-over is given."""


def summary(view: PlanView) -> Page:
    """One line per run, and the totals of the runs that start."""
    plan = view.plan
    if plan.actions and all(action.kind == "complete" for action in plan.actions):
        runs = f"all {len(plan.actions)} runs"
        if len(plan.actions) == 1:
            runs = "its only run"
        done = f"{view.sweep.name}: complete, {runs}; nothing to start."
        reasons = [f"{action.name}: {action.reason}" for action in plan.actions if action.reason]
        return Page("\n".join([done, *reasons]), *_dropped(plan))
    overview = _overview(plan, view.profile)
    head = _head(view)
    inherited = _inherited(plan, view.takes_over)
    return Page(head, overview, *_dropped(plan), *_copied(plan), *inherited, *_warnings(plan), *_advice(plan))


def details(view: PlanView) -> Page:
    """All details of every run, the totals, the Slurm jobs, and the checks."""
    plan = view.plan
    lines: list[str | TextTable] = [_head(view)]
    for same in _designs(plan):
        lines += ["", *_run(same)]
    lines += ["", "all runs", _overview(plan, view.profile)]
    lines += [f"  {assumption(view.profile, _hours(plan))}", *_dropped(plan)]
    lines += [*_copied(plan), *_inherited(plan, view.takes_over), *_advice(plan)]
    if view.question:
        lines += ["", f"asked first: {view.question}"]
    lines += _batches(view.batches, view.script)
    for head, skipped in (("checked", False), ("not checked here", True)):
        rows = [(row, names) for row, names in view.checks.items() if (row.state == UNKNOWN) == skipped]
        seen = [f"  {row.name}{_about(names)}: {row.text}" for row, names in rows]
        if seen:
            lines += ["", f"{head}:", *seen]
    return Page(*lines, "", "dry run: nothing was written, nothing started.")


def _batches(batches: Sequence[PlannedJob], script: bool) -> list[str]:
    lines = []
    if batches:
        lines = ["", "batch jobs:"]
    for batch in batches:
        shape = batch.shape
        gpus = ""
        if shape.gpus:
            gpus = f", {shape.gpus} GPUs a node"
        if shape.allocation == "1":
            nodes = "1 node"
        else:
            nodes = f"{shape.allocation} nodes"
        start = ""
        if batch.start:
            start = f"; {batch.start}"
        lines.append(f"  {nodes}, {shape.processes} ranks a node{gpus}, {shape.hours:g} h: {_some(batch.runs)}{start}")
        if script:
            lines += ["", Verbatim(batch.script.rstrip()), ""]
    if script and lines:
        return lines[:-1]
    return lines


def _copied(plan: Plan) -> list[str]:
    """Lines about runs that another user has submitted."""
    text = "{}: a copy of a run of {}: it continues with the current code, because what was copied is not executed"
    return [plain(text.format(name, user)) for name, user in plan.copied.items()]


def _inherited(plan: Plan, takes_over: bool) -> list[str]:
    """Lines about the remote folders with checkpoints that runs have inherited."""
    lines = []
    for name, folders in plan.inherited.items():
        for folder in folders:
            lines.append(plain(f"{name}: {inherited_text(folder.as_dict(), takes_over)}"))
    return lines


def _some(names: Sequence[str]) -> str:
    if len(names) <= 5:
        return ", ".join(names)
    return f"{len(names)} runs, {names[0]} to {names[-1]}"


def _about(names: Sequence[str]) -> str:
    if names:
        return f" ({_some(names)})"
    return ""


def _head(view: PlanView) -> str:
    plan = view.plan
    sweep = view.sweep
    profile = view.profile
    title = ""
    if sweep.title:
        title = f": {plain(sweep.title)}"
    if len(plan.actions) == 1:
        runs = "1 run"
    else:
        runs = f"{len(plan.actions)} runs"
    clusters = ", ".join(cluster_names(plan)) or profile.name
    kind = ""
    if clusters == profile.name:
        kind = f" ({profile.kind})"
    read = ""
    if view.files:
        read = f"\nread from {' and '.join(map(str, view.files))}"
    return f"{sweep.name}{title}\n{runs} on {clusters}{kind}, below {plan.folder}{read}"


def cluster_names(plan: Plan) -> list[str]:
    """Names of the profiles of the runs."""
    return list(dict.fromkeys(action.wanted.cluster for action in plan.actions if action.wanted.cluster))


def _overview(plan: Plan, profile: ClusterProfile) -> str | TextTable:
    if not plan.actions:
        return "  no run of the sweep file matches --only"
    rows = [_row(same) for same in _designs(plan)]
    if len(starting := [action.wanted.estimate for action in plan.starting]) > 1:
        attempts = [estimate.attempts for estimate in starting]
        hours = None
        if len(cluster_names(plan)) < 2:
            hours = makespan([e.wall_hours for e in starting], profile)
        total_attempts = None
        if None not in attempts:
            total_attempts = sum(filter(None, attempts))
        total = _time(hours, total_attempts)
        rows.append({**dict.fromkeys(rows[0]), "run": "total to start", **plan.cost.cells(), **total, "": ""})
    hidden = set()
    if not any(action.wanted.estimate.cost.gpu_hours for action in plan.actions):
        hidden.add("GPU-hours")
    if len(cluster_names(plan)) < 2:
        hidden.add("cluster")
    hidden.update(key for key in OF_TRAININGS if all(row[key] is None for row in rows))
    rows = [{key: value for key, value in row.items() if key not in hidden} for row in rows]
    return TextTable(rows, cut={"state": 8, "": 12}, drop=DROPPED, indent="  ")


def _designs(plan: Plan) -> list[list[Action]]:
    """The actions, those together that are alike and differ only in the seed, in the order of their first."""
    designs: dict[tuple[Any, ...], list[Action]] = {}
    for action in plan.actions:
        alike = (action.kind, action.starts, action.lacks_checkpoint, action.reason, action.wanted.cluster)
        designs.setdefault((*alike, action.wanted.description.design), []).append(action)
    return list(designs.values())


def _title(same: Sequence[Action]) -> str:
    """The name of the first run, with the number of its seeds if there are several."""
    if len(same) == 1:
        return same[0].name
    return f"{same[0].name} ({len(same)} seeds, each)"


def _row(same: Sequence[Action]) -> dict[str, Any]:
    action = same[0]
    state: str = action.kind
    if effect := _effect(action):
        state += f", {effect}"
    return {
        "run": _title(same),
        "cluster": action.wanted.cluster,
        "state": state,
        "parameters": _parameters(action),
        **action.wanted.estimate.cost.cells(),
        **_time(action.wanted.estimate.wall_hours, action.wanted.estimate.attempts),
        "": action.reason,
    }


def _parameters(action: Action) -> str | None:
    """Parameters of the model of a run; None for a program, whose model is unknown."""
    parameters = action.wanted.estimate.parameters
    if not parameters:
        return None
    return count(parameters["total"])


def _effect(action: Action) -> str:
    """What submitting does with the run, or an empty text."""
    if action.lacks_checkpoint:
        return "cannot start yet"
    if action.kind == "new":
        return "will start"
    if action.kind == "stopped":
        return "will continue"
    if action.starts:
        return "will start again"
    return ""


def _time(hours: float | None, attempts: int | None) -> dict[str, Any]:
    wall_clock = None
    if hours is not None:
        wall_clock = duration(3600 * hours)
    return {"wall-clock": wall_clock, "attempts": attempts}


def _hours(plan: Plan) -> bool:
    return any(action.wanted.resources.gpus for action in plan.actions)


def _run(same: Sequence[Action]) -> list[str | TextTable]:
    action = same[0]
    description = action.wanted.description
    title = f"{_title(same)}: {action.kind}"
    if action.reason:
        title += f" ({plain(action.reason)})"
    lines = [title]
    if len(same) > 1:
        lines.append(f"  seeds        {', '.join(str(each.wanted.description.seed) for each in same)}")
    return [
        *lines,
        *description.page,
        *(f"  warning: {text}" for text in description.warnings),
        *(f"  note: {note}" for note in description.notes),
    ]


def _dropped(plan: Plan) -> list[str]:
    if not plan.dropped:
        return []
    names = ", ".join(f"{plain(name)} ({run.state})" for name, run in plan.dropped.items())
    if plan.prunes:
        return [f"no longer in the sweep file, to the trash: {names}"]
    return [f"no longer in the sweep file, left alone: {names}; --prune moves them to the trash"]


def _warnings(plan: Plan) -> list[str]:
    """The warnings about runs that start, each once with the names of its runs."""
    names_by_warning: dict[str, list[str]] = {}
    for action in plan.starting:
        for text in action.wanted.description.warnings:
            names_by_warning.setdefault(text, []).append(action.name)
    return [f"warning{_about(names)}: {text}" for text, names in names_by_warning.items()]


def _advice(plan: Plan) -> list[str]:
    """The options for runs that do not start by themselves."""
    kinds = {action.kind for action in plan.actions if not action.starts}
    lines = []
    if kinds & {"failed", "cancelled"}:
        lines = ["failed and cancelled runs start again with --retry"]
    if "changed" in kinds:
        lines.append(
            "changed runs are refused: restore the old values, or use --changed keep (they stay as they are), extend"
            " (new runs continue from their newest checkpoints), fork (new runs start next to them), restart (they go"
            " to the trash) or, if only the data set changed, data (they continue with it)"
        )
    return lines


def as_dict(view: PlanView) -> dict[str, Any]:
    """The plan for programs."""
    plan = view.plan
    inherited = plan.inherited
    runs = [_run_as_dict(action, inherited.get(action.name, ())) for action in plan.actions]
    return {
        "sweep": view.sweep.name,
        "title": view.sweep.title,
        "cluster": view.profile.name,
        "folder": str(plan.folder),
        "files": [str(file) for file in view.files],
        "runs": runs,
        "dropped": [
            {"name": name, "state": run.state, "reason": run.reason, "prunes": plan.prunes}
            for name, run in plan.dropped.items()
        ],
        "cost": asdict(plan.cost),
        "question": view.question,
        "batches": [asdict(batch) for batch in view.batches],
        "assumption": assumption(view.profile, _hours(plan)),
        "checks": [
            {"name": row.name, "detail": row.text, "skipped": row.state == UNKNOWN, "runs": list(names)}
            for row, names in view.checks.items()
        ],
    }


def _run_as_dict(action: Action, inherited: Sequence[InheritedFolder]) -> dict[str, Any]:
    wanted = action.wanted
    description = wanted.description
    return {
        "name": wanted.name,
        "directory": action.name,
        "action": action.kind,
        "reason": action.reason,
        "extends": wanted.extends,
        "starts": action.starts and not action.lacks_checkpoint,
        "copied_from": action.submitter,
        "inherited": [folder.as_dict() for folder in inherited],
        "cluster": wanted.cluster,
        "differs": description.differs,
        "base": [change._asdict() for change in description.against_base],
        "changes": [change._asdict() for change in action.changes],
        "identity": action.identity_hash,
        "notes": list(description.notes),
        "warnings": list(description.warnings),
        **wanted.estimate.as_dict(),
    }


def canaries(jobs: Sequence[Job]) -> str:
    """One line per canary and the runs that wait for it; empty if there are none."""
    lines = []
    for first in jobs:
        waiting = [job.run.name for job in jobs if job.waits_for == first.run.name]
        if len(waiting) <= 5:
            names = ", ".join(waiting)
        else:
            names = f"{len(waiting)} runs"
        if waiting:
            lines += [f"canary: {first.run.name} starts first; after {first.canary} steps: {names}"]
    return "\n".join(lines)


def trashed(path: Path, target: Path, replaced: bool) -> str:
    """One line for a run directory ``path`` that was moved to ``target``, with the command that restores it.

    If it was ``replaced`` by a new run, it is restored under another name.
    """
    numbered = (path.with_name(f"{path.name}-old{n}") for n in count_from(2))
    places = chain([path.with_name(f"{path.name}-old")], numbered)
    if replaced:
        place = next(place for place in places if not place.exists())
    else:
        place = path
    back = shlex.join(["mv", str(target), str(place)])
    return plain(f"moved to the trash: {path.name}; restore it with: {back}")
