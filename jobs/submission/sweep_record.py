"""The record of a sweep in its folder, sweep.json, for reports: ``sweep_record``."""

from typing import Any

from flip.runs.rundir import load_record
from jobs.submission.plan import Plan
from jobs.submission.request import Request
from jobs.submitted_runs import resubmit


def sweep_record(request: Request, plan: Plan) -> dict[str, Any]:
    """The record after this submission. Runs that were submitted earlier keep a place in the order."""
    sweep = request.sweep
    stored = load_record(plan.folder / "sweep.json")
    return {
        "name": sweep.name,
        "title": sweep.title,
        "notes": sweep.notes,
        "baselines": sweep.baselines,
        "file": resubmit.recorded_path(request.file),
        "cluster": request.profile.name,
        "varied": list(dict.fromkeys(key for run in sweep.runs for key in run.differs)),
        "runs": _order(request, plan, stored.get("runs", [])),
        "paper": _paper(request, plan, stored.get("paper", {})),
        "rows": sweep.rows,
    }


def _order(request: Request, plan: Plan, before: list[str]) -> list[str]:
    """Names of all runs in the order of reports. ``before``: that of earlier submissions."""
    names = [name for action in plan.actions for name in (action.wanted.name, action.name)]
    if request.options.only:
        order = [*before, *names]
    else:
        order = [*names, *before]
    return list(dict.fromkeys(order))


def _paper(request: Request, plan: Plan, before: dict[str, Any]) -> dict[str, Any]:
    """Expected numbers by arm, and by the names of forks. ``before``: those of earlier submissions."""
    sweep = request.sweep
    paper: dict[str, Any] = {}
    if request.options.only:  # the plan lacks the forks of runs that --only excludes
        paper = {name: numbers for name, numbers in before.items() if name not in sweep.names}
    paper |= sweep.paper
    arms = {run.name: run.arm for run in sweep.runs}
    for action in plan.actions:
        numbers = sweep.paper.get(arms[action.wanted.name])
        if action.fork and numbers:
            paper[action.fork] = numbers
    return paper
