"""Step 2 of a submission, ``check_runs``: the checks that need no plan, of the clusters and of each run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from flip.runs.checks import DEGRADED, Check, rows_of
from jobs.common import trust
from jobs.common.cluster_profile import ClusterProfile, executed_files, load_profile, require_trusted_programs
from jobs.planning import preflight
from jobs.submission.executed import Executed, executed_by
from jobs.submission.request import Request
from jobs.submission.resolve import Resolved, naming


class CheckRows:
    """The rows of all checks, each once, in order, with the names of its runs; no names: all runs."""

    def __init__(self, rows: Mapping[Check, Iterable[str]] | None = None) -> None:
        self._rows: dict[Check, list[str]] = {}
        for row, names in (rows or {}).items():
            self.add([row], *names)

    def add(self, rows: Iterable[Check], *names: str) -> None:
        for row in rows:
            self._rows.setdefault(row, []).extend(names)

    def copy(self) -> CheckRows:
        return CheckRows(self._rows)

    def __iter__(self) -> Iterator[Check]:
        return iter(self._rows)

    def by_runs(self, number: int) -> dict[Check, list[str]]:
        """Row -> its runs; none if the row is about all of a ``number`` of runs."""
        every: list[str] = []
        return {row: names if len(names) < number else every for row, names in self._rows.items()}


@dataclass(frozen=True)
class Checked:
    """A resolved sweep whose runs may start, as far as that is known without a plan."""

    resolved: Resolved
    rows: CheckRows
    executed: Executed

    @property
    def request(self) -> Request:
        return self.resolved.request


def check_runs(resolved: Resolved) -> Checked:
    """Run the checks. Raises the FlipError of the first that does not hold."""
    request = resolved.request
    rows = CheckRows()
    for profile in resolved.profiles:
        require_trusted_programs(profile)
    executed = executed_by(resolved)
    rows.add(Check(DEGRADED, warning, name="code") for warning in trust.checkout_warnings())
    for profile in resolved.profiles:
        may_execute = _may_execute(request, profile)
        rows.add(rows_of(preflight.SCHEDULER, profile, request.options.dry_run, may_execute))
    for asked, run in zip(request.sweep.runs, resolved.runs, strict=True):
        with naming(request, asked):
            rows.add(run.checks(), run.name)
    return Checked(resolved, rows, executed)


def _may_execute(request: Request, profile: ClusterProfile) -> bool:
    """Whether programs of a profile may run: not if others can exchange them, nor in a dry run if only the sweep names
    the profile's file."""
    if trust.open_places(path for _, path in executed_files(profile)):
        return False
    if not request.options.dry_run or request.options.cluster:
        return True
    by_sweep = [request.sweep.cluster, *(run.cluster for run in request.sweep.runs)]
    files = [name for name in by_sweep if name.endswith((".yaml", ".yml"))]
    return profile not in map(load_profile, files)
