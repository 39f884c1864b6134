"""The documents that commands print with ``--json``, as tables of ``flip.runs.records`` (docs/automation.md).

A promise to scripts: a key keeps its name, its type and its meaning. New keys may be added, so a reader ignores unknown
ones. A key that is listed is always present, unless it is ``optional``; null means unknown, or not written yet.
``flip schema NAME`` prints the JSON Schema of a document, which ``flip.config.json_schema`` makes.
"""

from typing import Any

from flip.runs.records import ANYTHING, FLAG, INTEGER, NUMBER, TEXT, Field, FieldType

STATES = ("queued", "running", "waiting", "complete", "failed", "cancelled", "stopped", "unknown")
"""``flip.runs.lifecycle.STATES``, which --help has no time to import; a test compares them."""
STATE = FieldType("a state of a run", lambda value: value in STATES, schema={"enum": list(STATES)})


def key(kind: Any, meaning: str, null: bool = False, optional: bool = False) -> Field:
    """A key of a document. ``null``: it may be null."""
    return Field(kind, meaning, required=not optional, null=null or kind is ANYTHING)


VALUES = {"*": Field(ANYTHING, null=True)}
"""Values of any type, by name."""
NEXT = [TEXT]
"""Key ``next``: command lines (``jobs.common.next_commands``)."""

_COST = {
    "samples": key(INTEGER, "samples of training"),
    "steps": key(INTEGER, "optimiser steps"),
    "flops": key(NUMBER, "floating-point operations of training"),
    "gpu_hours": key(NUMBER, "GPU-hours; null if the speed is unknown", null=True),
    "price": key(NUMBER, "by `price_per_gpu_hour` of the profile; null without one", null=True),
}  # fmt: skip
_CHANGE = {
    "key": key(TEXT, "the setting"),
    "was": key(ANYTHING, "its earlier value"),
    "now": key(ANYTHING, "its value now"),
}  # fmt: skip
_INHERITED = {
    "address": key(TEXT, "of the remote folder"),
    "commits": key(INTEGER, "number of these checkpoints"),
    "bytes": key(INTEGER, "their size"),
    "can_be_taken": key(FLAG, "whether `submit --take-over` can let the run delete them: they are below its URL"),
}  # fmt: skip
"""A remote folder with checkpoints that a run has inherited."""
_PLANNED_RUN = {
    "name": key(TEXT, "name of the run in the sweep"),
    "directory": key(TEXT, "its folder below `folder`; of a fork NAME-v2"),
    "action": key(TEXT, "`new`, `changed`, `dropped`, or the state of the existing run"),
    "starts": key(FLAG, "whether submit starts it"),
    "reason": key(TEXT, "why, for people"),
    "cluster": key(TEXT, "its profile"),
    "extends": key(FLAG, "whether `--changed extend` lets it continue from the newest checkpoint of the changed run"),
    "copied_from": key(TEXT, "where a copied run directory was submitted; empty: here"),
    "inherited": key([_INHERITED], "remote folders with checkpoints that it inherited and never deletes"),
    "differs": key(VALUES, "settings in which it differs from others of the sweep"),
    "base": key([_CHANGE], "settings in which it differs from the base of the sweep"),
    "changes": key([_CHANGE], "settings that have changed since it was submitted"),
    "identity": key(TEXT, "hash of everything that changes its results"),
    "notes": key([TEXT], "remarks for people"),
    "warnings": key([TEXT], "warnings for people"),
    "world": key(INTEGER, "number of ranks"),
    "worlds": key([INTEGER], "numbers of ranks that its lanes allow"),
    "data": key(VALUES, "samples, lanes, loader processes, passes over the data"),
    "stages": key([VALUES], "steps, learning rate, memory and cost of each stage"),
    "parameters": key({"*": INTEGER}, "parameters of the model: image, text, total"),
    "wall_hours": key(NUMBER, "hours of training at the assumed speed; null if unknown", null=True),
    "attempts": key(INTEGER, "wall limits that the run needs at that speed", null=True),
    "cost": key(_COST, "its own cost"),
}  # fmt: skip
_OUTCOME = {
    "started": key([TEXT], "runs that were started"),
    "trashed": key(VALUES, "run -> where its old folder is"),
    "still_saving": key([TEXT], "runs that could not be moved, because they still save"),
    "cancelled_meanwhile": key([TEXT], "runs that were cancelled during the call"),
}  # fmt: skip
_PLAN = {
    "sweep": key(TEXT, "name of the sweep"),
    "title": key(TEXT, "its title, or empty"),
    "cluster": key(TEXT, "the profile"),
    "folder": key(TEXT, "folder of its runs; the other commands accept it"),
    "files": key([TEXT], "the files that were read"),
    "runs": key([_PLANNED_RUN], "a row per run"),
    "dropped": key([{
        "name": key(TEXT, "the run"),
        "state": key(TEXT, "its state"),
        "reason": key(TEXT, "why, for people"),
        "prunes": key(FLAG, "whether `--prune` moves it to the trash"),
    }], "existing runs that the sweep no longer has"),
    "cost": key(_COST, "of the runs that start"),
    "question": key(TEXT, "what `--yes` confirms; empty: nothing"),
    "batches": key([VALUES], "Slurm jobs of a dry run"),
    "assumption": key(TEXT, "the speed on which hours are based"),
    "checks": key([{
        "name": key(TEXT, "what was checked"),
        "detail": key(TEXT, "what was found"),
        "skipped": key(FLAG, "whether the check could not be made here"),
        "runs": key([TEXT], "runs that it concerns; empty: all"),
    }], "the checks that passed"),
    "outcome": key(_OUTCOME, "what was done; empty lists in a dry run", optional=True),
    "next": key(NEXT, "commands that usually follow; empty if it was refused", optional=True),
}  # fmt: skip
_STATUS = {
    "sweep": key(TEXT, "name of the sweep"),
    "run": key(TEXT, "name of the run"),
    "state": key(STATE, "its state"),
    "reason": key(TEXT, "why, for people: do not parse it"),
    "stage": key(TEXT, "current stage", null=True),
    "samples": key(INTEGER, "samples seen", null=True),
    "total": key(INTEGER, "samples of the whole training", null=True),
    "step": key(INTEGER, "optimiser steps until now", null=True),
    "steps": key(INTEGER, "steps of the whole training", null=True),
    "loss": key(NUMBER, "newest loss", null=True),
    "accuracy": key(NUMBER, "newest accuracy within the batch", null=True),
    "phase": key(TEXT, "as the trainer wrote it", null=True),
    "cluster": key(TEXT, "its profile", null=True),
    "samples_per_second": key(NUMBER, "speed while it runs", null=True),
    "eta_seconds": key(NUMBER, "time left at that speed", null=True),
    "unsteady": key(ANYTHING, "how its speed varies, if it does"),
    "attempts": key(INTEGER, "attempts until now"),
    "restarts": key(INTEGER, "attempts after the first"),
    "restart": key(TEXT, "how the newest attempt started: `in the job` or `requeue`; null: the first", null=True),
    "wall_seconds": key(NUMBER, "seconds of all attempts", null=True),
    "gpu_hours": key(NUMBER, "GPU-hours of all attempts", null=True),
    "progress_time": key(NUMBER, "Unix time of the newest progress", null=True),
    "score": key({
        "name": key(TEXT, "the first test set of a complete run"),
        "top1": key(NUMBER, "its accuracy, 0 to 1"),
    }, "its test score", null=True),
    "next": key(NEXT, "commands about it that usually follow"),
}  # fmt: skip
_GOODPUT = {
    "name": key(TEXT, "the run, or the sum of a sweep"),
    "unit": key(TEXT, "unit of `hours`: core-hours or GPU-hours"),
    "hours": key({"*": NUMBER}, "useful, repeated, starting, saving, other, lost, unknown"),
    "total": key(NUMBER, "their sum"),
    "share": key({"*": NUMBER}, "the same as shares of the total", null=True),
    "waiting_hours": key(NUMBER, "hours in the queue"),
    "attempts": key(INTEGER, "number of attempts"),
    "interruptions": key(INTEGER, "attempts that did not end by themselves"),
    "advice": key(TEXT, "the setting to change", null=True),
    "gain": key(NUMBER, "what that would save", null=True),
    "faults": key([{
        "attempt": key(INTEGER, "the attempt that ended"),
        "cause": key(TEXT, "the cause of its end", null=True),
        "restart": key(TEXT, "`in the job` or `requeue`"),
        "seconds": key(VALUES, "detect, decide, start, restore, replay; null if unknown"),
        "total_seconds": key(NUMBER, "their sum", null=True),
        "requeue_seconds": key(NUMBER, "what a requeue would have taken", null=True),
    }], "attempts that were followed by another one"),
}  # fmt: skip
_EVIDENCE = {
    "attempt": key(INTEGER, "its number"),
    "action": key(TEXT, "what was decided: again, later, stop, done", null=True),
    "expected": key(
        TEXT, "what the next start would decide, of an end that was not recorded", null=True, optional=True
    ),
    "cause": key(TEXT, "the cause of the end (docs/restarts.md)", null=True),
    "reason": key(TEXT, "the cause in words", null=True),
    "code": key(INTEGER, "exit code", null=True),
    "state": key(TEXT, "the state of the job at the end, as Slurm names it", null=True, optional=True),
    "rank": key(INTEGER, "the rank of the root cause", null=True, optional=True),
    "log": key(TEXT, "the log of the root cause", null=True),
    "lines": key([TEXT], "its last lines"),
}  # fmt: skip
_NEXT = {
    "what": key(TEXT, "what follows, for people"),
    "command": key(TEXT, "a command to type", null=True),
    "not_before": key(ANYTHING, "when a waiting run starts at the earliest"),
    "estimate": key(ANYTHING, "when Slurm expects to start it"),
    "commands": key(NEXT, "that command, and others that usually follow"),
}  # fmt: skip
_EXPLAIN = {
    "sweep": key(TEXT, "name of the sweep"),
    "run": key(TEXT, "name of the run"),
    "folder": key(TEXT, "its run directory"),
    "about": key(VALUES, "size, samples, stages, differing settings, initial weights"),
    "evaluation": key(VALUES, "of an evaluation job: model, commits, sets, masks", null=True),
    "code": key(VALUES, "the snapshot of the code"),
    "state": key(_STATUS, "as `status` prints it"),
    "evidence": key(_EVIDENCE, "the newest decision; null before an end", null=True),
    "start": key(ANYTHING, "a batch script that failed since"),
    "attempts": key([VALUES], "a row per attempt"),
    "next": key(_NEXT, "what follows"),
    "incidents": key([VALUES], "failures that count, with their limits"),
    "goodput": key(_GOODPUT, "as `flip status --goodput` prints it"),
    "verdict": key(TEXT, "the bottleneck", null=True),
    "inherited": key([_INHERITED], "remote folders with checkpoints that it inherited and never deletes"),
    "anomalies": key([TEXT], "files of recorded steps"),
    "damaged": key([TEXT], "records that cannot be read"),
}  # fmt: skip
_REPORT = {
    "sweep": key(TEXT, "name of the sweep"),
    "run": key(TEXT, "name of the run"),
    "state": key(STATE, "its state"),
    "reason": key(TEXT, "why, for people"),
    "attempts": key(INTEGER, "attempts until now"),
    "samples": key(INTEGER, "samples seen", null=True),
    "steps": key(INTEGER, "optimiser steps", null=True),
    "seconds": key(NUMBER, "seconds of training", null=True),
    "samples_per_second": key(NUMBER, "mean speed", null=True),
    "unsteady": key(ANYTHING, "how its speed varies, if it does"),
    "world": key(INTEGER, "number of ranks", null=True),
    "parameters": key(INTEGER, "parameters of the model", null=True),
    "flops": key(NUMBER, "floating-point operations of training", null=True),
    "loss": key(NUMBER, "last loss", null=True),
    "accuracy": key(NUMBER, "last accuracy within the batch", null=True),
    "next": key(NEXT, "commands about it that usually follow; not of flip.read_runs", optional=True),
    r"^(test|validation)\..+\.(top1|low|high|score)$": Field(NUMBER, "score and 95 % interval, 0 to 1", null=True),
    r"^(test|validation)\..+\.n$": Field(INTEGER, "images of the set", null=True),
    r"^(test|validation)\..+\.(precision|metric)$": Field(TEXT, "arithmetic of the score; its name", null=True),
    r"^(seed|[a-z]+\..+)$": Field(ANYTHING, "a setting in which runs differ", null=True),
}  # fmt: skip
_CLEAN = {
    "folders": key([{
        "path": key(TEXT, "the folder"),
        "kind": key(TEXT, "trash, logs, compiled or code"),
        "sweep": key(TEXT, "its sweep"),
        "bytes": key(INTEGER, "its size"),
        "days": key(NUMBER, "days since the last change"),
        "deleted": key(FLAG, "whether it was deleted"),
    }], "folders that no run needs"),
    "bytes": key(INTEGER, "their size"),
    "left_alone": key({"*": TEXT}, "folder -> why it stays"),
    "next": key(NEXT, "the command that deletes the listed folders; empty after it"),
}  # fmt: skip
_RM = {
    "runs": key([{
        "sweep": key(TEXT, "its sweep"),
        "run": key(TEXT, "its name"),
        "bytes": key(INTEGER, "size of its run directory"),
        "remote_checkpoints": key(INTEGER, "checkpoints in object storage, which are deleted"),
        "remote_bytes": key(INTEGER, "their size"),
        "trash": key(TEXT, "its place in the trash; null if it was not moved", null=True),
    }], "runs that can be moved to the trash"),
    "left_alone": key({"*": TEXT}, "run directory -> why it stays"),
    "next": key(NEXT, "the command that deletes the moved runs for good; empty if none was moved"),
}  # fmt: skip
_SCORE = {
    "run": key(TEXT, "the run; if several were named", optional=True),
    "name": key(TEXT, "name of the evaluation set, with a suffix for the direction or kind of task"),
    "task": key(TEXT, "zeroshot, retrieval, probe or association"),
    "stage": key(TEXT, "stage of the checkpoint; of a published model `foreign`"),
    "samples": key(INTEGER, "samples seen at the checkpoint"),
    "n": key(INTEGER, "images that were scored", optional=True),
    "top1": key(NUMBER, "accuracy, 0 to 1", optional=True),
    "precision": key(TEXT, "arithmetic of the encoders"),
    "next": key(NEXT, "the report of its sweep"),
}  # fmt: skip
_EVALUATION_JOB = {
    "run": key(TEXT, "the run that is scored"),
    "job": key(TEXT, "folder of the job, which `status`, `logs` and `cancel` accept"),
    "next": key(NEXT, "commands about the job"),
}  # fmt: skip
_NEW = {
    "file": key(TEXT, "the sweep file that was written"),
    "next": key(NEXT, "a dry run, and the submission"),
}  # fmt: skip
_DOCTOR = {
    "cluster": key(TEXT, "name of the Slurm cluster"),
    "partition": key(TEXT, "the partition that was checked"),
    "promises": key([{
        "promise": key(TEXT, "what should hold"),
        "verdict": key(TEXT, "whether it holds"),
        "read": key(TEXT, "what the site says"),
        "then": key(TEXT, "what follows if it does not hold"),
    }], "a row per guarantee"),
    "written": key(TEXT, "path of the profile that was written", null=True),
    "next": key(NEXT, "the command that writes a profile, or a dry run on it"),
}  # fmt: skip
_ERROR = {
    "error": Field({
        "what": key(TEXT, "what went wrong"),
        "where": key(TEXT, "the file, the key, or both"),
        "value": key(ANYTHING, "the wrong value, or null"),
        "remedy": key(TEXT, "what to do"),
        "code": key(INTEGER, "the exit code"),
        "message": key(TEXT, "all of it as one sentence"),
    }, required=True),
}  # fmt: skip

DOCUMENTS: dict[str, tuple[str, Any]] = {
    "plan": ("flip submit SWEEP --json; also with --dry-run", _PLAN),
    "status": ("flip status --json", [_STATUS]),
    "goodput": ("flip status --goodput --json", [_GOODPUT]),
    "explain": ("flip explain RUN --json; a list of several runs", _EXPLAIN),
    "report": ("flip report --json, and flip.read_runs", [_REPORT]),
    "evaluate": ("flip evaluate RUN --json", [_SCORE]),
    "detached": ("flip evaluate RUN --detach --json", [_EVALUATION_JOB]),
    "new": ("flip new NAME --json", _NEW),
    "doctor": ("flip doctor --json, without --measure", _DOCTOR),
    "logs": ("flip logs RUN --json: paths", [TEXT]),
    "cancel": ("flip cancel RUN --yes --json: names of the runs that were asked to stop", [TEXT]),
    "rm": ("flip rm RUN --json", _RM),
    "clean": ("flip clean --json", _CLEAN),
    "error": ("the last line of standard error after an error, with --json", _ERROR),
}
"""Name of a document -> the command that prints it, and its table."""


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema of a document. Unknown keys are allowed: later versions may add some."""
    from flip.config import json_schema

    title, table = DOCUMENTS[name]
    return {"$schema": json_schema.DIALECT, "title": title, **json_schema.of_table(table)}
