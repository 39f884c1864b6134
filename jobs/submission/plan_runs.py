"""Step 3 of a submission, ``plan_runs``: what happens to each run, what it needs, and what is asked first."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flip.runs.checks import UNKNOWN, Check, rows_of
from flip.runs.lifecycle import ACTIVE_STATES
from jobs.common import next_commands
from jobs.common.text import counted
from jobs.planning import preflight
from jobs.planning.run_cost import total
from jobs.submission.check import Checked, CheckRows
from jobs.submission.dry_run import PlannedJob, planned_jobs
from jobs.submission.plan import Plan, PlanOptions, compare, scan_runs
from jobs.submission.request import Request
from jobs.sweeps.sweep_file import no_match

CONFIRM_ABOVE = 100.0  # GPU-hours that start without a question


@dataclass(frozen=True)
class Planned:
    """A plan of a checked sweep."""

    checked: Checked
    plan: Plan
    rows: CheckRows
    """Those of ``checked``, and those of the plan."""
    batches: Sequence[PlannedJob]
    """The Slurm jobs of a dry run."""
    question: str
    """To confirm before anything starts; empty: there is none."""

    @property
    def request(self) -> Request:
        return self.checked.request

    @property
    def trust_question(self) -> str:
        """Whether to trust a group; empty: there is no such question."""
        return self.checked.executed.question(self.plan)

    @property
    def questions(self) -> str:
        return " ".join(filter(None, [self.trust_question, self.question]))

    @property
    def files(self) -> list[Path]:
        """The files from which the plan was made."""
        return [self.request.file.absolute(), *self.checked.resolved.profile_files]

    def refuse(self) -> None:
        """Raise ConfigError if the plan may not be carried out. The user has seen it then."""
        self.plan.refuse_changed()
        self.plan.refuse_prune(self.request.options.prune_most)
        self.plan.refuse_pinned()

    def next_commands(self) -> list[str]:
        """The submission itself, or if it would start nothing, what shows the runs."""
        if not self.plan.starting and not self.plan.pruned:
            return commands_of_runs(self.plan)
        words = self.request.options.repeated_words()
        if self.question:
            words.append("--yes")
        return [self.request.resubmit_command.line(self.request.folder.parent, *words)]


def plan_runs(checked: Checked) -> Planned:
    """Compare the runs with their directories. Raises FlipError if the runs that start have too little space, or code
    that others can exchange. Writes nothing."""
    request = checked.request
    options = request.options
    plan = _compare_with_directories(checked)
    rows = checked.rows.copy()
    _check_space(checked, plan, rows)
    rows.add(checked.executed.check(plan, options))
    batches: list[PlannedJob] = []
    if options.dry_run:
        _list_unknown(plan, rows)
        batches = _batches(checked, plan, rows)
    return Planned(checked, plan, rows, batches, _question(plan, options.take_over))


def commands_of_runs(plan: Plan) -> list[str]:
    """The commands that show the runs of a plan which have a directory."""
    names = [action.name for action in plan.actions if os.path.exists(plan.folder / action.name)]
    if not names:
        return []
    return next_commands.of_sweep(plan.folder, names[0])


def _compare_with_directories(checked: Checked) -> Plan:
    request = checked.request
    options = request.options
    runs = checked.resolved.runs
    names = request.sweep.names
    existing = scan_runs(request.folder, [run.name for run in runs])
    decisions = PlanOptions(options.retry, options.changed or "", request.prunes, options.only or "*")
    plan = compare(runs, existing, request.folder, names, decisions)
    if not (plan.actions or plan.dropped):
        raise no_match(request.file, decisions.only, names)
    return plan


def _check_space(checked: Checked, plan: Plan, rows_out: CheckRows) -> None:
    """Check the space for checkpoints of runs that start or have an active job."""
    checkpoints = {}
    for action in plan.actions:
        if not action.starts and action.kind not in ACTIVE_STATES:
            continue
        path = plan.folder / action.name
        if action.moves:  # the checkpoints of a run that goes to the trash first stay on the disk
            path = plan.folder / f"{action.name}.new"
        checkpoints[path] = action.wanted.checkpoints
    request = checked.request
    plan_only = request.options.dry_run and checked.resolved.is_nominal
    rows_out.add(rows_of(preflight.SPACE, checkpoints, request.profile, request.folder, plan_only))


def _list_unknown(plan: Plan, rows_out: CheckRows) -> None:
    """List runs of unknown state as not checked: a dry run does not guess what would start."""
    for action in plan.actions:
        if action.kind == "unknown":
            rows_out.add([Check(UNKNOWN, action.reason, name="state")], action.name)
        elif action.existing == "unknown":
            rows_out.add([Check(UNKNOWN, "it is unknown whether it runs", name="state")], action.name)


def _batches(checked: Checked, plan: Plan, rows: CheckRows) -> list[PlannedJob]:
    """The jobs that Slurm would get."""
    resolved = checked.resolved
    answers = any(row.name == preflight.SCHEDULER.name and row.state != UNKNOWN for row in rows)
    steps = checked.request.canary_steps
    batches: list[PlannedJob] = []
    for profile in resolved.profiles:
        if profile.kind == "slurm":
            part = [action for action in plan.actions if action.wanted.cluster == profile.name]
            batches += planned_jobs(replace(plan, actions=part), profile, answers, steps, resolved.code)
    return batches


def _question(plan: Plan, take_over: bool) -> str:
    """The question to confirm before anything starts; empty if there is none."""
    asked = []
    if plan.pruned:
        active = [name for name, existing in plan.pruned.items() if existing.active]
        stopped = ""
        if active:
            stopped = f" ({', '.join(active)}: cancelled first)"
        asked.append(f"moves {counted(len(plan.pruned), 'run')} to the trash: {', '.join(plan.pruned)}{stopped}")
    moved = [f"{action.name} ({action.existing})" for action in plan.starting if action.moves]
    if moved:
        them = "it" if len(moved) == 1 else "them"
        asked.append(f"moves {counted(len(moved), 'run')} to the trash and starts {them} from zero: {', '.join(moved)}")
    if take_over and plan.inherited:
        names = ", ".join(plan.inherited)
        asked.append(f"lets {names} delete inherited checkpoints, which no other run directory may need")
    asked += _costs(plan)
    if asked:
        return f"This {' and '.join(asked)}."
    return ""


def _costs(plan: Plan) -> list[str]:
    """Parts of the question about runs of high or unknown costs."""
    unknown = [action.name for action in plan.starting if action.wanted.estimate.cost.gpu_hours is None]
    estimated = [action for action in plan.starting if action.wanted.estimate.cost.gpu_hours is not None]
    cost = total(action.wanted.estimate.cost for action in estimated)
    asked = []
    if cost.gpu_hours is not None and cost.gpu_hours > CONFIRM_ABOVE:
        price = ""
        if cost.price is not None:
            price = f", a price of {cost.price:,.0f}"
        asked.append(f"starts {counted(len(estimated), 'run')} of {cost.gpu_hours:,.0f} GPU-hours{price}")
    if unknown:
        asked.append(f"starts {counted(len(unknown), 'run')} of unknown GPU-hours ({', '.join(unknown)})")
    return asked
