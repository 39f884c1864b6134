"""Types and limits of the fields of all records of a run (docs/contracts.md).

``flip.runs.rundir.read_record`` applies these tables: code that uses a record gets values of the declared types, or a
ValueError with the file and the field. A null field counts as absent. Undeclared fields are kept as they are; no code
may rely on their types. Standard library, Python >= 3.6.

Such tables describe all JSON that programs write: also the documents of ``--json`` (``jobs.common.documents``), of
which ``flip.config.json_schema`` makes JSON Schemas. Settings that users write are described by dataclasses
(``flip.common.option``): there an unknown key is an error. The keys of a sweep file are a table
(``jobs.sweeps.sweep_file``), because entries and axes are read by code of their own.
"""

import json
import math
import re
from typing import Any, Callable, Dict, Mapping, Optional, Tuple

from flip.files.creation import RECORD_LIMIT
from flip.runs.credentials import scrub

#: Limit of counts and sizes. FLOPs are floats, with a limit of 1e30.
LARGEST = 10**18
#: Characters after which a text is cut, such as the error of a compiler.
LONGEST = 4000
#: Fields that quote errors of libraries and services: they are written without credentials.
MESSAGES = ("callbacks", "reason", "remedy", "storage", "trace", "verdict", "what", "why")
#: Characters of a message that are written: a compiler's error of megabytes would make its record unreadable.
MESSAGE_LIMIT = 100_000
#: Levels of nesting. Printing a record as JSON takes several calls per level.
DEEPEST = 64
#: Digits of a whole number. 64 bits need fewer; Python takes quadratic time to parse long numbers.
DIGITS = 40


class MissingField(ValueError):
    """A record lacks a required field: it is a part of a record, or another version wrote it."""

    def __init__(self, field: str) -> None:
        super().__init__("lacks `%s`" % field)
        self.field = field


class FieldType:
    """A type with limits. ``description`` completes "is not ...", ``schema`` is its JSON Schema, if one is printed."""

    def __init__(
        self,
        description: str,
        fits: Callable[[Any], bool],
        convert: Optional[Callable[[Any], Any]] = None,
        schema: Optional[Dict[str, Any]] = None,
    ) -> None:
        self.description = description
        self.fits = fits
        self.convert = convert
        self.schema = schema or {}  # type: Dict[str, Any]

    def needed(self) -> "Field":
        return Field(self, required=True)


class Field:
    """A field of a table about which more is declared than its type.

    ``kind``: its type, as in ``checked``. ``meaning``: for pages and schemas. ``required``: a mapping without it is
    invalid. ``null``: it may be null, which else counts as absent.
    """

    def __init__(self, kind: Any, meaning: str = "", required: bool = False, null: bool = False) -> None:
        self.kind = kind
        self.meaning = meaning
        self.required = required
        self.null = null


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 <= value <= 1e30  # NaN is in no interval


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 255 and value not in (".", "..") and not set(value) & set("/\0")


def printable(text: Any) -> Any:
    """Cut a text to LONGEST characters, and replace lone surrogates, which UTF-8 cannot encode, by ``?``."""
    if not isinstance(text, str):
        return text
    if len(text) <= LONGEST:
        text = text
    else:
        text = text[:LONGEST] + "..."
    return text.encode("utf-8", "replace").decode("utf-8")


ANYTHING = FieldType("anything", lambda v: True)
NUMBER = FieldType("a number within limits", _is_number, schema={"type": "number"})
COUNT = FieldType("a whole number from 0 to 10^18", lambda v: type(v) is int and 0 <= v <= LARGEST)
CODE = FieldType("an exit code", lambda v: type(v) is int and abs(v) < 1 << 31)
TIME = FieldType("a time in seconds", lambda v: type(v) in (int, float) and 0 <= v < 1e11)  # a date that calendars have
FLAG = FieldType("true or false", lambda v: type(v) is bool, schema={"type": "boolean"})
#: Text for people.
TEXT = FieldType("text", lambda v: isinstance(v, str), printable, schema={"type": "string"})
#: Text for programs, never changed: environment, command arguments, addresses, hashes.
EXACT = FieldType("text", lambda v: isinstance(v, str), schema={"type": "string"})
NAME = FieldType("a name", _is_name, printable)
PATH = FieldType("a path", lambda v: isinstance(v, str) and len(v) < 4096 and "\0" not in v)
#: Used in path patterns.
RUN = FieldType(
    "SWEEP/RUN", lambda v: isinstance(v, str) and bool(re.match(r"(\w[\w.-]{0,200}/\w[\w.-]{0,200})?\Z", v))
)
MAPPING = FieldType("a mapping", lambda v: isinstance(v, dict), schema={"type": "object"})
PID = FieldType("the id of a process", lambda v: type(v) is int and 0 < v < 1 << 31)
PAIR = FieldType("two numbers", lambda v: isinstance(v, list) and len(v) == 2 and all(map(_is_number, v)))
#: Digest of a snapshot; any other value counts as none.
DIGEST = FieldType("a digest", lambda v: True, lambda v: v if isinstance(v, str) and len(v) <= 64 else "")
#: Settings: seeds have 64 bits, -1 means automatic, and YAML may read a text as a number.
INTEGER = FieldType("a whole number", lambda v: type(v) is int and abs(v) < 1 << 64, schema={"type": "integer"})
SETTING = FieldType(
    "text or a number", lambda v: isinstance(v, (str, bool)) or _is_number(v) or INTEGER.fits(v), printable
)
LIST = FieldType("a list", lambda v: isinstance(v, list), schema={"type": "array"})
ANY_SETTING = FieldType("text, a number or a list", lambda v: LIST.fits(v) or SETTING.fits(v), printable)
#: Text in Slurm's environment.
DIGITS_OR_COUNT = FieldType(
    COUNT.description, lambda v: COUNT.fits(v) or isinstance(v, str) and v.isdigit() and len(v) < 18, lambda v: int(v)
)

#: One result of an evaluation.
SCORE: Dict[str, Any] = {
    "name": NAME.needed(), "top1": NUMBER.needed(), "top5": NUMBER, "top10": NUMBER, "n": COUNT, "images": COUNT,
    "interval": PAIR, "chance": NUMBER, "loss": NUMBER, "role": TEXT, "task": TEXT.needed(), "set": TEXT,
    "precision": TEXT.needed(),
    "stage": TEXT, "samples": COUNT, "seconds": NUMBER, "note": TEXT, "job": TEXT, "time": TIME, "metric": TEXT,
    "score": NUMBER,
}  # fmt: skip
#: The scores of the training at one position, eval/<stage>-<S>.json, or of a job, eval/<stage>-<S>/<job>.json.
SCORE_FILE: Dict[str, Any] = {
    "stage": TEXT.needed(), "samples": COUNT.needed(), "job": TEXT, "seconds": NUMBER, "attempt": COUNT,
    "evaluations": [SCORE],
}  # fmt: skip
#: pins/<id>.json.
PIN = {"by": PATH.needed(), "stage": TEXT.needed(), "samples": COUNT.needed(), "time": TIME}
#: A line of metrics/<n>.jsonl.
LINE: Dict[str, Any] = {
    "step": COUNT.needed(), "samples": COUNT.needed(), "stage": TEXT, "loss": NUMBER, "accuracy": NUMBER, "time": TIME,
    "seconds": NUMBER, "samples_per_second": NUMBER, "data_wait": NUMBER, "saving": NUMBER, "cpu_seconds": NUMBER,
    "verdict": TEXT,
}  # fmt: skip
#: A row of the paper in sweep.json; its undeclared fields are scores by evaluation set.
PUBLISHED: Dict[str, Any] = {
    "row": TEXT, "title": TEXT, "run": RUN, "not_yet": TEXT, "within": NUMBER, "time": NUMBER, "needs": MAPPING,
    "near": {"*": NUMBER}, "images": {"*": COUNT}, "*": NUMBER,
}  # fmt: skip

#: An earlier data set of a run and the S at which it ended, in identity.json.
EARLIER_DATA = {"samples": COUNT.needed(), "hash": EXACT, "changes": [{"key": TEXT.needed()}]}

#: File name -> its fields. A list holds the declaration of its members; ``*`` declares all other fields, a name that
#: starts with ``^`` those that the regular expression matches.
FIELDS: Dict[str, Any] = {
    "identity.json": {
        "hash": EXACT, "schema": COUNT, "code": DIGEST, "uid": CODE, "config": MAPPING, "classes": {"*": TEXT},
        "user_files": {"*": EXACT},
        "before": [EARLIER_DATA],
    },
    "status.json": {
        "attempt": COUNT, "samples": COUNT, "total": COUNT, "step": COUNT, "steps": COUNT, "loss": NUMBER,
        "accuracy": NUMBER, "samples_per_second": NUMBER, "eta_seconds": NUMBER, "stage": TEXT, "phase": TEXT,
        "storage": TEXT, "callbacks": TEXT, "verdict": TEXT, "reason": TEXT, "time": TIME, "unsteady": FLAG,
    },
    "result.json": {
        "stage": TEXT, "samples": COUNT, "steps": COUNT, "seconds": NUMBER, "samples_per_second": NUMBER,
        "world": COUNT, "parameters": {"*": NUMBER}, "flops": NUMBER, "evaluations": [SCORE], "time": TIME,
    },
    "cancel.json": {"who": TEXT, "why": TEXT, "reason": TEXT, "time": TIME},
    "job.json": {
        "kind": NAME, "job_kind": NAME, "cluster": NAME, "site": NAME, "uid": CODE, "name": NAME, "token": NAME,
        "index": COUNT,
        "folder": PATH, "copy_of": PATH, "order": COUNT, "python": PATH, "module": EXACT, "snapshot": PATH,
        "hooks": PATH, "world": COUNT, "usable": [COUNT],
        "shape": {
            "nodes": COUNT, "processes": COUNT, "gpus": COUNT, "hours": NUMBER, "least_nodes": COUNT, "spares": COUNT,
        },
        "env": {"*": EXACT},
        "canary": {"steps": COUNT, "releases": [NAME]}, "waits_for": NAME, "trackers": [NAME], "notify": [EXACT],
        "exposed": [EXACT],
        "exclude": EXACT, "signal_seconds": NUMBER, "command": [EXACT], "command_folder": PATH,
        "after": COUNT, "time": TIME,
    },
    "start.json": {
        "attempt": COUNT, "host": TEXT, "nodes": TEXT, "job": TEXT, "restarts": DIGITS_OR_COUNT,
        "world": DIGITS_OR_COUNT, "resumes_from": COUNT,
        "first_commit": FLAG, "warm": FLAG, "after": COUNT, "samples": COUNT, "time": TIME,
    },
    "ready.json": {
        "samples": COUNT, "restoring": NUMBER, "accumulate": COUNT, "time": TIME,
        "environment": {
            "python": TEXT, "platform": TEXT, "processor": TEXT, "gpu": TEXT, "kernel": TEXT,
            "packages": {"*": TEXT},
        },
    },
    "wall.json": {"limit": COUNT},
    "end.json": {
        "attempt": COUNT, "action": TEXT, "cause": TEXT, "reason": TEXT, "delay": TIME, "exclude": [EXACT],
        "code": CODE, "state": TEXT, "commits": COUNT, "committed": FLAG, "noticed": TIME, "observed": FLAG,
        "time": TIME, "remedy": TEXT,
    },
    "cause.json": {
        "cause": TEXT.needed(), "code": CODE, "reason": TEXT, "by": TEXT, "host": TEXT, "signal": TEXT, "time": TIME,
        "out_of_memory": FLAG,
    },
    "coordinator.json": {"host": EXACT.needed(), "port": COUNT.needed(), "key": EXACT.needed()},
    "pids.json": [{"rank": COUNT, "pid": PID.needed(), "start": TEXT.needed()}],
    "commit.json": {
        "stage": NAME, "samples": COUNT, "attempt": COUNT, "saving": NUMBER, "url": EXACT, "writer": EXACT,
        "files": MAPPING, "kind": NAME, "path": PATH, "bytes": COUNT, "content": EXACT,
    },
    "command.json": {
        "argv": [EXACT], "parameters": {"*": SETTING}, "code": NAME, "world": COUNT, "env": {"*": EXACT},
        "resources": {"*": SETTING},
        "resume": {
            "folder": EXACT, "pattern": EXACT, "number": EXACT, "unit": COUNT, "arguments": [EXACT], "done": EXACT,
            "renames": FLAG,
        },
        "metrics": {
            "file": EXACT, "pattern": EXACT, "tensorboard": EXACT, "names": {"*": EXACT}, "batch": COUNT,
            "per_epoch": COUNT, "total": COUNT,
        },
        "stop": {"signal": NAME, "hang_minutes": NUMBER}, "monitor": {"*": EXACT},
        "evaluate": {"command": [EXACT], "pattern": EXACT},
    },
    "trained.json": {
        "samples": COUNT, "steps": COUNT, "seconds": NUMBER, "samples_per_second": NUMBER, "checkpoint": PATH,
        "attempt": COUNT,
    },
    "resume.json": {"path": PATH, "samples": COUNT},
    "url.json": {"url": EXACT.needed(), "folder": PATH.needed(), "taken": [EXACT]},
    "owner.json": {"folder": PATH.needed(), "id": EXACT.needed()},
    "remote.json": {"id": EXACT.needed()},
    "sweep.json": {
        "name": TEXT, "title": TEXT, "notes": TEXT, "file": PATH, "runs": [NAME], "paper": {"*": PUBLISHED},
        "rows": [PUBLISHED], "baselines": {"*": {"*": NUMBER}}, "varied": [TEXT],
    },
    "settings.json": {"parallel": COUNT, "peer_grace": NUMBER, "stop_grace": NUMBER},
}  # fmt: skip


#: Fields of job.json without which no attempt starts.
NEEDED_TO_START = ("exposed", "folder", "kind", "shape", "snapshot", "usable")
#: File name -> (limit of its bytes, why more than RECORD_LIMIT). A larger record is damaged: it is named and not read.
LIMITS: Dict[str, Tuple[int, str]] = {
    "commit.json": (16 << 20, "200 bytes for each file; each of thousands of ranks writes several"),
    "identity.json": (8 << 20, "every setting of a configuration of up to 1 MiB of YAML, again at each change of data"),
    "export.json": (8 << 20, "a configuration, as identity.json"),
    "job.json": (4 << 20, "the environment of the job, and for a canary the names of the runs that wait for it"),
    "sweep.json": (4 << 20, "the names of up to 10,000 runs, and the published rows"),
    "result.json": (8 << 20, "of an evaluation job 1 KB for each data set, view and checkpoint"),
    "command.json": (4 << 20, "the words and parameters of a program"),
    "task.json": (4 << 20, "the checkpoints and data sets of an evaluation"),
}  # fmt: skip
#: The largest file of scores that is read, bytes: 1 KB for each data set and view.
SCORE_FILE_LIMIT = 8 << 20
#: The largest manifest.json, bytes: each shard that could not be indexed, and the counts of up to 65,536 labels.
MANIFEST_LIMIT = 64 << 20
#: Commas and brackets of a record. Parsed values take up to 50 times the bytes of their text.
MAX_PARTS = 500_000


def limit_of(name: str) -> int:
    """The largest record of this file name that is read, bytes."""
    if name in LIMITS:
        return LIMITS[name][0]
    return RECORD_LIMIT


def checked(value: Any, kind: Any, where: str = "") -> Any:
    """A copy of ``value`` with the declared types, without null fields, and with long texts cut.

    ``kind``: a FieldType; a mapping of fields; a list with one member, the type of all members; or a Field of such a
    kind. Raises ValueError with the field, the expected type and the value; MissingField if a required field is absent.
    """
    if isinstance(kind, Field):
        kind = kind.kind
    if isinstance(kind, FieldType):
        if not kind.fits(value):
            raise ValueError("`%s` is not %s (found: %s)" % (where, kind.description, _short(value)))
        if kind.convert:
            return kind.convert(value)
        return value
    if isinstance(kind, list):
        if not isinstance(value, list):
            raise ValueError("`%s` is not a list (found: %s)" % (where, _short(value)) if where else "holds no list")
        return [checked(item, kind[0], "%s.%d" % (where, i)) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        raise ValueError("`%s` is not a mapping (found: %s)" % (where, _short(value)) if where else "holds no mapping")
    result = {}
    patterns = [name for name in kind if name[0] == "^"]
    for name, item in value.items():
        declared = kind.get(name, kind.get("*"))
        for pattern in patterns:
            if name not in kind and re.match(pattern, name):
                declared = kind[pattern]
        if declared is None:
            result[name] = item
        elif item is not None:
            result[printable(name)] = checked(item, declared, "%s.%s" % (where, name) if where else name)
        elif isinstance(declared, Field) and declared.null:
            result[name] = None
    for name, declared in kind.items():
        if isinstance(declared, Field) and declared.required and name not in result:
            raise MissingField(where + "." + name if where else name)
    return result


def is_observed(end: Mapping[str, Any]) -> bool:
    """Whether ``time`` of an end.json is that of the end, and not of a later record; False for an empty one."""
    return bool(end.get("observed", False))


def without_credentials(record: Dict[str, Any]) -> Dict[str, Any]:
    """A copy of a record without credentials in its messages, each cut to its first and last MESSAGE_LIMIT / 2."""
    messages = {name: _shorten(scrub(record[name])) for name in MESSAGES if isinstance(record.get(name), str)}
    return dict(record, **messages)


def _shorten(message: str) -> str:
    half = MESSAGE_LIMIT // 2
    if len(message) <= 2 * half:
        return message
    return message[:half] + "\n...\n" + message[-half:]


def _short(value: Any) -> str:
    text = repr(value)
    if len(text) <= 60:
        return text
    return text[:60] + "..."


def parse(data: bytes) -> Any:
    """Parse JSON.

    Raises ValueError if it is invalid, not finite, too deep (DEEPEST), or has too many DIGITS or parts (MAX_PARTS).
    """
    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_PARTS:
        raise ValueError("more than {:,} values".format(MAX_PARTS))
    try:
        value = json.loads(
            data.decode("utf-8"), parse_int=_limited_int, parse_float=_finite_float, parse_constant=_finite_float
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if data.count(b"[") + data.count(b"{") > DEEPEST:
        check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise ValueError for a value with more than DEEPEST levels."""
    level = [value]
    for _ in range(DEEPEST):
        inner = [item for item in level if isinstance(item, (list, dict))]
        groups = [group.values() if isinstance(group, dict) else group for group in inner]
        level = [item for group in groups for item in group]
        if not level:
            return
    raise ValueError("nested too deeply")


def _limited_int(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError("a number of %d digits" % len(text))
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("%s is not a finite number" % text[:20])
    return value
