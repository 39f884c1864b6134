"""Step 5 of a submission, ``start_runs``: takes over checkpoints, moves pruned runs to the trash, starts runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flip.runs.rundir import RunDir
from jobs.backends.multi import MultiBackend
from jobs.common import trust
from jobs.common.cli import note
from jobs.common.paths import REPOSITORY
from jobs.planning import preflight
from jobs.submission import render
from jobs.submission.apply import StartOptions, cancelled_meanwhile, create_and_submit, prune, snapshot_of
from jobs.submission.confirm import Confirmed
from jobs.submission.plan import Plan
from jobs.submission.snapshot import Snapshot, take
from jobs.submission.sweep_record import sweep_record


@dataclass
class SubmitOutcome:
    """What was done until now."""

    started: list[str] = field(default_factory=list)
    trashed: dict[str, str] = field(default_factory=dict)
    """Name of a run -> its directory in the trash."""
    still_saving: list[str] = field(default_factory=list)
    """Pruned runs that have not ended."""
    cancelled_meanwhile: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)

    def add_trashed(self, path: Path, target: Path, replaced: bool = False) -> None:
        """Report a run directory that was moved to the trash. ``replaced``: another one takes its place."""
        self.trashed[path.name] = str(target)
        note(render.trashed(path, target, replaced))


def start_runs(confirmed: Confirmed, outcome_out: SubmitOutcome) -> None:
    """Carry out the plan. Call it under ``lock``. ``outcome_out`` is complete up to an error, which is raised."""
    planned = confirmed.planned
    if planned.request.options.take_over:
        _take_over(planned.plan)
    if planned.plan.pruned:
        _prune(planned.plan, planned.request.sweep.name, outcome_out)
    if planned.plan.starting:
        _submit_starting(confirmed, outcome_out)


def _take_over(plan: Plan) -> None:
    """Give continuing runs the remote folders of the checkpoints that they have inherited."""
    checkpoints = {action.name: action.wanted.checkpoints for action in plan.starting}
    for name in plan.inherited:
        checkpoints[name].take_over(RunDir(plan.folder / name))


def _prune(plan: Plan, sweep: str, outcome_out: SubmitOutcome) -> None:
    active = ", ".join(name for name, existing in plan.pruned.items() if existing.active)
    if active:
        note(f"cancelled; waiting until they have saved: {active}")
    left = prune(plan, f"no longer in the sweep {sweep}", outcome_out.add_trashed)
    outcome_out.still_saving = left
    if left:
        note(f"cancelled, but still saving: {', '.join(left)}; --prune again moves them")


def _submit_starting(confirmed: Confirmed, outcome_out: SubmitOutcome) -> None:
    planned = confirmed.planned
    plan = planned.plan
    request = planned.request
    resolved = planned.checked.resolved
    note(_load_note(confirmed))
    note("\n".join(trust.checkout_warnings()))
    snapshot = _snapshot(plan, resolved.code)
    without_code = _without_code(plan)
    jobs = create_and_submit(
        plan,
        snapshot,
        MultiBackend(resolved.profiles),
        sweep_record(request, plan),
        StartOptions(request.canary_steps, request.resubmit_command, confirmed.executed.exposed),
        partial(outcome_out.add_trashed, replaced=True),
    )
    note(render.canaries(jobs))
    note("\n".join(without_code))
    late = cancelled_meanwhile(plan)
    if late:
        note(f"cancelled meanwhile, so not started: {', '.join(late)}")
    outcome_out.started = [job.run.name for job in jobs]
    outcome_out.cancelled_meanwhile = late


def _load_note(confirmed: Confirmed) -> str:
    """What other processes on this machine mean for its runs; empty if that is unknown or nothing."""
    planned = confirmed.planned
    running = any(action.kind == "running" for action in planned.plan.actions)  # those would count as other processes
    gpus = any(action.wanted.resources.gpus for action in planned.plan.starting)
    if planned.request.profile.kind != "local" or running or gpus:
        return ""
    return preflight.load_note(planned.request.start)


def _snapshot(plan: Plan, code: Mapping[str, bytes]) -> Snapshot:
    snapshot = take(REPOSITORY, plan.folder / ".code", code)
    if snapshot.left_out:
        hidden = ", ".join(snapshot.left_out)
        note(f"not copied, because they are no files of code, or look like secrets: {hidden}")
    return snapshot


def _without_code(plan: Plan) -> list[str]:
    """Lines about runs that continue with code that lacks files which the sweep file names."""
    lines = []
    for action in plan.starting:
        if action.moves:
            continue
        missing = action.wanted.missing_code(RunDir(plan.folder / action.name))
        if missing and snapshot_of(action, plan.folder) is not None:
            lines.append(f"{action.name} continues with its code, which does not have {', '.join(missing)}")
    return lines
