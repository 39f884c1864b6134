"""Reads the part of a sweep file that executes a program of the user (docs/command.md): ``command``, or an entry of
``commands`` next to trainings.

command: [python, train.py, --lr, "{lr}"]       # words, no shell; {lr}: a parameter
code: .                                         # folder that is copied; default: that of the sweep file
set: {lr: 0.1}                                  # parameters that all runs share
grid: {lr: [0.1, 0.2]}                          # what varies: runs, list, zip, grid, where, seeds, as of trainings
env: {NAME: value}                              # environment variables; values may have placeholders
resources: {processes: 2, cpus: 1, hours: 1}
resume: {folder: out, pattern: "*.pt", arguments: [--resume, "{checkpoint}"]}
metrics: {file: metrics.jsonl, total: 1000}
stop: {signal: TERM, hang_minutes: 30}
monitor: {wandb: my-project}
evaluate: {command: [python, score.py, "{checkpoint}"]}
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from flip.common.option import option
from flip.common.plain_data import ConfigChange, compare
from flip.common.typed import read_fields, read_section
from flip.common.yaml_io import LocatedDict, SourceLocation, line_of, read_yaml
from flip.config.merge import assignment
from flip.config.resolve import is_relative_profile
from flip.runs.command_record import PLACES, placeholders, text_of
from flip.runs.errors import ConfigError, suggestion
from flip.runs.records import EXACT, LIST, MAPPING, Field, FieldType
from jobs.sweeps import expansion, sweep_file
from jobs.sweeps.expansion import NAME, NAME_RULE, Point
from jobs.sweeps.sweep_file import Sweep, seed_tail

PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
"""The name of a parameter."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
"""The name of an environment variable."""
METRICS = ("step", "samples", "epoch", "in_epoch", "loss", "accuracy", "samples_per_second")
"""Names of metrics that have a meaning."""
WORDS = FieldType("a list of words", lambda value: isinstance(value, (list, str)), schema=LIST.schema)
"""A text has an error of its own: ``_words``."""
SECTION = {
    "command": Field(WORDS, "The words of the program that each rank executes, without a shell."),
    "code": Field(EXACT, "Folder whose files are copied at submission; by default that of the sweep file."),
    "env": Field(MAPPING, "Environment variables of the program."),
    "resources": Field(MAPPING, "Nodes, processes, GPUs, cores and hours."),
    "resume": Field(MAPPING, "Where the program saves, and the words with which it continues."),
    "metrics": Field(MAPPING, "Where its numbers are."),
    "stop": Field(MAPPING, "How it is asked to save and end."),
    "monitor": Field(MAPPING, "Trackers that get its numbers."),
    "evaluate": Field(MAPPING, "A command that scores its last checkpoint."),
}
"""Keys of a program, in a sweep file or an entry of ``commands``."""
VARIED = ("set", "runs", "list", "zip", "grid", "where")
TOP = ("name", "title", "notes", "cluster", "seeds", "paper", "table", "baselines")
"""Keys that a sweep file of a program shares with those of trainings."""


@dataclass(frozen=True)
class CommandResources:
    """What a program occupies."""

    nodes: int = option(1, ge=1, le=2**20)
    """Nodes."""
    spares: int = option(0, ge=0, le=1024)
    """Further nodes of the allocation, which wait to replace lost ones."""
    processes: int = option(1, ge=1, le=1024)
    """Ranks per node: the program is started once for each."""
    gpus: int = option(0, ge=0, le=1024)
    """GPUs per node."""
    cpus: int = option(0, ge=0, le=4096)
    """CPU cores per process; 0: a share of the node."""
    hours: float = option(0.0, ge=0)
    """Wall limit of one attempt; 0: the ``hours`` of the cluster profile, at most 24."""
    cluster: str = ""
    """Cluster profile of this run; empty: the sweep's."""


@dataclass(frozen=True)
class ResumeSettings:
    """How the checkpoints of a program are found, and how it gets one."""

    folder: str = ""
    """Folder of its checkpoints; relative to its working directory. Empty: they are not followed."""
    pattern: str = "*"
    """Which paths below the folder are checkpoints, such as ``*.pt`` or ``checkpoint-*``: files or folders."""
    number: str = r"(\d+)(?!.*\d)"
    """Regular expression that finds the number in such a path; by default its last number."""
    unit: int = option(1, ge=1)
    """What the number counts, in steps or samples: with a number per epoch, the steps of an epoch."""
    done: str = ""
    """Name of the file in such a folder that is written last, such as ``.metadata``."""
    renames: bool = False
    """Whether the program writes under another name and renames, so that each path that exists is complete."""


@dataclass(frozen=True)
class MetricSettings:
    """Where the numbers of a program are: one of ``file``, ``pattern`` and ``tensorboard``."""

    file: str = ""
    """File to which it appends a line of JSON per entry; by default metrics.jsonl in its working directory."""
    pattern: str = ""
    """Regular expression with named groups for the lines that rank 0 prints or logs: ``step (?P<step>\\d+)``."""
    tensorboard: str = ""
    """Folder of event files of TensorBoard."""
    names: dict[str, str] = field(default_factory=dict)
    """Name of a metric here -> its name in the program: ``{loss: train/loss}``."""
    batch: int = option(0, ge=0)
    """Samples of a step, for a program that counts steps alone: its S then counts samples, as that of trainings."""
    per_epoch: int = option(0, ge=0)
    """S of an epoch, in steps or samples, for a program that counts epochs. ``in_epoch`` is S since its start."""
    total: int = option(0, ge=0)
    """Position at which the program is complete; an end with 0 before it is a failure. 0: unknown."""


@dataclass(frozen=True)
class StopSettings:
    """How a program is asked to save and end."""

    signal: str = option("TERM", choices=["TERM", "USR1", "USR2"])
    """The signal that it handles. The other two are ignored when it starts."""
    hang_minutes: float = option(0.0, ge=0)
    """Minutes without output, metrics and checkpoint after which rank 0 is killed and starts again; 0: never."""


@dataclass(frozen=True)
class MonitorSettings:
    """Where the numbers of a program are sent. A field per tracker, as in the configuration of trainings."""

    wandb: str = ""
    """Project of Weights & Biases, PROJECT or ENTITY/PROJECT; empty: none."""


@dataclass(frozen=True)
class EvaluateSettings:
    """How the last checkpoint of a program is scored, by rank 0, after all ranks have ended well."""

    pattern: str = ""
    """Regular expression with the groups ``score`` and ``name`` for lines of output; empty: lines of JSON with them."""


SECTION_KINDS = {
    "resources": CommandResources,
    "resume": ResumeSettings,
    "metrics": MetricSettings,
    "stop": StopSettings,
    "monitor": MonitorSettings,
    "evaluate": EvaluateSettings,
}
"""Key of ``SECTION`` -> what its mapping holds; ``resume`` also has ``arguments``, ``evaluate`` ``command``."""


@dataclass(frozen=True)
class ProgramSettings:
    """A program, as a sweep file describes it. Words and values of ``env`` are templates."""

    argv: tuple[str, ...]
    code: Path
    env: Mapping[str, str]
    resume: ResumeSettings
    arguments: tuple[str, ...]
    """Of ``resume``: added once a checkpoint exists."""
    metrics: MetricSettings
    stop: StopSettings
    monitor: MonitorSettings
    evaluate: EvaluateSettings
    scorer: tuple[str, ...] = ()
    """Words of ``evaluate``; empty: none."""


@dataclass(frozen=True)
class CommandRun:
    """A run of a program."""

    name: str
    arm: str
    """Its name without the seed."""
    program: ProgramSettings
    parameters: Mapping[str, Any]
    resources: CommandResources
    differs: Mapping[str, Any] = field(default_factory=dict)
    """Its values of the parameters that vary in the sweep."""
    against_base: Sequence[ConfigChange] = ()
    """Differences from ``set``."""

    @property
    def settings(self) -> str:
        return repr((self.program, sorted(self.parameters.items()), self.resources))


def is_command_file(path: Path) -> bool:
    """Whether a sweep file executes a program. Raises ConfigError as ``read_yaml``."""
    return "command" in read_yaml(path)


def load(
    path: Path,
    overrides: Sequence[str] = (),
    only: str | None = None,
    seeds: Sequence[int] | None = None,
    may_be_empty: bool = False,
) -> Sweep[CommandRun]:
    """The runs of a sweep file with ``command``, as ``sweep_file.load`` those of trainings."""
    table = read_yaml(path)
    place = SourceLocation(str(path))
    known = {**{name: sweep_file.KEYS[name] for name in (*TOP, *VARIED)}, **SECTION}
    read_fields(table, {name: key.kind for name, key in known.items()}, place, _why_not_here)
    name = table.get("name", path.stem)
    if not NAME.fullmatch(name):
        raise place.child("name", line_of(table, "name")).error("not a name for a sweep", name, NAME_RULE)
    runs = runs_of(table, place, path, path.stem.lower(), overrides, seeds)
    refuse_shared_folders(runs, str(path))
    head = sweep_file.head(path, table, {run.arm for run in runs})
    cluster = table.get("cluster", "local")
    folder = str(Path.cwd()) if is_relative_profile(cluster) else ""
    names = [run.name for run in runs]
    chosen = sweep_file.chosen(runs, only, may_be_empty, path)
    return Sweep(name, table.get("title", ""), table.get("notes", ""), cluster, chosen, names, *head, folder)


def beside(path: Path, seeds: Sequence[int] | None = None) -> list[CommandRun]:
    """The runs of the ``commands`` of a sweep file of trainings."""
    table = read_yaml(path)
    place = SourceLocation(str(path), "commands", line_of(table, "commands"))
    runs: list[CommandRun] = []
    for name, entry in (table.get("commands") or {}).items():
        here = place.child(name, line_of(table["commands"], name))
        expansion.check_name(name, "run", here)
        if not isinstance(entry, LocatedDict):
            raise here.error("needs a mapping with `command`", entry)
        known = {**{key: sweep_file.KEYS[key] for key in (*VARIED, "seeds")}, **SECTION}
        read_fields(entry, {key: known[key].kind for key in known}, here)
        own_seeds = seeds
        if not any("seed" in placeholders(str(word)) for word in _words(entry.get("command"), here)):
            own_seeds = None  # it has none, so that --seeds is about the others
        runs += runs_of(entry, here, path, name, (), own_seeds, prefix=name)
    refuse_shared_folders(runs, str(path))
    return runs


def runs_of(
    table: LocatedDict,
    place: SourceLocation,
    path: Path,
    name: str,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] | None = None,
    prefix: str = "",
) -> list[CommandRun]:
    """The runs of a table. ``name``: of a run that varies nothing. ``prefix``: of the names of all others."""
    program = _program(table, place, path)
    varied = LocatedDict({key: table[key] for key in VARIED[1:] if key in table}, table.lines)
    arms = expansion.points(varied, place)
    if prefix:
        arms = [Point(prefix) + arm for arm in arms]
    arms = [arm if arm.name else Point(name, arm.layers, arm.where) for arm in arms]
    tails = _tails(table, place, seeds)
    base_place = place.child("set", line_of(table, "set"))
    base = (base_place.where, table.get("set", LocatedDict()))
    top = [assignment(text) for text in overrides]
    shared = _values([base], table, place)
    runs = []
    for arm, tail in itertools.product(arms, tails):
        point = arm + tail
        if not NAME.fullmatch(point.name):
            raise place.error("not a valid name of a run", point.name, f"Name it under runs. {NAME_RULE}")
        parameters, resources = _values([base, *point.layers, *top], table, place)
        if not all(_holds(condition, point.name, parameters, resources) for condition in point.where):
            continue
        _refuse_placeholders(program, parameters, place)
        changes = compare(shared[0], parameters)
        runs.append(CommandRun(point.name, arm.name, program, parameters, resources, {}, changes))
    if not runs:
        raise place.child("where", line_of(table, "where")).error("holds for none of the runs")
    _refuse_unused(program, runs, place)
    return [_with_differences(run, runs) for run in runs]


def refuse_shared_folders(runs: Sequence[CommandRun], where: str) -> None:
    """Raise ConfigError if two runs would save into the same folder: each would continue from the other's."""
    seen: dict[str, str] = {}
    for run in runs:
        folder = run.program.resume.folder
        if not folder or not folder.startswith(("/", "~", "{")) or "{run}" in folder:
            continue  # below its own run directory
        for key, value in run.parameters.items():
            folder = folder.replace(f"{{{key}}}", text_of(value))
        other = seen.setdefault(folder, run.name)
        if other != run.name:
            what = f"{other} and {run.name} would save into the same folder"
            remedy = "Give resume.folder a {parameter} that differs, or begin it with {run}/."
            raise ConfigError(f"resume.folder: {what}", where, folder, remedy)


def refuse_repeated(names: Sequence[str], path: Path) -> None:
    """Raise ConfigError if a training and a program of a sweep have the same name."""
    repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if repeated is not None:
        raise ConfigError("commands: a run has this name already", str(path), repeated, "Rename the program.")


def _why_not_here(key: str) -> str:
    if key == "recipe":
        return "A program has no recipe: leave out `recipe`, or name the program under `commands`."
    if key in sweep_file.KEYS:
        return "A sweep file with `command` does not have this key."
    return ""


def _program(table: LocatedDict, place: SourceLocation, path: Path) -> ProgramSettings:
    argv = _words(table.get("command"), place.child("command", line_of(table, "command")))
    if not argv:
        raise place.child("command", line_of(table, "command")).error("names no program")
    sections = {key: _section(table, key, place) for key in ("resume", "metrics", "stop", "monitor", "evaluate")}
    resume_place = place.child("resume", line_of(table, "resume"))
    resume_table = LocatedDict(sections["resume"], sections["resume"].lines)
    words = resume_table.pop("arguments", [])
    arguments = _words(words, resume_place.child("arguments", line_of(sections["resume"], "arguments")))
    resume = ResumeSettings(**read_section(ResumeSettings, resume_table, resume_place))
    _check_resume(resume, arguments, resume_place)
    metrics_place = place.child("metrics", line_of(table, "metrics"))
    metrics = MetricSettings(**read_section(MetricSettings, sections["metrics"], metrics_place))
    _check_metrics(metrics, metrics_place)
    stop = StopSettings(**read_section(StopSettings, sections["stop"], place.child("stop", line_of(table, "stop"))))
    monitor_place = place.child("monitor", line_of(table, "monitor"))
    monitor = MonitorSettings(**read_section(MonitorSettings, sections["monitor"], monitor_place))
    evaluate, scorer = _evaluation(sections["evaluate"], place.child("evaluate", line_of(table, "evaluate")))
    env = _variables(_section(table, "env", place), place.child("env", line_of(table, "env")))
    code = (path.absolute().parent / Path(table.get("code", ".")).expanduser()).resolve()
    if not code.is_dir():
        raise place.child("code", line_of(table, "code")).error("no such folder", str(code))
    return ProgramSettings(tuple(argv), code, env, resume, tuple(arguments), metrics, stop, monitor, evaluate, scorer)


def _evaluation(table: LocatedDict, place: SourceLocation) -> tuple[EvaluateSettings, tuple[str, ...]]:
    """(how scores are read, words of the command)."""
    settings = LocatedDict(table, table.lines)
    words = _words(settings.pop("command", []), place.child("command", line_of(table, "command")))
    evaluate = EvaluateSettings(**read_section(EvaluateSettings, settings, place))
    if table and not words:
        raise place.error("needs `command`: the words that score a checkpoint")
    if evaluate.pattern and "score" not in _compiled(evaluate.pattern, place.child("pattern")).groupindex:
        what = "has no group named score"
        raise place.child("pattern").error(what, evaluate.pattern, r"For example (?P<name>\w+): (?P<score>[\d.]+).")
    return evaluate, tuple(words)


def _section(table: LocatedDict, key: str, place: SourceLocation) -> LocatedDict:
    value = table.get(key)
    if value is None:
        return LocatedDict()
    if not isinstance(value, LocatedDict):
        raise place.child(key, line_of(table, key)).error("needs a mapping", value)
    return value


def _words(value: Any, place: SourceLocation) -> list[str]:
    """The words of a list. Raises ConfigError for a text, which no shell would split, and for what is no word."""
    if isinstance(value, str):
        try:
            example = ", ".join(shlex.split(value))
        except ValueError:
            example = value
        raise place.error("needs a list of words: no shell splits a text", value, f"Write [{example}].")
    if not isinstance(value, list):
        raise place.error("needs a list of words", value)
    words = []
    for i, word in enumerate(value):
        if isinstance(word, bool) or not isinstance(word, (str, int, float)):
            raise place.child(i).error("is not a word", word, "Put it in quotes.")
        if "\0" in str(word):
            raise place.child(i).error("has a NUL character, which no word can have", word)
        words.append(str(word))
    return words


def _variables(table: LocatedDict, place: SourceLocation) -> dict[str, str]:
    variables = {}
    for name, value in table.items():
        here = place.child(name, line_of(table, name))
        if not VARIABLE.fullmatch(name):
            raise here.error("not the name of an environment variable")
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or "\0" in str(value):
            raise here.error("needs text", value, "Put it in quotes.")
        variables[name] = str(value)
    return variables


def _check_resume(resume: ResumeSettings, arguments: Sequence[str], place: SourceLocation) -> None:
    if arguments and not resume.folder:
        raise place.child("arguments").error("need `folder`: where the program saves")
    _compiled(resume.number, place.child("number"))
    parts = Path(resume.pattern).parts
    if not parts or resume.pattern.startswith("/") or ".." in parts:
        raise place.child("pattern").error("is not a pattern below `folder`", resume.pattern)


def _check_metrics(metrics: MetricSettings, place: SourceLocation) -> None:
    given = [name for name in ("file", "pattern", "tensorboard") if getattr(metrics, name)]
    if len(given) > 1:
        raise place.error("names several sources", ", ".join(given), "Keep one of them.")
    for name in metrics.names:
        if name not in METRICS:
            remedy = suggestion(name, METRICS) or f"Metrics: {', '.join(METRICS)}."
            raise place.child("names").error("no such metric", name, remedy)
    if metrics.pattern:
        groups = _compiled(metrics.pattern, place.child("pattern")).groupindex
        positions = [name for name in ("step", "samples", "epoch") if metrics.names.get(name, name) in groups]
        if not positions:
            what = "has no named group for the position"
            raise place.child("pattern").error(what, metrics.pattern, r"For example (?P<step>\d+).")
        if positions == ["epoch"] and not metrics.per_epoch:
            what = "counts epochs alone, whose length is unknown"
            raise place.child("pattern").error(what, metrics.pattern, "Give metrics.per_epoch.")


def _compiled(pattern: str, place: SourceLocation) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise place.error(f"is no regular expression: {error}", pattern) from error


def _tails(table: LocatedDict, place: SourceLocation, seeds: Sequence[int] | None) -> list[Point]:
    """A point per seed; without seeds an empty one."""
    chosen = table.get("seeds", []) if seeds is None else seeds
    here = place.child("seeds", line_of(table, "seeds"))
    for seed in chosen:
        if type(seed) is not int or seed < 0:
            raise here.error("needs whole numbers", seed)
    points = [Point(seed_tail(seed), ((here.where, LocatedDict({"seed": seed})),)) for seed in chosen]
    return expansion.distinct(points, here, "Give each seed once.") or [Point()]


def _values(
    layers: Sequence[expansion.Layer], table: LocatedDict, place: SourceLocation
) -> tuple[dict[str, Any], CommandResources]:
    """(parameters, resources) of layers; the later override the earlier."""
    parameters: dict[str, Any] = {}
    resources = LocatedDict(_section(table, "resources", place), getattr(table.get("resources"), "lines", {}))
    names = [each.name for each in fields(CommandResources)]
    for where, layer in layers:
        here = SourceLocation(where)
        for key, value in layer.items():
            child = here.child(key, line_of(layer, key))
            if key.startswith("resources."):
                resources[key.removeprefix("resources.")] = value
            elif key in PLACES:
                raise child.error("a parameter may not have this name: it is a placeholder of the launcher")
            elif not PARAMETER.fullmatch(key):
                remedy = f"Parameters have names such as lr; what a program occupies: resources.{names[0]}."
                raise child.error("not the name of a parameter", remedy=remedy)
            elif not isinstance(value, (str, int, float)) or "\0" in str(value):
                raise child.error("needs text, a number, or true or false", value)
            else:
                parameters[key] = value
    read = read_section(CommandResources, resources, place.child("resources", line_of(table, "resources")))
    return parameters, CommandResources(**read)


def _holds(condition: Any, name: str, parameters: Mapping[str, Any], resources: CommandResources) -> bool:
    known = {**parameters, **{f"resources.{key}": value for key, value in asdict(resources).items()}}
    condition.check(known)
    return bool(condition.holds(name, known))


def _templates(program: ProgramSettings) -> dict[str, str]:
    """What may have placeholders, by its place in the file."""
    named = {f"command.{i}": word for i, word in enumerate(program.argv)}
    named |= {f"resume.arguments.{i}": word for i, word in enumerate(program.arguments)}
    named |= {f"env.{name}": value for name, value in program.env.items()}
    named |= {f"evaluate.command.{i}": word for i, word in enumerate(program.scorer)}
    named |= {"resume.folder": program.resume.folder, "metrics.file": program.metrics.file}
    named["metrics.tensorboard"] = program.metrics.tensorboard
    return named


def _refuse_placeholders(program: ProgramSettings, parameters: Mapping[str, Any], place: SourceLocation) -> None:
    """Raise ConfigError for a placeholder that nothing fills."""
    for key, template in _templates(program).items():
        known = [*parameters, *PLACES]
        if not key.startswith(("resume.arguments", "evaluate.command")):
            known.remove("checkpoint")
        for name in placeholders(template):
            if name == "checkpoint" and key.startswith("evaluate.command") and not program.resume.folder:
                raise place.child(key).error("needs resume.folder: where the program saves", "{checkpoint}")
            if name in known:
                continue
            remedy = suggestion(name, known) or f"Parameters and places: {', '.join(known)}."
            if name == "checkpoint":
                remedy = "It exists from the second attempt on: use it in resume.arguments, or in evaluate.command."
            raise place.child(key).error("an unknown placeholder", f"{{{name}}}", remedy)


def _refuse_unused(program: ProgramSettings, runs: Sequence[CommandRun], place: SourceLocation) -> None:
    """Raise ConfigError for a parameter that no word has: runs that differ in it alone would do the same."""
    used = {name for template in _templates(program).values() for name in placeholders(template)}
    for name in dict.fromkeys(name for run in runs for name in run.parameters):
        if name not in used:
            remedy = f"Add {{{name}}} to a word, such as [--{name}, '{{{name}}}'], or remove it."
            raise place.error(f"the parameter {name} is in no word of the command", remedy=remedy)


def _with_differences(run: CommandRun, runs: Sequence[CommandRun]) -> CommandRun:
    rows = [dict(other.parameters) for other in runs]
    varying = [
        key for key in dict.fromkeys(itertools.chain(*rows)) if any(row.get(key) != rows[0].get(key) for row in rows)
    ]
    differs = {key: run.parameters.get(key) for key in varying}
    return CommandRun(run.name, run.arm, run.program, run.parameters, run.resources, differs, run.against_base)
