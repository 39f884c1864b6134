"""The formats of files and messages that outlive a process, with their numbers: one table for writers and readers.

A record states the number of its format, and ``check`` refuses each other number. The other files of a folder belong to
the format of the record that states the number: those of a run to identity.json, those of an evaluation job to
task.json. From version 0.2.0 on a changed meaning gets the next number and a reader for the old form. Standard library,
Python >= 3.6.
"""

from pathlib import Path
from shlex import quote
from typing import Any, Iterable, Mapping, NamedTuple, Tuple

from flip.runs.errors import ConfigError

CONFIG_NUMBER = 1
RUN_NUMBER = 2
EVALUATION_NUMBER = 1
MANIFEST_NUMBER = 2
FILTERED_MANIFEST_NUMBER = 3
PARQUET_MANIFEST_NUMBER = 4
ORDER_NUMBER = 1
#: With weights of samples.
WEIGHTED_ORDER_NUMBER = 2
EXPORT_NUMBER = 1
MEASUREMENT_NUMBER = 1
#: ``check_code`` reads this line in the code of a run.
AGENT_NUMBER = 2

#: For records that no command writes again by itself.
RESTORE = "Restore the file, or move the folder away and make it again with this version."
_RUN_REMEDY = "Use the version that wrote it, or move the run directory away and submit the sweep again."


class FormatError(ConfigError, ValueError):
    """A record has another format than this version reads. Readers that show damaged records catch it as ValueError."""


class Format(NamedTuple):
    """A format and the record that states its number."""

    file: str
    """Name of the record; for messages, what they are."""
    key: str
    """Field with the number."""
    numbers: Tuple[int, ...]
    """The numbers that are written and read, the newest last."""
    holds: str
    """What has this format."""
    remedy: str
    """What to do with a file of another number."""


CONFIG = Format("config.yaml", "schema", (CONFIG_NUMBER,), "the configuration of a run", _RUN_REMEDY)
RUN = Format("identity.json", "schema", (RUN_NUMBER,), "a run directory with all its records", _RUN_REMEDY)
EVALUATION = Format(
    "task.json",
    "schema",
    (EVALUATION_NUMBER,),
    "the directory of an evaluation job with all its records",
    "Use the version that wrote it, or request the evaluation again with `flip evaluate`.",
)
MANIFEST = Format(
    "manifest.json",
    "version",
    (MANIFEST_NUMBER, FILTERED_MANIFEST_NUMBER, PARQUET_MANIFEST_NUMBER),
    "a data set; %d if filters left samples out; %d of parquet files"
    % (FILTERED_MANIFEST_NUMBER, PARQUET_MANIFEST_NUMBER),
    "Make another one: flip shards index SHARDS... --out FOLDER",
)
ORDER = Format(
    "commit.json",
    "order",
    (ORDER_NUMBER, WEIGHTED_ORDER_NUMBER),
    "the order of samples, and the state of training by it; %d with weights" % WEIGHTED_ORDER_NUMBER,
    _RUN_REMEDY,
)
EXPORT = Format(
    "export.json",
    "form",
    (EXPORT_NUMBER,),
    "an exported folder",
    "Use the version that wrote it, or export the run again with `flip export`.",
)
MEASUREMENT = Format(
    "a file of `flip doctor --measure`",
    "version",
    (MEASUREMENT_NUMBER,),
    "a measurement of a machine",
    "Measure again: flip doctor --measure.",
)
AGENT = Format(
    "messages of node agents",
    "protocol",
    (AGENT_NUMBER,),
    "welcome and hello of a connection",
    "Start the agent of the same version.",
)
FORMATS = (CONFIG, RUN, EVALUATION, MANIFEST, ORDER, EXPORT, MEASUREMENT, AGENT)
#: Name of a record -> its format. Each reader of records checks these.
BY_FILE = {form.file: form for form in (RUN, EVALUATION)}


def check(form: Format, record: Any, where: object) -> None:
    """Raise FormatError unless ``record`` states a number of its format. ``where``: its path."""
    number = record.get(form.key) if isinstance(record, dict) else None
    if type(number) is int and number in form.numbers:
        return
    known = " or ".join(str(each) for each in form.numbers)
    raise FormatError("%s: %s" % (form.key, _deviation(form, number, known)), where, number, form.remedy)


def check_code(snapshot: Path) -> None:
    """Raise FormatError unless the code of a run has the messages of node agents that this code has, OSError.

    A run keeps the code of its first submission, while the launcher is of the newest one.
    """
    try:
        text = (snapshot / "flip" / "runs" / "formats.py").read_text(encoding="utf-8")
    except FileNotFoundError:
        text = ""
    if "\nAGENT_NUMBER = %d\n" % AGENT_NUMBER not in text:
        what = "the code of the run has other messages of node agents than this version"
        place = quote(str(snapshot))
        remedy = "To continue the run with the present code: mv %s %s.other, then submit it again." % (place, place)
        raise FormatError(what, snapshot, remedy=remedy)


def require(fields: Iterable[str], record: Mapping[str, Any], where: object, remedy: str) -> None:
    """Raise FormatError unless a record has these fields, which this version always writes."""
    for field in fields:
        if field not in record:
            raise missing(field, where, remedy)


def missing(field: str, where: object, remedy: str) -> FormatError:
    """The error for a record without a field that this version always writes."""
    return FormatError("lacks `%s`: it is a part of a record, or of another version" % field, where, remedy=remedy)


def _deviation(form: Format, number: Any, known: str) -> str:
    """What is wrong with the number of a record, in words."""
    if number is None:
        return "states no format, and this version reads %s" % known
    if type(number) is not int:
        return "is no number of a format, and this version reads %s" % known
    if number > form.numbers[-1]:
        return "a newer version wrote this format, and this version reads %s" % known
    return "an older version wrote this format, and this version reads %s" % known
