"""Step 4 of a submission, ``confirm_plan``: the user answers the questions of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from flip.runs.errors import ConfigError
from jobs.common import cli
from jobs.submission.executed import Executed
from jobs.submission.plan_runs import Planned


@dataclass(frozen=True)
class Confirmed:
    """A plan that may be carried out."""

    planned: Planned
    executed: Executed
    """Without the folders of groups that the user trusts now."""


def confirm_plan(planned: Planned) -> Confirmed:
    """Ask. Raises ConfigError, PermissionDenied if the answer is no, or if there is no terminal for it."""
    executed = planned.checked.executed.settle(planned.plan)
    _ask(planned.question, planned.request.options.yes)
    return Confirmed(planned, executed)


def _ask(question: str, yes: bool) -> None:
    if question and not yes and not cli.confirm(f"{question} Go on?"):
        raise ConfigError("nothing was done", remedy="Answer y, or add --yes.")
