"""``CommandRequest``: a run of a program as its sweep file asks for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flip.common.plain_data import ConfigChange, compare, digest
from flip.runs.command_record import DEFAULT_METRICS, filled, text_of
from flip.runs.errors import ConfigError
from flip.runs.formats import RUN_NUMBER
from flip.runs.rundir import read_lenient
from jobs.common.cluster_profile import node
from jobs.common.job import JobResources
from jobs.planning import program_files
from jobs.sweeps.command_file import CommandRun
from jobs.workloads.command import CommandWorkload
from jobs.workloads.workload import Place, RunOfSweepFile


@dataclass(frozen=True)
class CommandRequest(RunOfSweepFile[CommandRun]):
    """A run of a program. ``jobs.workloads.workload.RequestedRun`` describes it."""

    @property
    def cluster(self) -> str:
        return self.run.resources.cluster

    @property
    def settings(self) -> str:
        return self.run.settings

    @property
    def programs(self) -> Sequence[Path]:
        return [self.run.program.code]

    def is_default(self, key: str) -> bool:
        return False

    def workload_at(self, place: Place) -> CommandWorkload:
        run, ignored = self._kept(place)
        files = program_files.read(run.program.code, place.folder.parent, _outputs(run))
        return CommandWorkload(
            run,
            identity=_identity(run),
            shape=_resources(run, place),
            profile=place.profile,
            place=place,
            files_of_program=files,
            ignored_changes=ignored,
        )

    def _kept(self, place: Place) -> tuple[CommandRun, list[ConfigChange]]:
        """(the run, changes in the sweep file that ``--changed keep`` ignores)."""
        run = self.run
        directories = place.directories(run.name)
        stored = read_lenient(directories[-1] / "identity.json").get("config")
        wanted = _canonical(run)
        if place.changed != "keep" or not isinstance(stored, dict) or stored == wanted:
            return run, []
        known = [read_lenient(each / "identity.json").get("hash") for each in directories]
        if digest(wanted) in known:
            return run, []
        changes = compare(stored, wanted)
        try:
            program = replace(run.program, argv=tuple(stored["command"]), env=dict(stored["env"]))
            kept = replace(run, program=program, parameters=dict(stored["parameters"]))
            is_whole = stored["world"] == wanted["world"]
        except (KeyError, TypeError, ValueError) as error:
            what = "cannot be kept: its identity.json is damaged, or of a training"
            raise ConfigError(what, str(directories[-1]), str(error)) from error
        if not is_whole:
            what = f"cannot be kept: it has {stored['world']} ranks"
            raise ConfigError(what, str(directories[-1]), wanted["world"], "Restore resources.")
        return kept, changes


def _outputs(run: CommandRun) -> tuple[str, ...]:
    """Relative paths to which the program writes, as far as they have no place of the launcher."""
    values = {name: text_of(value) for name, value in run.parameters.items()}
    metrics = run.program.metrics
    templates = (run.program.resume.folder, metrics.file, metrics.tensorboard, DEFAULT_METRICS)
    paths = [os.path.normpath(filled(template, values)) for template in templates if template]
    return tuple(path for path in paths if path != "." and not path.startswith(("/", "~", "..", "{")))


def _canonical(run: CommandRun) -> dict[str, Any]:
    """What the hash of the run is over: all that changes its results, as far as that is known here."""
    return {
        "command": list(run.program.argv),
        "parameters": dict(run.parameters),
        "env": dict(run.program.env),
        "world": run.resources.nodes * run.resources.processes,
    }


def _identity(run: CommandRun) -> dict[str, Any]:
    canonical = _canonical(run)
    return {"hash": digest(canonical), "schema": RUN_NUMBER, "code": "", "config": canonical}


def _resources(run: CommandRun, place: Place) -> JobResources:
    asked = asdict(run.resources)
    del asked["cluster"]
    host = node(place.profile)
    if not asked["cpus"]:
        asked["cpus"] = max(1, host.cores // asked["processes"])
    if not asked["hours"]:
        asked["hours"] = host.hours
    return JobResources(**asked)
