"""What the jobs of a submission execute, and whether other users can exchange it: ``Executed``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flip.files.ownership import Exposure
from flip.runs.checks import DEGRADED, Check
from jobs.common import trust
from jobs.common.cli import can_ask, confirm, note
from jobs.common.cluster_profile import executed_files
from jobs.submission.plan import Plan
from jobs.submission.request import SubmitOptions
from jobs.submission.resolve import Resolved


@dataclass(frozen=True)
class Executed:
    """Files and folders of code that jobs execute."""

    paths: Sequence[Path]
    exposures: Sequence[Exposure]
    """Folders and links through which other users can exchange them."""

    @property
    def exposed(self) -> list[str]:
        """The exposed folders, each once."""
        return list(dict.fromkeys(place.place for place in self.exposures))

    def check(self, plan: Plan, options: SubmitOptions) -> list[Check]:
        """Raise PermissionDenied if new runs would start where other users can exchange their code, unless the user can
        be asked about it. Runs that exist continue, with a warning."""
        if not (self.exposures and plan.starting):
            return []
        if not _starts_new(plan):
            warnings = [trust.warning(place) for place in self.exposures]
            if not options.dry_run:
                note("\n".join(warnings))
            return [Check(DEGRADED, warning, name="folders") for warning in warnings]
        is_answerable = trust.is_answerable(self.exposures)
        asks = is_answerable and can_ask() and not options.yes
        shows = is_answerable and options.dry_run  # it shows the question
        if not (asks or shows):
            trust.refuse(self.exposures)
        return []

    def question(self, plan: Plan) -> str:
        """The question whether to trust a group; empty if there is none."""
        if _starts_new(plan):
            return trust.question(self.exposures)
        return ""

    def settle(self, plan: Plan) -> Executed:
        """Ask whether to trust a group, once: the answer is recorded. ``--yes`` does not answer it."""
        if not self.question(plan):
            return self
        trust.settle(self.paths, confirm if can_ask() else None)
        return Executed(self.paths, ())


def executed_by(resolved: Resolved) -> Executed:
    """The folder of the runs, which contains their code, the files of the profiles that are executed, and those of the
    user's classes, which are copied."""
    request = resolved.request
    programs = [path for profile in resolved.profiles for _, path in executed_files(profile)]
    classes = [path for run in request.sweep.runs for path in run.programs]
    paths = [request.folder, *resolved.profile_files, *programs, *dict.fromkeys(classes)]
    return Executed(paths, trust.open_places(paths))


def _starts_new(plan: Plan) -> bool:
    """Whether a run starts that has no directory yet, or whose directory goes to the trash."""
    return any(action.kind == "new" or action.moves for action in plan.starting)
