"""The work of an existing run directory, for reports: ``of_run`` finds its kind, once, by job.json or its place.

A kind is a row of ``KINDS``: a class with the methods of ``SubmittedWork``.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flip.config import merge
from flip.config.derived import model_label
from flip.evaluation.request import EvaluationRequest
from flip.monitoring.results import Outcome, differing, read_settings, stages_of
from flip.runs import checkpoint_folder
from flip.runs.command_record import COMMAND, filled, text_of
from flip.runs.errors import FlipError
from flip.runs.lifecycle import UNREADABLE
from flip.runs.rundir import RunDir, exists, read_lenient
from flip.runs.side_jobs import is_side_job
from jobs.common import next_commands
from jobs.common.cli import command
from jobs.common.job import record_of
from jobs.common.text import count
from jobs.submitted_runs import resubmit, select
from jobs.workloads.command import CommandWorkload
from jobs.workloads.evaluation import EvaluationWorkload
from jobs.workloads.training import TrainingWorkload

OF_MODELS = ("evaluate", "export")
"""Commands that take a complete training."""
STAGE = ("samples", "batch", "mask")
"""Fields of a stage that details show."""

Rows = Sequence[tuple[str, str]]
"""(label, text) each."""


class SubmittedWork(Protocol):
    """The work of a run directory."""

    @property
    def run(self) -> RunDir: ...

    @property
    def has_progress(self) -> bool:
        """Whether it has stages, steps and a loss, which status tables show."""

    @property
    def has_stages(self) -> bool:
        """Whether it has stages and an accuracy within the batch."""

    def missing(self) -> str:
        """Which file without which it cannot start is missing, in words; empty: none."""

    def next_commands(self, state: str) -> list[str]:
        """The command lines that usually follow in this state."""

    def again(self, retry: bool, diverged: bool = False) -> tuple[str, str | None]:
        """(advice how it starts again, command line or None). ``diverged``: its loss did."""

    def checkpoint_url(self) -> str:
        """Where its checkpoints are; empty: in its directory. Raises ConfigError if its settings are damaged."""

    def release(self) -> str:
        """A sentence: what else than waiting makes it need its pinned checkpoints no more; empty: nothing."""

    def details(self, outcome: Outcome) -> dict[str, Any]:
        """The keys ``about`` and ``evaluation`` of ``flip explain --json``."""

    def rows(self, document: Mapping[str, Any]) -> Rows:
        """What it does, for the page of ``flip explain``. ``document``: with the keys of ``details``."""


@dataclass(frozen=True)
class SubmittedTraining:
    """A run of a sweep."""

    run: RunDir
    has_progress = True
    has_stages = True

    def missing(self) -> str:
        try:
            is_there = exists(self.run.config)
        except OSError:  # the state of the run reports that
            return ""
        if is_there:
            return ""
        return "config.yaml is missing: submit the sweep again, which writes it"

    def next_commands(self, state: str) -> list[str]:
        return next_commands.of_run(self.run.path, state, OF_MODELS)

    def again(self, retry: bool, diverged: bool = False) -> tuple[str, str | None]:
        return resubmit.command(self.run, retry, diverged)

    def checkpoint_url(self) -> str:
        return merge.read_config(self.run.config).checkpoint.url

    def release(self) -> str:
        return ""

    def details(self, outcome: Outcome) -> dict[str, Any]:
        return {"about": _about(outcome), "evaluation": None}

    def rows(self, document: Mapping[str, Any]) -> Rows:
        summary = document["about"]
        if not summary["stages"]:
            return [("what", "a training; its config.yaml cannot be read")]
        stages = [
            f"{s['name']}: {count(s['samples'])}, batch {s['batch']}, mask {s['mask']}" for s in summary["stages"]
        ]
        total = f"{count(summary['samples'])} samples ({'; '.join(stages)})"
        differs = ", ".join(f"{key} = {value}" for key, value in summary["differs"].items()) or "in nothing"
        return [
            ("what", ", ".join(filter(None, [summary["size"], total]))),
            *_origin(summary["init"]),
            ("differs", f"{differs} (from the other runs of its sweep)"),
        ]


@dataclass(frozen=True)
class SubmittedEvaluation:
    """An evaluation job."""

    run: RunDir
    has_progress = False
    has_stages = False

    def missing(self) -> str:
        return ""  # its state reports a missing request

    def next_commands(self, state: str) -> list[str]:
        return next_commands.of_run(self.run.path, state)

    def again(self, retry: bool, diverged: bool = False) -> tuple[str, str | None]:
        return "request it again: `flip evaluate` does not resume an existing job", None

    def checkpoint_url(self) -> str:
        return ""

    def release(self) -> str:
        return f"To end an evaluation: {command('cancel', str(self.run.path))}"

    def details(self, outcome: Outcome) -> dict[str, Any]:
        return {"about": _about(outcome), "evaluation": self._request()}

    def _request(self) -> dict[str, Any] | None:
        """What it scores, and on which sets; None if its request is unreadable."""
        try:
            request = EvaluationRequest.read(self.run)
        except (FlipError, *UNREADABLE):  # the state of the run reports that
            return None
        return {
            "model": str(request.model or request.subject),
            "commits": list(map(str, request.commits)),
            "sets": [str(row.get("name", "")) for row in request.sets if isinstance(row, Mapping)],
            "masks": [mask for mask, _ in request.views],
        }

    def rows(self, document: Mapping[str, Any]) -> Rows:
        job = document["evaluation"]
        if job is None:
            return [("what", "an evaluation; its request cannot be read")]
        evaluated = ", ".join([job["model"], *job["commits"]])
        return [("what", f"evaluation of {evaluated}"), ("sets", ", ".join(job["sets"]))]


@dataclass(frozen=True)
class SubmittedCommand:
    """A run of a sweep that executes a program."""

    run: RunDir
    has_progress = True
    has_stages = False

    def missing(self) -> str:
        try:
            is_there = exists(self.run.path / COMMAND)
        except OSError:  # the state of the run reports that
            return ""
        if is_there:
            return ""
        return f"{COMMAND} is missing: submit the sweep again, which writes it"

    def next_commands(self, state: str) -> list[str]:
        return next_commands.of_run(self.run.path, state)

    def again(self, retry: bool, diverged: bool = False) -> tuple[str, str | None]:
        return resubmit.command(self.run, retry, diverged)

    def checkpoint_url(self) -> str:
        return ""

    def release(self) -> str:
        return ""

    def details(self, outcome: Outcome) -> dict[str, Any]:
        return {"about": {**_about(outcome), **self._record()}, "evaluation": None}

    def _record(self) -> dict[str, Any]:
        """The words of the command and its newest checkpoint."""
        record = read_lenient(self.run.path / COMMAND)
        values = {name: text_of(value) for name, value in record.get("parameters", {}).items()}
        saved = checkpoint_folder.checkpoints(self.run)
        return {
            "command": [filled(word, values) for word in record.get("argv", [])],
            "total": record.get("metrics", {}).get("total") or None,
            "checkpoint": saved[-1].record.get("path") if saved else None,
        }

    def rows(self, facts: Mapping[str, Any]) -> Rows:
        about = facts["about"]
        if not about["command"]:
            return [("what", "a program; its command.json cannot be read")]
        words = shlex.join(about["command"])
        differs = ", ".join(f"{key} = {value}" for key, value in about["differs"].items()) or "in nothing"
        rows = [("what", f"a program: {words}")]
        if about["checkpoint"]:
            rows.append(("saved", f"{about['checkpoint']}, by the program: that it continues exactly is its promise"))
        return [*rows, ("differs", f"{differs} (from the other runs of its sweep)")]


KINDS: Mapping[str, type[SubmittedTraining] | type[SubmittedEvaluation] | type[SubmittedCommand]] = {
    TrainingWorkload.kind: SubmittedTraining,
    EvaluationWorkload.kind: SubmittedEvaluation,
    CommandWorkload.kind: SubmittedCommand,
}
"""``job_kind`` of job.json -> the class for its directory."""


def of_run(run: RunDir, record: Mapping[str, Any] | None = None) -> SubmittedWork:
    """The work of a run directory. ``record``: its job.json, if it has been read.

    Without a readable record, the place of the directory shows what it is.
    """
    if record is None:
        record = record_of(run)
    kind = KINDS.get(str(record.get("job_kind")))
    if kind is None and is_side_job(run):
        kind = SubmittedEvaluation
    if kind is None and _is_program(run):
        kind = SubmittedCommand
    return (kind or SubmittedTraining)(run)


def _about(outcome: Outcome) -> dict[str, Any]:
    """Size, samples, stages, and the settings in which the run differs from others of its sweep.

    A program has no setting of a training: it is compared with programs alone, and a training with trainings.
    """
    settings = outcome.settings
    stages = stages_of(settings)
    runs = select.runs_below(outcome.run.path.parent)
    family = [read_settings(run) for run in runs if _is_program(run) == _is_program(outcome.run)]
    chosen = {}
    if settings:
        chosen = {key: settings.get(key) for key in differing(family)}
    init = None
    if settings.get("init.run") or settings.get("init.export"):
        init = {key: settings.get(f"init.{key}") for key in ("run", "stage", "samples", "extend", "export")}
    return {
        "size": model_label(settings),
        "samples": sum(int(stage.get("samples") or 0) for stage in stages.values()) or None,
        "stages": [{"name": name} | {k: stage.get(k) for k in STAGE} for name, stage in stages.items()],
        "differs": chosen,
        "init": init,
    }


def _is_program(run: RunDir) -> bool:
    return os.path.isfile(run.path / COMMAND)


def _origin(init: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if init is None:
        return []
    if init["export"]:
        return [("starts", f"with the weights of the export {init['export']}")]
    if init["extend"]:
        how = "extends it"
    else:
        how = "only its weights"
    return [("starts", f"with S = {count(init['samples'])} of {init['run']}, stage {init['stage']}: {how}")]
