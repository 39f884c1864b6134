"""Step 1 of a submission, ``resolve_runs``: each run gets its place and all its values. Runs no check."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flip.runs.errors import ConfigError, FlipError
from jobs.common.cluster_profile import ClusterProfile, load_profile, node, profile_path
from jobs.common.paths import runs_root
from jobs.submission.request import Request
from jobs.workloads.workload import Place, RequestedRun, SweepRun


@dataclass(frozen=True)
class Resolved:
    """A sweep whose runs have all their values."""

    request: Request
    places: Mapping[str, Place]
    """Name of a cluster in the sweep -> where its runs are; empty name: those of runs which name none."""
    runs: Sequence[SweepRun]

    @property
    def profiles(self) -> list[ClusterProfile]:
        """Each once, in the order of the runs."""
        return list({place.profile.name: place.profile for place in self.places.values()}.values())

    @property
    def profile_files(self) -> list[Path]:
        """Each once, that of the sweep first."""
        named = [profile_path(name).absolute() for name in self.places if name]
        return list(dict.fromkeys([self.request.profile_file, *named]))

    @property
    def code(self) -> dict[str, bytes]:
        """Path -> content of files of the user, which a snapshot gets."""
        return {path: content for run in self.runs for path, content in run.code.items()}

    @property
    def is_nominal(self) -> bool:
        """Whether a run is planned with data that do not exist yet."""
        return any(run.is_nominal for run in self.runs)


def resolve_runs(request: Request) -> Resolved:
    """Resolve all runs. Raises FlipError, with the name of the run, if its values do not fit each other."""
    places = _places(request)
    runs = []
    for run in request.sweep.runs:
        with naming(request, run):
            runs.append(run.workload_at(places[_cluster_name(request, run)]))
    return Resolved(request, places, runs)


@contextmanager
def naming(request: Request, run: RequestedRun) -> Iterator[None]:
    """Errors in the block name the sweep file and the run, and say if the value at fault is a default."""
    try:
        yield
    except FlipError as error:
        where = ", ".join(filter(None, [str(request.file), f"run {run.name}", error.where]))
        remedy = error.remedy
        if run.is_default(error.where or error.what.partition(":")[0]):
            remedy = f"It is a default value, of the recipe or of the program. {remedy}".rstrip()
        raise type(error)(error.what, where, error.value, remedy) from error


def _cluster_name(request: Request, run: RequestedRun) -> str:
    """The name of the cluster of a run in the sweep; empty: that of the sweep or of --cluster."""
    if request.options.cluster:
        return ""
    return run.cluster


def _places(request: Request) -> dict[str, Place]:
    """The places of the runs. Raises ConfigError if two of their clusters do not go together."""
    places: dict[str, Place] = {}
    for run in request.sweep.runs:
        name = _cluster_name(request, run)
        if name in places:
            continue
        profile = request.profile
        if name:
            profile = load_profile(name)
        _refuse_conflict(request, run, profile, [place.profile for place in places.values()])
        places[name] = Place(
            request.folder,
            request.sweep.names,
            profile,
            node(profile),
            request.options.changed or "",
            request.options.dry_run,
            request.resubmit_command,
        )
    return places


def _refuse_conflict(
    request: Request, run: RequestedRun, profile: ClusterProfile, others: Sequence[ClusterProfile]
) -> None:
    """ConfigError if the profile that a run names does not go together with that of the sweep and ``others``."""
    own = request.profile
    root = runs_root(profile.runs_root)
    if not request.options.root and root != runs_root(own.runs_root):
        what = f"resources.cluster: the runs root of {run.cluster} differs from that of {own.name}"
        remedy = "Runs of a sweep share a folder: give the profiles the same runs_root, or use two sweeps."
        raise ConfigError(what, f"run {run.name}", str(root), remedy)
    if any(other.name == profile.name and other != profile for other in (own, *others)):
        what = "two different cluster profiles have this name"
        remedy = "Give each its own `name`."
        raise ConfigError(what, f"run {run.name}", profile.name, remedy)
