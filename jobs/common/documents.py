"""The documents that commands print with ``--json``, as JSON Schemas (``flip schema NAME``; docs/automation.md).

A promise to scripts: a key keeps its name, its type and its meaning. New keys may be added, so a reader ignores unknown
ones. A key that is listed is always there, unless it is ``optional``; null means unknown, or not written yet.
"""

from typing import Any

Node = dict[str, Any]

DIALECT = "http://json-schema.org/draft-07/schema#"
TEXT: Node = {"type": "string"}
INTEGER: Node = {"type": "integer"}
NUMBER: Node = {"type": "number"}
YES_NO: Node = {"type": "boolean"}
VALUE: Node = {}
STATES = ("queued", "running", "waiting", "complete", "failed", "cancelled", "stopped", "unknown")
"""``flip.runs.lifecycle.STATES``, which --help has no time to import; a test compares them."""


def field(node: Node, about: str, null: bool = False) -> Node:
    """The node with its description. ``null``: it may be null."""
    described = {**node, "description": about}
    if not null:
        return described
    if isinstance(node.get("type"), str) and "enum" not in node:
        return {**described, "type": [node["type"], "null"]}
    return {"anyOf": [node, {"type": "null"}], "description": about}


def record(properties: Node, optional: tuple[str, ...] = ()) -> Node:
    """An object with these keys."""
    return {"type": "object", "properties": properties, "required": [key for key in properties if key not in optional]}


def rows(node: Node) -> Node:
    """A list of such values."""
    return {"type": "array", "items": node}


def mapping(node: Node) -> Node:
    """An object whose keys are names."""
    return {"type": "object", "additionalProperties": node}


NEXT = rows(TEXT)
"""Key ``next``: command lines (``jobs.common.next_commands``)."""

_COST = record({
    "samples": field(INTEGER, "samples of training"),
    "steps": field(INTEGER, "optimiser steps"),
    "flops": field(NUMBER, "floating-point operations of training"),
    "gpu_hours": field(NUMBER, "GPU-hours; null if the speed is unknown", null=True),
    "price": field(NUMBER, "by `price_per_gpu_hour` of the profile; null without one", null=True),
})  # fmt: skip
_CHANGE = record({
    "key": field(TEXT, "the setting"),
    "was": field(VALUE, "its earlier value"),
    "now": field(VALUE, "its value now"),
})  # fmt: skip
_INHERITED = record({
    "address": field(TEXT, "of the remote folder"),
    "commits": field(INTEGER, "number of these checkpoints"),
    "bytes": field(INTEGER, "their size"),
    "can_be_taken": field(YES_NO, "whether `submit --take-over` can let the run delete them: they are below its URL"),
})  # fmt: skip
"""A remote folder with checkpoints that a run has inherited."""
_PLANNED_RUN = record({
    "name": field(TEXT, "name of the run in the sweep"),
    "directory": field(TEXT, "its folder below `folder`; of a fork NAME-v2"),
    "action": field(TEXT, "`new`, `changed`, `dropped`, or the state of the existing run"),
    "starts": field(YES_NO, "whether submit starts it"),
    "reason": field(TEXT, "why, for people"),
    "cluster": field(TEXT, "its profile"),
    "extends": field(YES_NO, "whether `--changed extend` lets it continue from the newest commit of the changed run"),
    "copied_from": field(TEXT, "where a copied run directory was submitted; empty: here"),
    "inherited": field(rows(_INHERITED), "remote folders with checkpoints that it inherited and never deletes"),
    "differs": field(mapping(VALUE), "settings in which it differs from others of the sweep"),
    "base": field(rows(_CHANGE), "settings in which it differs from the base of the sweep"),
    "changes": field(rows(_CHANGE), "settings that have changed since it was submitted"),
    "identity": field(TEXT, "hash of everything that changes its results"),
    "notes": field(rows(TEXT), "remarks for people"),
    "warnings": field(rows(TEXT), "warnings for people"),
    "world": field(INTEGER, "number of ranks"),
    "worlds": field(rows(INTEGER), "numbers of ranks that its lanes allow"),
    "data": field(mapping(VALUE), "samples, lanes, loader processes, passes over the data"),
    "stages": field(rows(mapping(VALUE)), "steps, learning rate, memory and cost of each stage"),
    "parameters": field(mapping(INTEGER), "parameters of the model: image, text, total"),
    "wall_hours": field(NUMBER, "hours of training at the assumed speed; null if unknown", null=True),
    "attempts": field(INTEGER, "wall limits that the run needs at that speed", null=True),
    "cost": field(_COST, "its own cost"),
})  # fmt: skip
_OUTCOME = record({
    "started": field(rows(TEXT), "runs that were started"),
    "trashed": field(mapping(VALUE), "run -> where its old folder is"),
    "still_saving": field(rows(TEXT), "runs that could not be moved, because they still save"),
    "cancelled_meanwhile": field(rows(TEXT), "runs that somebody cancelled during the call"),
})  # fmt: skip
_PLAN = record({
    "sweep": field(TEXT, "name of the sweep"),
    "title": field(TEXT, "its title, or empty"),
    "cluster": field(TEXT, "the profile"),
    "folder": field(TEXT, "folder of its runs; the other commands accept it"),
    "files": field(rows(TEXT), "the files that were read"),
    "runs": field(rows(_PLANNED_RUN), "a row per run"),
    "dropped": field(rows(record({
        "name": field(TEXT, "the run"),
        "state": field(TEXT, "its state"),
        "reason": field(TEXT, "why, for people"),
        "prunes": field(YES_NO, "whether `--prune` moves it to the trash"),
    })), "existing runs that the sweep no longer has"),
    "cost": field(_COST, "of the runs that start"),
    "question": field(TEXT, "what `--yes` confirms; empty: nothing"),
    "batches": field(rows(mapping(VALUE)), "Slurm jobs of a dry run"),
    "assumption": field(TEXT, "the speed on which hours are based"),
    "checks": field(rows(record({
        "name": field(TEXT, "what was checked"),
        "detail": field(TEXT, "what was found"),
        "skipped": field(YES_NO, "whether the check could not be made here"),
        "runs": field(rows(TEXT), "runs that it concerns; empty: all"),
    })), "the checks that passed"),
    "outcome": field(_OUTCOME, "what was done; empty lists in a dry run"),
    "next": field(NEXT, "commands that usually follow; empty if it was refused"),
}, optional=("outcome", "next"))  # fmt: skip
_STATUS = record({
    "sweep": field(TEXT, "name of the sweep"),
    "run": field(TEXT, "name of the run"),
    "state": field({"enum": list(STATES)}, "its state"),
    "reason": field(TEXT, "why, for people: do not parse it"),
    "stage": field(TEXT, "current stage", null=True),
    "samples": field(INTEGER, "samples seen", null=True),
    "total": field(INTEGER, "samples of the whole training", null=True),
    "step": field(INTEGER, "optimiser steps until now", null=True),
    "steps": field(INTEGER, "steps of the whole training", null=True),
    "loss": field(NUMBER, "newest loss", null=True),
    "accuracy": field(NUMBER, "newest accuracy within the batch", null=True),
    "phase": field(TEXT, "as the trainer wrote it", null=True),
    "cluster": field(TEXT, "its profile", null=True),
    "samples_per_second": field(NUMBER, "speed while it runs", null=True),
    "eta_seconds": field(NUMBER, "time left at that speed", null=True),
    "unsteady": field(VALUE, "how its speed varies, if it does"),
    "attempts": field(INTEGER, "attempts until now"),
    "restarts": field(INTEGER, "attempts after the first"),
    "restart": field(TEXT, "how the newest attempt started: `in the job` or `requeue`; null: the first", null=True),
    "wall_seconds": field(NUMBER, "seconds of all attempts", null=True),
    "gpu_hours": field(NUMBER, "GPU-hours of all attempts", null=True),
    "progress_time": field(NUMBER, "Unix time of the newest progress", null=True),
    "next": field(NEXT, "commands about it that usually follow"),
})  # fmt: skip
_GOODPUT = record({
    "name": field(TEXT, "the run, or the sum of a sweep"),
    "unit": field(TEXT, "unit of `hours`: core-hours or GPU-hours"),
    "hours": field(mapping(NUMBER), "useful, repeated, starting, saving, other, lost, unknown"),
    "total": field(NUMBER, "their sum"),
    "share": field(mapping(NUMBER), "the same as shares of the total", null=True),
    "waiting_hours": field(NUMBER, "hours in the queue"),
    "attempts": field(INTEGER, "number of attempts"),
    "interruptions": field(INTEGER, "attempts that did not end by themselves"),
    "advice": field(TEXT, "the setting to change", null=True),
    "gain": field(NUMBER, "what that would save", null=True),
    "faults": field(rows(record({
        "attempt": field(INTEGER, "the attempt that ended"),
        "cause": field(TEXT, "the cause of its end", null=True),
        "restart": field(TEXT, "`in the job` or `requeue`"),
        "seconds": field(mapping(VALUE), "detect, decide, start, restore, replay; null if unknown"),
        "total_seconds": field(NUMBER, "their sum", null=True),
        "requeue_seconds": field(NUMBER, "what a requeue would have taken", null=True),
    })), "attempts that were followed by another one"),
})  # fmt: skip
_EVIDENCE = record({
    "attempt": field(INTEGER, "its number"),
    "action": field(TEXT, "what was decided: again, later, stop, done", null=True),
    "expected": field(TEXT, "what the next start would decide, of an end that was not recorded", null=True),
    "cause": field(TEXT, "the cause of the end (docs/restarts.md)", null=True),
    "reason": field(TEXT, "the cause in words", null=True),
    "code": field(INTEGER, "exit code", null=True),
    "state": field(TEXT, "the state of the job at the end, as Slurm names it", null=True),
    "rank": field(INTEGER, "the rank of the root cause", null=True),
    "log": field(TEXT, "the log of the root cause", null=True),
    "lines": field(rows(TEXT), "its last lines"),
}, optional=("state", "rank", "expected"))  # fmt: skip
_NEXT = record({
    "what": field(TEXT, "what follows, for people"),
    "command": field(TEXT, "a command to type", null=True),
    "not_before": field(VALUE, "when a waiting run starts at the earliest"),
    "estimate": field(VALUE, "when Slurm expects to start it"),
    "commands": field(NEXT, "that command, and others that usually follow"),
})  # fmt: skip
_EXPLAIN = record({
    "sweep": field(TEXT, "name of the sweep"),
    "run": field(TEXT, "name of the run"),
    "folder": field(TEXT, "its run directory"),
    "about": field(mapping(VALUE), "size, samples, stages, differing settings, initial weights"),
    "evaluation": field(mapping(VALUE), "of an evaluation job: model, commits, sets, masks", null=True),
    "code": field(mapping(VALUE), "the snapshot of the code"),
    "state": field(_STATUS, "as `status` prints it"),
    "evidence": field(_EVIDENCE, "the newest decision; null before an end", null=True),
    "start": field(VALUE, "a batch script that failed since"),
    "attempts": field(rows(mapping(VALUE)), "a row per attempt"),
    "next": field(_NEXT, "what follows"),
    "incidents": field(rows(mapping(VALUE)), "failures that count, with their limits"),
    "goodput": field(_GOODPUT, "as `flip status --goodput` prints it"),
    "verdict": field(TEXT, "the bottleneck", null=True),
    "inherited": field(rows(_INHERITED), "remote folders with checkpoints that it inherited and never deletes"),
    "anomalies": field(rows(TEXT), "files of recorded steps"),
    "damaged": field(rows(TEXT), "records that cannot be read"),
})  # fmt: skip
_REPORT = record({
    "sweep": field(TEXT, "name of the sweep"),
    "run": field(TEXT, "name of the run"),
    "state": field({"enum": list(STATES)}, "its state"),
    "reason": field(TEXT, "why, for people"),
    "attempts": field(INTEGER, "attempts until now"),
    "samples": field(INTEGER, "samples seen", null=True),
    "steps": field(INTEGER, "optimiser steps", null=True),
    "seconds": field(NUMBER, "seconds of training", null=True),
    "samples_per_second": field(NUMBER, "mean speed", null=True),
    "unsteady": field(VALUE, "how its speed varies, if it does"),
    "world": field(INTEGER, "number of ranks", null=True),
    "parameters": field(INTEGER, "parameters of the model", null=True),
    "flops": field(NUMBER, "floating-point operations of training", null=True),
    "loss": field(NUMBER, "last loss", null=True),
    "accuracy": field(NUMBER, "last accuracy within the batch", null=True),
    "next": field(NEXT, "commands about it that usually follow; not of flip.read_runs"),
}, optional=("next",))  # fmt: skip
_REPORT["patternProperties"] = {
    r"^(test|validation)\..+\.(top1|low|high|score)$": field(NUMBER, "score and 95 % interval, 0 to 1", null=True),
    r"^(test|validation)\..+\.n$": field(INTEGER, "images of the set", null=True),
    r"^(test|validation)\..+\.(precision|metric)$": field(TEXT, "arithmetic of the score; its name", null=True),
    r"^(seed|[a-z]+\..+)$": field(VALUE, "a setting in which runs differ"),
}
_CLEAN = record({
    "folders": field(rows(record({
        "path": field(TEXT, "the folder"),
        "kind": field(TEXT, "trash, logs, compiled or code"),
        "sweep": field(TEXT, "its sweep"),
        "bytes": field(INTEGER, "its size"),
        "days": field(NUMBER, "days since the last change"),
        "deleted": field(YES_NO, "whether it was deleted"),
    })), "folders that no run needs"),
    "bytes": field(INTEGER, "their size"),
    "left_alone": field(mapping(TEXT), "folder -> why it stays"),
    "next": field(NEXT, "the command that deletes the listed folders; empty after it"),
})  # fmt: skip
_SCORE = record({
    "run": field(TEXT, "the run; if several were named"),
    "name": field(TEXT, "name of the evaluation set, with a suffix for the direction or kind of task"),
    "task": field(TEXT, "zeroshot, retrieval, probe or association"),
    "stage": field(TEXT, "stage of the checkpoint; of a published model `foreign`"),
    "samples": field(INTEGER, "samples seen at the checkpoint"),
    "n": field(INTEGER, "images that were scored"),
    "top1": field(NUMBER, "accuracy, 0 to 1"),
    "precision": field(TEXT, "arithmetic of the encoders"),
    "next": field(NEXT, "the report of its sweep"),
}, optional=("run", "n", "top1"))  # fmt: skip
_EVALUATION_JOB = record({
    "run": field(TEXT, "the run that is scored"),
    "job": field(TEXT, "folder of the job, which `status`, `logs` and `cancel` accept"),
    "next": field(NEXT, "commands about the job"),
})  # fmt: skip
_NEW = record({
    "file": field(TEXT, "the sweep file that was written"),
    "next": field(NEXT, "a dry run, and the submission"),
})  # fmt: skip
_DOCTOR = record({
    "cluster": field(TEXT, "name of the Slurm cluster"),
    "partition": field(TEXT, "the partition that was checked"),
    "promises": field(rows(record({
        "promise": field(TEXT, "what should hold"),
        "verdict": field(TEXT, "whether it holds"),
        "read": field(TEXT, "what the site says"),
        "then": field(TEXT, "what follows if it does not hold"),
    })), "a row per guarantee"),
    "written": field(TEXT, "path of the profile that was written", null=True),
    "next": field(NEXT, "the command that writes a profile, or a dry run on it"),
})  # fmt: skip
_ERROR = record({
    "error": record({
        "what": field(TEXT, "what went wrong"),
        "where": field(TEXT, "the file, the key, or both"),
        "value": field(VALUE, "the wrong value, or null"),
        "remedy": field(TEXT, "what to do"),
        "code": field(INTEGER, "the exit code"),
        "message": field(TEXT, "all of it as one sentence"),
    })
})  # fmt: skip

DOCUMENTS: dict[str, tuple[str, Node]] = {
    "plan": ("flip submit SWEEP --json; also with --dry-run", _PLAN),
    "status": ("flip status --json", rows(_STATUS)),
    "goodput": ("flip status --goodput --json", rows(_GOODPUT)),
    "explain": ("flip explain RUN --json; a list of several runs", _EXPLAIN),
    "report": ("flip report --json, and flip.read_runs", rows(_REPORT)),
    "evaluate": ("flip evaluate RUN --json", rows(_SCORE)),
    "detached": ("flip evaluate RUN --detach --json", rows(_EVALUATION_JOB)),
    "new": ("flip new NAME --json", _NEW),
    "doctor": ("flip doctor --json, without --measure", _DOCTOR),
    "logs": ("flip logs RUN --json: paths", rows(TEXT)),
    "cancel": ("flip cancel RUN --yes --json: names of the runs that were asked to stop", rows(TEXT)),
    "clean": ("flip clean --json", _CLEAN),
    "error": ("the last line of standard error after an error, with --json", _ERROR),
}
"""Name of a schema -> the command that prints such a document, and its schema."""


def schema_of(name: str) -> Node:
    """The JSON Schema of a document. Unknown keys are allowed: later versions may add some."""
    title, node = DOCUMENTS[name]
    return {"$schema": DIALECT, "title": title, **node}
