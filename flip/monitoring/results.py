"""Reads the outcomes of runs from their directories, one row per run. No torch, no scheduler.

Runs may be unfinished or failed. A damaged file hides neither other files of its run nor other runs: ``Outcome.damage``
names it, and the state is ``unknown`` if it depends on that file.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from flip.common.plain_data import flatten
from flip.common.yaml_io import MAX_BYTES, parse_yaml
from flip.config.identity import generic_key
from flip.config.schema import Augment, Config, DataSet, EvaluationSet, ImageTower, Stage, TextTower
from flip.evaluation.metrics.result_files import COLUMNS, ScoreRecord, of_result, precision, read_scores, shown
from flip.evaluation.metrics.score import score_of
from flip.files.creation import read_regular
from flip.monitoring import metrics_reader as metrics
from flip.monitoring.metrics_reader import Metrics
from flip.runs import command_record, lifecycle, records
from flip.runs.errors import ConfigError, FlipError
from flip.runs.lifecycle import RunState, SchedulerView
from flip.runs.rundir import RunDir, read_record
from flip.runs.side_jobs import REQUEST

T = TypeVar("T")
#: Prefix of keys (as in ``generic_key``) -> section of the schema with its defaults.
_SECTIONS: dict[str, Any] = {
    "": Config(), "stages.*.": Stage(), "stages.*.image.": ImageTower(), "stages.*.text.": TextTower(),
    "stages.*.augment.": Augment(), "data.sets.*.": DataSet(), "evaluate.sets.*.": EvaluationSet(),
}  # fmt: skip
_TYPES = {bool: records.FLAG, int: records.INTEGER, float: records.NUMBER, str: records.SETTING, list: records.LIST}
_KINDS = {
    prefix + key: _TYPES[type(value)]
    for prefix, section in _SECTIONS.items()
    for key, value in flatten(asdict(section)).items()
    if value is not None
}
"""``generic_key`` of a setting -> type of its values, by its default."""


@dataclass(frozen=True)
class Attempt:
    """One attempt: start.json, end.json (empty while it runs), the causes recorded by its processes."""

    number: int
    start: Mapping[str, Any]
    end: Mapping[str, Any]
    causes: list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """The content of one run directory."""

    run: RunDir
    state: str
    """One of ``flip.runs.lifecycle.STATES``."""
    reason: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration as dotted key -> value; stages and evaluation sets go by their names."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """result.json; empty until the run is complete."""
    status: Mapping[str, Any] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    unreadable: tuple[str, ...] = ()
    """A sentence for each damaged file among those of the fields above."""

    @property
    def damage(self) -> list[str]:
        """A sentence for each damaged file, including metric lines and evaluations."""
        return [*self.unreadable, *self.metrics.damage, *self._stored[1]]

    @cached_property
    def metrics(self) -> Metrics:
        """The logged steps, as columns."""
        return metrics.read_columns(self.run)

    @cached_property
    def progress(self) -> dict[str, Any]:
        """samples, steps, seconds and samples_per_second of the steps that count; None for values not known yet."""
        if self.result:
            return {key: self.result.get(key) for key in ("samples", "seconds", "samples_per_second", "steps")}
        samples_seen, step = (self.metrics.last(key) for key in ("samples", "step"))
        seconds, speed = (self.metrics.last(key) for key in ("seconds", "samples_per_second"))
        return {
            "samples": None if samples_seen is None else int(samples_seen),
            "seconds": seconds,
            "samples_per_second": samples_seen / seconds if samples_seen is not None and seconds else speed,
            "steps": None if step is None else int(step),
        }

    @cached_property
    def samples_by_world(self) -> dict[int, int]:
        """World size -> samples of the steps that count, of a run whose attempts had several; else empty."""
        samples: dict[int, int] = {}
        starts = [attempt.start.get("resumes_from", 0) for attempt in self.attempts]
        ends = [*starts[1:], self.progress["samples"] or 0]
        for attempt, start, end in zip(self.attempts, starts, ends, strict=False):
            if "world" in attempt.start and end > start:
                world = attempt.start["world"]
                samples[world] = samples.get(world, 0) + end - start
        if len(samples) < 2:
            return {}
        return dict(sorted(samples.items()))

    @cached_property
    def throughput_varies(self) -> bool | None:
        """Whether its throughput varied (``metrics_reader.is_varying``); None if too few lines show it."""
        ends = [0]
        for key, samples in self.settings.items():
            if key.startswith("stages.") and key.endswith(".samples"):
                batch = self.settings.get(f"{key.removesuffix('samples')}batch") or 1
                ends.append(ends[-1] + -(-samples // batch) * batch)  # a last step is never cut
        return self.metrics.throughput_varies(ends[1:-1])

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The final scores, one per column, of the run itself and of evaluation jobs (``result_files.shown``)."""
        last = (self.result.get("stage"), self.result.get("samples"))
        points = self._points.get(last, [])
        if all(point.job for point in points):
            points = [of_result(self.result), *points]
        return shown(points)

    def curve(self) -> list[dict[str, Any]]:
        """Evaluations by S, those of jobs included: {stage, samples, seconds of training, evaluations}."""
        curve = []
        for (stage, samples_seen), points in self._points.items():
            seconds = next((point.seconds for point in points if point.seconds is not None), None)
            if seconds is None:
                seconds = self._seconds_at(samples_seen)
            curve.append({"stage": stage, "samples": samples_seen, "seconds": seconds, "evaluations": shown(points)})
        return sorted(curve, key=lambda point: point["samples"])

    @cached_property
    def _points(self) -> dict[tuple[Any, Any], list[ScoreRecord]]:
        """(stage, S) -> what was stored there."""
        points: dict[tuple[Any, Any], list[ScoreRecord]] = {}
        for point in self._stored[0]:
            points.setdefault((point.stage, point.samples_seen), []).append(point)
        return points

    @cached_property
    def _stored(self) -> tuple[list[ScoreRecord], list[str]]:
        """All scores below eval/, and a sentence for each damaged file."""
        files = RunFileReader()
        return read_scores(self.run, files.read), files.damaged

    def _seconds_at(self, samples_seen: int) -> float | None:
        """Training seconds at S = ``samples_seen``, by the nearest logged step at or before it."""
        if samples_seen == self.result.get("samples"):
            return self.result.get("seconds")
        return self.metrics.seconds_at(samples_seen)


def find_runs(root: str | os.PathLike[str]) -> list[RunDir]:
    """Run directories at ``root`` and up to two levels below it, by path."""
    root = Path(root)
    folders = [root, *sorted(root.glob("[!.]*/")), *sorted(root.glob("[!.]*/[!.]*/"))]
    # Path.is_file raises if the folder is closed to this user
    return [RunDir(path) for path in folders if path.name.isprintable() and os.path.isfile(path / "identity.json")]


def read_run(path: str | os.PathLike[str], state: RunState | None = None) -> Outcome:
    """The outcome of the run directory at ``path``.

    ``state``: of the run, if its scheduler was asked; None: what its files prove. Files that cannot be read are named
    (``Outcome.damage``) and hide no other.
    """
    run = RunDir(path)
    files = RunFileReader()
    # an evaluation job has a request in place of a configuration; os.path returns False in an unreadable folder
    is_request = os.path.exists(run.path / REQUEST) and not os.path.exists(run.config)
    settings = {}
    if not is_request:
        settings = _settings_of(run, files)
    result = files.read(run.result, read_record)
    attempts = []
    for n in files.read(run.attempts, lambda _: run.attempt_numbers()) or ():
        start, end = (files.read(run.attempt(n) / name, read_record) or {} for name in ("start.json", "end.json"))
        attempts.append(
            Attempt(n, start, end, files.read(run.attempt(n), lambda path: run.causes(int(path.name))) or [])
        )
    important = "; ".join(files.damaged)
    for path in (run.cancel, run.path / "job.json"):  # only for ``files.damaged``
        files.read(path, read_record)
    status = files.read(run.status, read_record)
    files.read(run.identity, read_record)
    if state is None:
        state = lifecycle.states([run], {})[run.path]
    damaged = tuple(files.damaged)
    reason = state.reason or important
    return Outcome(run, state.state, reason, settings, result or {}, status or {}, attempts, damaged)


def read_settings(run: RunDir) -> dict[str, Any]:
    """``Outcome.settings`` alone; empty if they cannot be read."""
    return _settings_of(run, RunFileReader())


def _settings_of(run: RunDir, files: "RunFileReader") -> dict[str, Any]:
    """The settings of a training, or of a run that executes a program; empty if they cannot be read."""
    program = run.path / command_record.COMMAND
    if os.path.exists(program):
        return files.read(program, command_record.settings) or {}
    return files.read(run.config, _read_settings) or {}


def stages_of(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of a stage -> its fields, in order, from flat settings."""
    stages: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        if key.startswith("stages."):
            name, _, field = key.removeprefix("stages.").partition(".")
            stages.setdefault(name, {})[field] = value
    return stages


class RunFileReader:
    """Reads files of a run; ``damaged`` has a sentence for each that cannot be read or understood."""

    def __init__(self) -> None:
        self.damaged: list[str] = []

    def read(self, path: Path, read: Callable[[Path], T]) -> T | None:
        """Call ``read`` with the path; return None if the file is damaged."""
        try:
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise ValueError("not a regular file")
            return read(path)
        except (FlipError, OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, KeyError):
                message = f"lacks {error}"
            else:
                message = str(error)
            self.damaged.append(message if str(path) in message else f"{path}: {message}")
            return None


def _read_settings(path: Path) -> dict[str, Any]:
    """The configuration as dotted key -> value; keys of this version are checked by the types of the schema."""
    table = parse_yaml(read_regular(path, MAX_BYTES).decode("utf-8"), str(path))
    records.check_depth(table)
    settings = {key: value for key, value in flatten(records.checked(table or {}, {})).items() if value is not None}
    return {records.printable(key): records.checked(value, _kind(key), key) for key, value in settings.items()}


def _kind(key: str) -> Any:
    """The type of a setting; keys of other versions may have any text, number or list."""
    return _KINDS.get(generic_key(key), records.ANY_SETTING)


def read_outcomes(root: str | os.PathLike[str], seen: Mapping[Path, SchedulerView] | None = None) -> list[Outcome]:
    """The outcomes of all runs below ``root``; ``seen`` as in ``read_runs``."""
    runs = find_runs(root)
    states = lifecycle.states(runs, seen or {})
    return [read_run(run.path, states[run.path]) for run in runs]


def read_runs(
    root: str | os.PathLike[str], seen: Mapping[Path, SchedulerView] | None = None, settings: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """The results of all runs below ``root``: a flat dict per run, all with the same keys, ready for a data frame.

    sweep, run, state, reason, attempts, samples, steps, seconds, samples_per_second, unsteady, world, parameters,
    flops, loss, accuracy; ``ROLE.SET.top1``, ``.low``, ``.high`` (95 % interval), ``.n`` and ``.precision`` (fp32,
    bf16, or "as trained" if the result does not say) of every evaluation set, and ``.score`` and ``.metric`` if it is
    compared by another score than top-1 (``flip.evaluation.metrics.score``); and the dotted configuration keys in which
    runs of one sweep differ. None if a run has no such value (yet). A set has the role that a configuration gives it,
    also for open_clip models.

    ``seen``: path of a run directory -> what its scheduler shows of its job (``flip.runs.lifecycle``). No scheduler is
    asked: without it a run that has not ended is ``unknown``. ``settings``: further dotted configuration keys to show.

    Raises ConfigError if there is no folder ``root``.
    """
    if not Path(root).is_dir():
        remedy = "Name a folder of runs, such as runs/quickstart."
        raise ConfigError("there is no such folder", str(root), remedy=remedy)
    outcomes = read_outcomes(root, seen)
    sweeps: dict[Path, list[Outcome]] = {}
    for outcome in outcomes:
        sweeps.setdefault(outcome.run.path.parent, []).append(outcome)
    shown = dict.fromkeys(key for members in sweeps.values() for key in differing(m.settings for m in members))
    shown |= dict.fromkeys(settings)
    roles = set_roles(outcomes)
    rows = [row(outcome, shown, roles) for outcome in outcomes]
    keys = list(dict.fromkeys(key for each in rows for key in each))
    return [{key: each.get(key) for key in keys} for each in rows]


def configured_roles(outcome: Outcome) -> dict[str, str]:
    """Name of a result -> role of its evaluation set, by the configuration of the run."""
    roles = {}
    for key, role in outcome.settings.items():
        if key.startswith("evaluate.sets.") and key.endswith(".role"):
            task = outcome.settings.get(f"{key.removesuffix('role')}task", "zeroshot")
            name = key.removeprefix("evaluate.sets.").removesuffix(".role")
            roles.update({name + suffix: role for suffix in COLUMNS[task]})
    return roles


def set_roles(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """Name of a result -> role of its evaluation set: as the first run configures it, else as in results.

    Jobs record the role ``test`` for each set that they score, also for a validation set of the run.
    """
    outcomes = list(outcomes)
    roles: dict[str, str] = {}
    for outcome in outcomes:
        roles = configured_roles(outcome) | roles
    for outcome in outcomes:
        for item in outcome.evaluations:
            roles.setdefault(item["name"], item.get("role", "test"))
    return roles


def row(outcome: Outcome, settings: Iterable[str] = (), roles: Mapping[str, str] | None = None) -> dict[str, Any]:
    """One flat row. ``settings``: the configuration keys to show. ``roles``: ``set_roles`` of all runs of the table."""
    roles = {**(roles or set_roles([outcome])), **configured_roles(outcome)}
    values: dict[str, Any] = {
        "sweep": outcome.run.sweep, "run": outcome.run.name, "state": outcome.state, "reason": outcome.reason,
        "attempts": len(outcome.attempts), **outcome.progress, "unsteady": outcome.throughput_varies,
        "world": outcome.result.get("world"), "parameters": (outcome.result.get("parameters") or {}).get("total"),
        "flops": outcome.result.get("flops"), "loss": outcome.metrics.last("loss"),
        "accuracy": outcome.metrics.last("accuracy"),
    }  # fmt: skip
    for item in outcome.evaluations:
        low, high = item.get("interval") or (None, None)
        score = {"top1": item["top1"], "low": low, "high": high, "n": item.get("n"), "precision": precision(item)}
        if "score" in item:
            score |= {"score": item["score"], "metric": score_of(item).label}
        values |= {f"{roles[item['name']]}.{item['name']}.{key}": value for key, value in score.items()}
    return values | {key: outcome.settings.get(key) for key in settings}


def differing(tables: Iterable[Mapping[str, Any]]) -> list[str]:
    """Dotted configuration keys in which the settings of runs differ, in the schema's order."""
    # a model of open_clip has no such keys, nor has a run whose settings cannot be read
    tables = [table for table in tables if table and "model.open_clip" not in table]
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if len({repr(table.get(key)) for table in tables}) > 1]
