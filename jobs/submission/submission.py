"""One call of ``flip submit``: it reads a request, then takes five steps. Each takes what the step before returns; a
dry run ends after the third, ``plan_runs``.

``read_request`` -> ``resolve_runs`` -> ``check_runs`` -> ``plan_runs`` -> ``confirm_plan`` -> ``start_runs``

One run on this way, from its line in the sweep file to the call of sbatch:

| function | makes of the run |
|---|---|
| ``jobs.sweeps.sweep_file.read_sweep`` | ``Run``: its name and its merged configuration, which still has ``auto`` |
| ``jobs.workloads.loading.requested_runs`` | ``TrainingRequest`` (a ``RequestedRun``): the run with its kind of work |
| ``resolve_runs``, ``TrainingRequest.workload_at`` | ``TrainingWorkload`` (a ``SweepRun``): all values, and its costs |
| ``check_runs``, ``SweepRun.checks`` | rows of checks, or an error |
| ``plan_runs``, ``jobs.submission.plan.compare`` | ``Action``: what happens to it, by its ``ExistingRun`` |
| ``start_runs``, ``jobs.submission.apply.create_and_submit`` | its directory, and a ``Job`` |
| ``jobs.slurm.backend.SlurmBackend.submit`` | job.json, a batch script with other runs, and the call of sbatch |
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flip.runs.errors import COMPLETE, STORAGE
from jobs.common.cli import note
from jobs.common.terminal import show
from jobs.submission import render
from jobs.submission.apply import lock
from jobs.submission.check import check_runs
from jobs.submission.confirm import confirm_plan
from jobs.submission.plan_runs import Planned, commands_of_runs, plan_runs
from jobs.submission.request import SubmitOptions, read_request, refuse_other_file
from jobs.submission.resolve import resolve_runs
from jobs.submission.start_runs import SubmitOutcome, start_runs


class Submission:
    """One call of the command."""

    def __init__(self, options: SubmitOptions) -> None:
        self.request = read_request(options)
        self.managed: list[Path] = []
        """The directories of the runs, from the moment in which they may start."""

    @property
    def folder(self) -> Path:
        """RUNS_ROOT/<sweep>."""
        return self.request.folder

    def run(self) -> tuple[int, list[Path] | None]:
        """Returns the exit code, and with --watch the directories of the runs to watch."""
        request = self.request
        options = request.options
        refuse_other_file(request)
        checked = check_runs(resolve_runs(request))
        if not options.dry_run and not os.path.exists(request.folder):
            plan_runs(checked)  # a refusal must not leave the folder that the lock creates
        with nullcontext() if options.dry_run else lock(request.folder):
            planned = plan_runs(checked)
            following = self._carry_out(planned)
        actions = planned.plan.actions
        if actions and all(action.kind == "unknown" for action in actions):
            return STORAGE, None
        if options.watch and not options.dry_run:
            return COMPLETE, self.managed
        if following and not options.dry_run:
            note("\n  ".join(["next:", *following]))
        return COMPLETE, None

    def plan(self) -> dict[str, Any]:
        """The document of ``--dry-run --json``. Prints, writes and starts nothing. Raises FlipError of a refusal."""
        refuse_other_file(self.request)
        planned = plan_runs(check_runs(resolve_runs(self.request)))
        planned.refuse()
        document = _document(_view(planned), SubmitOutcome(), planned.next_commands())
        read_back: dict[str, Any] = json.loads(json.dumps(document))
        return read_back

    def _carry_out(self, planned: Planned) -> list[str]:
        """Show the plan, and carry it out unless this is a dry run. Returns the commands that can follow."""
        options = self.request.options
        view = _view(planned)
        _show(view, options)
        outcome = SubmitOutcome()
        following: list[str] = []
        try:
            planned.refuse()
            following = planned.next_commands()
            if not options.dry_run:
                confirmed = confirm_plan(planned)
                self.managed = [self.folder / action.name for action in planned.plan.actions]
                start_runs(confirmed, outcome)
                following = commands_of_runs(planned.plan)
        finally:
            if options.json:
                print(json.dumps(_document(view, outcome, following), indent=1))
        return following


def _view(planned: Planned) -> render.PlanView:
    request = planned.request
    return render.PlanView(
        planned.plan,
        request.sweep,
        request.profile,
        planned.rows.by_runs(len(request.sweep.runs)),
        planned.questions,
        planned.batches,
        request.options.script,
        planned.files,
        request.options.take_over,
    )


def _show(view: render.PlanView, options: SubmitOptions) -> None:
    """Print the plan, unless --json prints it in the end with the outcome."""
    if options.dry_run and not options.json:
        show(render.details(view))
    elif not options.json:
        show(render.summary(view))


def _document(view: render.PlanView, outcome: SubmitOutcome, following: list[str]) -> dict[str, Any]:
    """The document ``plan`` of ``jobs.common.documents``."""
    return {**render.as_dict(view), "outcome": outcome.as_dict(), "next": following}
