"""The result of measuring a machine: its file, which `flip doctor --measure` writes, and what readers ask of it.

A measurement is a list of rows. Each row has a status of its own, so that a failed row leaves the others. A cluster
profile names the file (``measured``), and plans use each number that is there. The file names no user, path or host.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flip import environment
from flip.files.creation import read_regular
from flip.runs import formats
from flip.runs.errors import ConfigError
from flip.runs.formats import MEASUREMENT_NUMBER

FORMAT = "flip-measurement"
MEASURED = "measured"
FAILED = "failed"
TIME_LIMIT = "time limit"
OUT_OF_MEMORY = "out of memory"
SKIPPED = "skipped"
STATUSES = (MEASURED, FAILED, TIME_LIMIT, OUT_OF_MEMORY, SKIPPED)
BUSY_CORES = 0.25
"""Cores that other processes may use during a measurement before its numbers are doubted."""
LIMIT = 16_000_000
"""Largest file that is read, bytes."""
REMEDY = "Measure the machine again: flip doctor --measure --out FOLDER"


@dataclass(frozen=True)
class MeasuredRow:
    """One row: what was measured, and the numbers. ``detail``: why there are none. ``seconds``: that it took."""

    name: str
    what: str
    status: str
    values: Mapping[str, Any] = field(default_factory=dict)
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What was measured. ``driver``, ``gpu``: empty without GPUs. ``gpus``, ``cores``, ``memory_gb``: of a node."""

    processor: str = ""
    cores: int = 0
    memory_gb: float = 0.0
    gpu: str = ""
    gpus: int = 0
    driver: str = ""
    platform: str = ""


def node_name(names: Sequence[str], number: int) -> str:
    """The host name of a node of a measurement, counted from 0, or ``node 1``. ``names``: as ``Measurement.names``."""
    if number < len(names):
        return names[number]
    return f"node {number}"


@dataclass(frozen=True)
class Measurement:
    """A measured machine. ``names``: of its nodes, only if the user asked for them. ``load``: cores that
    other processes used meanwhile.
    """

    date: str
    nodes: int
    machine: Machine
    packages: Mapping[str, str]
    rows: Sequence[MeasuredRow]
    names: Sequence[str] = ()
    python: str = ""
    load: float = 0.0
    minutes: float = 0.0
    rehearsal: bool = False
    """Whether its GPU only pretends: no number means anything, and plans refuse it."""

    @property
    def origin(self) -> str:
        """Where a number comes from, in words."""
        return f"measured {self.date} on {self.nodes} node{'s' if self.nodes != 1 else ''}"

    def row(self, name: str) -> MeasuredRow | None:
        """The row of this name if it was measured."""
        return next((row for row in self.rows if row.name == name and row.status == MEASURED), None)

    def kind(self, name: str) -> list[MeasuredRow]:
        """The measured rows whose names begin with this word."""
        return [row for row in self.rows if row.status == MEASURED and row.name.split("_")[0] == name]

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": MEASUREMENT_NUMBER, **asdict(self)}

    def outdated(self) -> list[str]:
        """Versions that have changed since, on the machine that reads it: "torch 2.12.0 -> 2.13.0".

        Packages that are missing on one side are left out: a submit host may lack those of the nodes. So are builds of
        the same release, such as 2.13.0+cpu.
        """
        now = environment.environment()
        before = {"python": self.python, "packages": _releases(self.packages)}
        changes = environment.changes(before, {"python": now["python"], "packages": _releases(now["packages"])})
        changes = [change for change in changes if " none -> " not in change and not change.endswith(" -> none")]
        here = driver()
        if here and self.machine.driver and here != self.machine.driver:
            changes.append(f"driver {self.machine.driver} -> {here}")
        return changes


def driver(version: str = "/proc/driver/nvidia/version") -> str:
    """The version of this machine's NVIDIA driver; empty: there is none."""
    try:
        words = Path(version).read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "")


def read_measurement(path: str) -> Measurement:
    """Read a file of `flip doctor --measure`. Raises ConfigError if it is missing, damaged, or of a newer version."""
    try:
        content = json.loads(read_regular(path, LIMIT))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError("no measurement can be read", path, reason, REMEDY) from error
    return parsed(content, path)


def parsed(content: Any, where: str) -> Measurement:
    """The measurement in the content of a file. Raises ConfigError if it has another form."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError("not a measurement of a machine", where, "format", REMEDY)
    formats.check(formats.MEASUREMENT, content, where)
    try:
        rows = [_row(row) for row in content["rows"]]
        machine = Machine(**content["machine"])
        names = [str(name) for name in content.get("names", ())]
        packages = {str(name): str(version) for name, version in content["packages"].items()}
        return Measurement(
            date=str(content["date"]),
            nodes=int(content["nodes"]),
            machine=machine,
            packages=packages,
            rows=rows,
            names=names,
            python=str(content.get("python", "")),
            load=float(content.get("load", 0.0)),
            minutes=float(content.get("minutes", 0.0)),
            rehearsal=content.get("rehearsal", False) is True,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError("damaged measurement", where, repr(error), REMEDY) from error


def number(row: MeasuredRow | None, key: str) -> float | None:
    """A number of a row, above 0 and finite; None without it."""
    if row is None:
        return None
    value = row.values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if math.isfinite(value) and value > 0:
        return float(value)
    return None


def _releases(packages: Mapping[str, str]) -> dict[str, str]:
    return {name: version.partition("+")[0] for name, version in packages.items()}


def _row(record: Mapping[str, Any]) -> MeasuredRow:
    status = record["status"]
    if status not in STATUSES:
        raise ValueError(f"status {status!r}")
    values = record.get("values", {})
    if not isinstance(values, dict):
        raise TypeError(f"values of {record['name']}")
    seconds = float(record.get("seconds", 0.0))
    return MeasuredRow(str(record["name"]), str(record["what"]), status, values, str(record.get("detail", "")), seconds)
