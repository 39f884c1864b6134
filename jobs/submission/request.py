"""What one call of ``flip submit`` asks for: ``read_request`` makes a ``Request`` of its options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path

from flip.common.host import core_seconds
from flip.runs.errors import ConfigError
from flip.runs.rundir import read_lenient
from jobs.common.cluster_profile import ClusterProfile, load_profile, profile_path
from jobs.common.paths import REPOSITORY, runs_root
from jobs.submitted_runs import resubmit
from jobs.submitted_runs.resubmit import SubmitCommand
from jobs.sweeps.sweep_file import Sweep, find_sweep
from jobs.workloads.loading import requested_runs
from jobs.workloads.workload import RequestedRun


def _repeated(flag: str) -> bool:
    """A flag that the command which follows a dry run has too."""
    option: bool = field(default=False, metadata={"flag": flag})
    return option


@dataclass
class SubmitOptions:
    """The options of ``flip submit``, which describes them: the only list of them that the steps know."""

    sweep: str = ""
    cluster: str | None = None
    only: str | None = None
    seeds: list[int] | None = None
    overrides: list[str] = field(default_factory=list)
    changed: str | None = None
    dry_run: bool = False
    retry: bool = _repeated("--retry")
    take_over: bool = _repeated("--take-over")
    prune: bool = _repeated("--prune")
    no_canary: bool = _repeated("--no-canary")
    prune_most: bool = _repeated("--allow-prune-majority")
    watch: bool = False
    yes: bool = False
    script: bool = False
    json: bool = False
    root: str | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> SubmitOptions:
        """The options of a parsed command line, which has further ones."""
        return cls(**{option.name: getattr(args, option.name) for option in fields(cls)})

    def repeated_words(self) -> list[str]:
        """The options with which a submission follows its dry run, in addition to its ``resubmit_command``."""
        words: list[str] = []
        if self.only is not None:
            words += ["--only", *self.only.split()]
        if self.changed:
            words += ["--changed", self.changed]
        flags = {option.name: option.metadata["flag"] for option in fields(self) if "flag" in option.metadata}
        return words + [flag for name, flag in flags.items() if getattr(self, name)]


@dataclass(frozen=True)
class Request:
    """A sweep to submit. Its runs are not resolved, and not compared with run directories."""

    options: SubmitOptions
    file: Path
    """The sweep file."""
    sweep: Sweep[RequestedRun]
    profile: ClusterProfile
    """The cluster of runs that name none."""
    profile_file: Path
    folder: Path
    """RUNS_ROOT/<sweep>."""
    resubmit_command: SubmitCommand
    """The command that submits the sweep again."""
    start: tuple[float, float]
    """``core_seconds`` at the start of this command."""

    @property
    def prunes(self) -> bool:
        """Whether runs that are no longer in the sweep go to the trash."""
        return self.options.prune or self.options.prune_most

    @property
    def canary_steps(self) -> int:
        """Steps of a canary; 0: no canaries."""
        if self.options.no_canary:
            return 0
        return self.profile.canary


def read_request(options: SubmitOptions) -> Request:
    """Read the sweep file and the profile. Raises FlipError if one is missing or invalid."""
    start = core_seconds()
    file = find_sweep(options.sweep)
    prunes = options.prune or options.prune_most
    sweep = requested_runs(file, options.overrides, options.only, options.seeds, may_be_empty=prunes)
    _refuse_equal_runs(options, file, sweep)
    resubmit_command = resubmit.submit_command(options, file, sweep.folder)
    profile = load_profile(options.cluster or sweep.cluster)
    profile_file = profile_path(options.cluster or sweep.cluster).absolute()
    root = runs_root(profile.runs_root)
    if options.root:
        root = Path(options.root).absolute()
    folder = root / sweep.name
    if not str(folder).isprintable():
        raise ConfigError("the path of the runs contains a control character", value=str(folder))
    return Request(options, file, sweep, profile, profile_file, folder, resubmit_command, start)


def refuse_other_file(request: Request) -> None:
    """ConfigError if another sweep file, which exists and differs, has put its runs into the folder."""
    file = request.file
    before = read_lenient(request.folder / "sweep.json").get("file", "")
    if before in ("", resubmit.recorded_path(file)):
        return
    other = REPOSITORY / before
    try:
        if other.read_bytes() == file.read_bytes():
            return
    except OSError:  # it was moved or deleted: this is the sweep file now
        return
    remedy = "Give one of the two files another `name`, or use --root. If this one replaces it, delete the other."
    what = f"its runs have the folder of another sweep file, {other}"
    raise ConfigError(what, file, request.sweep.name, remedy)


def _refuse_equal_runs(options: SubmitOptions, file: Path, sweep: Sweep[RequestedRun]) -> None:
    """ConfigError if options override what the sweep varies: runs of other names would train the same thing.

    Without options a sweep may repeat a run on purpose.
    """
    if not options.overrides and options.seeds is None:
        return
    seen: dict[str, str] = {}
    for run in sweep.runs:
        other = seen.setdefault(run.settings, run.name)
        if other != run.name:
            what = f"with these options {other} and {run.name} are the same run"
            remedy = "Do not override what the sweep varies: select runs with --only, or seeds with --seeds."
            raise ConfigError(what, str(file), remedy=remedy)
