"""``CommandWorkload``: a run of a sweep that executes a program of the user."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flip.common.host import Host
from flip.common.plain_data import ConfigChange, compare
from flip.runs.checks import DEGRADED, OK, UNKNOWN, Check, Rule, run_rules
from flip.runs.command_record import COMMAND, filled, text_of
from flip.runs.errors import ConfigError
from flip.runs.rundir import RunDir, read_lenient, to_json, write_text
from jobs.common.cli import command
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.job import JobResources
from jobs.planning import preflight
from jobs.planning.program_files import ProgramFiles
from jobs.planning.run_cost import Cost, Estimate
from jobs.sweeps.command_file import CommandRun
from jobs.tracking import tracker
from jobs.workloads.workload import Place, RunDescription


@dataclass(frozen=True)
class CommandWorkload:
    """A run of a program. ``jobs.workloads.workload.SweepRun`` describes it."""

    run: CommandRun
    identity: Mapping[str, Any]
    shape: JobResources
    profile: ClusterProfile
    place: Place
    files_of_program: ProgramFiles
    ignored_changes: Sequence[ConfigChange] = ()

    kind = "command"
    rank_module = "jobs.commander"
    extends = False
    lacks_checkpoint = False
    starts_from_checkpoint = False
    is_nominal = False

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def cluster(self) -> str:
        return self.profile.name

    @property
    def resources(self) -> JobResources:
        return self.shape

    @property
    def folder(self) -> Path:
        """Of its sweep."""
        return self.place.folder

    @property
    def dry(self) -> bool:
        return self.place.dry

    @property
    def has_steps(self) -> bool:
        metrics = self.run.program.metrics
        return bool(metrics.file or metrics.pattern or metrics.tensorboard)

    @property
    def env(self) -> Mapping[str, str]:
        return {}  # that of the program is in command.json: ranks of ours do not need it

    @property
    def trackers(self) -> Sequence[str]:
        return [name for name in tracker.TRACKERS if getattr(self.run.program.monitor, name)]

    @property
    def code(self) -> Mapping[str, bytes]:
        return self.files_of_program.files

    def checks(self) -> Iterator[Check]:
        left_out = self.files_of_program.left_out
        if left_out:
            yield Check(DEGRADED, f"not copied: {', '.join(left_out[:8])}", name="code")
        yield Check(OK, f"{len(self.code)} files of {self.run.program.code}", name="code")
        yield from run_rules(RULES, self)

    def files(self) -> Mapping[str, str]:
        return {COMMAND: to_json(self.record())}

    def record(self) -> dict[str, Any]:
        """command.json."""
        program = self.run.program
        resources = asdict(self.run.resources)
        resources.update(cpus=self.shape.cpus, hours=self.shape.hours)
        return {
            "argv": list(program.argv),
            "parameters": dict(self.run.parameters),
            "code": self.files_of_program.name,
            "world": self.shape.world_size,
            "env": dict(program.env),
            "resources": resources,
            "resume": {**asdict(program.resume), "arguments": list(program.arguments)},
            "metrics": asdict(program.metrics),
            "stop": asdict(program.stop),
            "monitor": asdict(program.monitor),
            "evaluate": {**asdict(program.evaluate), "command": list(program.scorer)},
        }

    def pin(self, run: RunDir) -> None:
        """It needs no checkpoint of another run."""

    # -- the plan

    @property
    def estimate(self) -> Estimate:
        """Upper limits: of an attempt, whose number is unknown."""
        shape = self.shape
        hours = shape.nodes * shape.gpus * shape.hours
        price = None
        if hours and self.profile.price_per_gpu_hour:
            price = hours * self.profile.price_per_gpu_hour
        cost = Cost(0, 0, 0.0, hours, price)
        world = shape.world_size
        numbers: dict[str, Any] = {"world": world, "worlds": [world], "data": {}, "stages": []}
        return Estimate(
            parameters={}, numbers=numbers, stages=[], devices=[], cost=cost, wall_hours=None, attempts=None
        )

    @property
    def checkpoints(self) -> ProgramCheckpoints:
        return ProgramCheckpoints()

    @property
    def description(self) -> RunDescription:
        parameters = dict(self.run.parameters)
        seed = parameters.pop("seed", 0)
        return RunDescription(
            design=repr((self.run.program, sorted(parameters.items()), self.shape)),
            seed=seed if type(seed) is int else 0,
            page=self._page(),
            differs=self.run.differs,
            against_base=self.run.against_base,
            notes=self._notes(),
            warnings=tracker.warnings(self.trackers),
        )

    def _page(self) -> list[str]:
        program = self.run.program
        values = {name: text_of(value) for name, value in self.run.parameters.items()}
        lines = [f"  command      {json.dumps([filled(word, values) for word in program.argv])}"]
        if program.resume.folder:
            where = filled(program.resume.folder, values)
            lines.append(f"  checkpoints  {program.resume.pattern} below {where}")
        if program.scorer:
            lines.append(f"  evaluation   {json.dumps([filled(word, values) for word in program.scorer])}")
        lines.append(f"  ranks        {self.shape.world_size}, {self.shape.cpus} cores each")
        return lines

    def _notes(self) -> list[str]:
        notes = []
        if self.shape.gpus:
            notes.append(f"GPU-hours are those of an attempt of {self.shape.hours:g} h, its wall limit")
        if not self.run.program.resume.folder:
            notes.append("without `resume`, each attempt starts from zero, unless the program finds its files itself")
        if not self.has_steps:
            notes.append("without `metrics` there is no progress, no canary and no goodput")
        return notes

    # -- comparison with its directory

    def matches(self, stored: Mapping[str, Any]) -> bool:
        return stored.get("hash") == self.identity["hash"]

    def changes_since(self, stored: Mapping[str, Any] | None) -> list[ConfigChange]:
        if not stored or not isinstance(stored.get("config"), dict):
            return []
        return compare(stored["config"], self.identity["config"])

    def in_words(self, changes: Sequence[ConfigChange]) -> str:
        return "; ".join(map(str, changes))

    def outdated(self, stored: Mapping[str, Any]) -> str:
        return ""

    # -- continuing

    def adopts(self, changes: Sequence[ConfigChange]) -> bool:
        return False

    def adopt(self, run: RunDir, changes: Sequence[ConfigChange]) -> None:
        raise NotImplementedError("a program does not continue with other data")

    def why_not_extended(self, run: RunDir, changes: Sequence[ConfigChange]) -> str:
        return "a program continues with its own parameters alone"

    def update(self, run: RunDir, older: bool) -> None:
        """Write command.json anew: what is outside of the identity may have changed, and a copy is not executed.

        With ``older`` code the words are those of now, and the files those of that snapshot.
        """
        record = self.record()
        if older:
            record["code"] = read_lenient(run.path / COMMAND).get("code", record["code"])
        write_text(run.path / COMMAND, to_json(record))

    def missing_code(self, run: RunDir) -> Sequence[str]:
        return []

    def check_source(self) -> None:
        """It starts from no checkpoint of another run."""


@dataclass(frozen=True)
class ProgramCheckpoints:
    """The checkpoints of a program: where it likes, of unknown size."""

    url = ""
    bytes = None

    def take_over(self, run: RunDir) -> None:
        """Nothing of them is remote."""


def _check_machine(work: CommandWorkload) -> Check:
    shape = work.shape
    host: Host = work.place.node
    preflight.check_request(shape.nodes, shape.gpus, work.profile, host)
    if shape.hours > work.profile.hours:
        what = f"resources.hours: an attempt on {work.profile.name} may last {work.profile.hours:g} h"
        raise ConfigError(what, value=shape.hours, remedy="Request less: a run continues in the next attempt.")
    if shape.spares and not work.profile.agents:
        what = f"resources.spares: {work.profile.name} has no node agents, which restart a run on them"
        raise ConfigError(what, value=shape.spares, remedy="Set `agents: true` in the profile, or spares to 0.")
    needed = shape.processes * shape.cpus
    text = f"{needed} cores for {shape.processes} ranks, of {host.cores} a node"
    if work.profile.kind == "slurm" and not work.profile.cpus_per_node:
        return Check(UNKNOWN, f"{text}; the profile {work.profile.name} gives no cpus_per_node")
    return Check(OK if needed <= host.cores else DEGRADED, text)


def _check_program(work: CommandWorkload) -> Check:
    """Whether the first word is a program, as far as this machine shows it."""
    values = {name: text_of(value) for name, value in work.run.parameters.items()}
    word = filled(work.run.program.argv[0], values)
    if word.startswith(("./", "../")) or ("/" in word and not word.startswith(("/", "{"))):
        path = work.run.program.code / word
        if not path.is_file():
            raise ConfigError("command: no such program in the copied code", str(path))
        return Check(OK, str(path))
    if "{" in word:
        return Check(UNKNOWN, f"{word}: known on the node")
    path_variable = work.run.program.env.get("PATH", os.environ.get("PATH", ""))
    place = shutil.which(word, path=path_variable)
    if place is None and work.profile.kind == "local":
        remedy = "Give its path, or add its folder to PATH under env."
        raise ConfigError("command: no such program, or not executable", value=word, remedy=remedy)
    return Check(OK if place else UNKNOWN, f"{word}: {place or 'not on this machine'}")


def _check_folder(work: CommandWorkload) -> Iterator[Check]:
    """Raise ConfigError if another run of any sweep below this root saves into the same folder."""
    values = {name: text_of(value) for name, value in work.run.parameters.items()}
    folder = _shared_folder(work.run.program.resume.folder, values)
    if folder is None:
        return
    place = work.place
    own = place.directories(work.name)
    remedy = "Give resume.folder a {parameter} that differs, or begin it with {run}/."
    stored = [read_lenient(each / "identity.json").get("hash") for each in own]
    if place.changed == "fork" and any(stored) and work.identity["hash"] not in stored:
        raise ConfigError(
            "resume.folder: the fork would save into the folder of its original", str(folder), remedy=remedy
        )
    for file in sorted(place.folder.parent.glob("[!.]*/[!.]*/command.json")):
        if file.parent in own:
            continue
        record = read_lenient(file)
        others = {name: text_of(value) for name, value in record.get("parameters", {}).items()}
        if _shared_folder(record.get("resume", {}).get("folder", ""), others) == folder:
            name = f"{file.parent.parent.name}/{file.parent.name}"
            what = f"resume.folder: the run {name} saves into it already"
            raise ConfigError(what, str(folder), remedy=f"{remedy} Or remove that run: {command('rm', name)}")
    yield Check(OK, f"{folder}: no other run below {place.folder.parent} saves into it")


def _shared_folder(template: str, values: Mapping[str, str]) -> Path | None:
    """The folder of checkpoints, if other runs can have the same one; else it is below the run directory."""
    folder = Path(filled(template, values)).expanduser()
    if folder.is_absolute():
        return Path(os.path.normpath(folder))
    return None


RULES = (
    Rule("cores", _check_machine, "has a node the GPUs, hours and cores that are asked for?"),
    Rule("program", _check_program, "does the first word name a program?"),
    Rule("checkpoint folder", _check_folder, "does any other run save into the folder of its checkpoints?"),
    preflight.RUNS_ROOT,
)
"""Of a run that executes a program, for its ``CommandWorkload``."""
