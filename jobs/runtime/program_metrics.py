"""Reads the numbers of a program, and writes them as metric lines and status of its run: rank 0."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from flip.files.creation import open_append, run_folder
from flip.runs.command_record import STAGE
from flip.runs.metric_lines import metric_files
from flip.runs.rundir import RunDir, write_json

log = logging.getLogger(__name__)

NUMBERS = ("loss", "accuracy", "samples_per_second")
"""Metrics that a line has besides its position."""
POSITIONS = ("samples", "step", "epoch")
IN_EPOCH = "in_epoch"
"""What a program that counts within epochs says beside ``epoch``, its finished epochs."""
STATUS_SECONDS = 2.0
LARGEST = 10**18
LONGEST_LINE = 1 << 20

Entry = Mapping[str, Any]
"""Names of the program -> its numbers."""


class NumberSource(Protocol):
    """Where the numbers of a program are."""

    def read(self) -> Iterator[Entry]:
        """The entries since the last call."""


class JsonLines:
    """A file to which the program appends lines of JSON. What it has before the attempt is passed over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rest = b""
        self._position = 0
        try:
            self._position = os.stat(path).st_size
        except OSError:
            self._position = 0

    def read(self) -> Iterator[Entry]:
        try:
            if os.stat(self._path).st_size < self._position:  # the program has started it anew
                self._position = 0
                self._rest = b""
            with open(self._path, "rb") as file:
                file.seek(self._position)
                data = file.read(LONGEST_LINE)
        except OSError:
            return
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-LONGEST_LINE:]
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):  # a line that a killed attempt has cut off, or no JSON
                continue
            if isinstance(entry, dict):
                yield entry


class Pattern:
    """Lines of output that a regular expression matches."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)
        self._lock = threading.Lock()
        self._entries: list[dict[str, str]] = []
        self.lines = 0
        self.matched = 0

    def on_line(self, line: str) -> None:
        """Called on the thread that reads the output."""
        match = self._pattern.search(line)
        with self._lock:
            self.lines += 1
            if match is not None:
                self.matched += 1
                self._entries.append({name: text for name, text in match.groupdict().items() if text is not None})

    def read(self) -> Iterator[Entry]:
        with self._lock:
            entries = self._entries
            self._entries = []
        yield from entries


class EventFiles:
    """Event files of TensorBoard: one entry per step, of the scalars that were written for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._old = set(self._paths())
        self._loaders: dict[Path, Any] = {}
        self._open: dict[str, Any] = {}

    def _paths(self) -> list[Path]:
        return sorted(self._folder.rglob("*tfevents*"))

    def read(self) -> Iterator[Entry]:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        for path in self._paths():
            if path in self._old:  # of an earlier attempt
                continue
            if path not in self._loaders:
                self._loaders[path] = LegacyEventFileLoader(str(path))
            for event in self._loaders[path].Load():
                for value in event.summary.value:
                    number = _scalar(value)
                    if number is None:
                        continue
                    if self._open and event.step != self._open["step"]:
                        yield self._open
                        self._open = {}
                    self._open = {**self._open, "step": event.step, value.tag: number}

    def rest(self) -> Iterator[Entry]:
        """The last entry, which no later step closes."""
        if self._open:
            yield self._open
            self._open = {}


def _scalar(value: Any) -> float | None:
    kind = value.WhichOneof("value")
    if kind == "simple_value":
        return float(value.simple_value)
    if kind == "tensor" and not value.tensor.tensor_shape.dim:
        if value.tensor.float_val:
            return float(value.tensor.float_val[0])
        if len(value.tensor.tensor_content) == 4:
            import struct

            return float(struct.unpack("<f", value.tensor.tensor_content)[0])
    return None


class ProgramMetrics:
    """Writes what ``source`` says of attempt n, which continues at S = ``start``.

    ``settings``: of command.json. ``follows``: whether the user has named the source.
    """

    def __init__(self, run: RunDir, n: int, source: NumberSource, settings: Mapping[str, Any], start: int) -> None:
        self.source = source
        self.total = int(settings.get("total") or 0)
        self.position: int | None = None
        """The newest S of this attempt."""
        self.line_at = time.monotonic()
        self._run = run
        self._n = n
        self._names = dict(settings.get("names") or {})
        self._batch = int(settings.get("batch") or 1)
        self._per_epoch = int(settings.get("per_epoch") or 0)
        self._start = start
        self._started = time.time()
        self._before = _seconds_at(run, start)
        """Seconds of training up to the start, in earlier attempts."""
        self._last: tuple[int, float] | None = None
        """(S, time) of the newest line."""
        self._is_ready = False
        self._first: tuple[int, float] | None = None
        self._lines = open_append(run_folder(run.metrics) / f"{n}.jsonl", "utf-8")
        self._status: dict[str, Any] = {"attempt": n, "samples": start, "phase": "starting", "reason": ""}
        if self.total:
            self._status["total"] = self.total
        self._written = float("-inf")
        self.status()

    @property
    def seconds(self) -> float:
        """Of training, over all attempts."""
        if self._last is None:
            return self._before
        return self._before + max(0.0, self._last[1] - self._started)

    @property
    def last_step(self) -> int | None:
        return self._status.get("step")

    def read(self) -> None:
        """Write what the program has said since the last call."""
        for entry in self.source.read():
            self._add(entry)

    def finish(self) -> None:
        """Read what is left after the end of the program."""
        self.read()
        if isinstance(self.source, EventFiles):
            for entry in self.source.rest():
                self._add(entry)

    def why_none(self) -> str:
        """That a pattern matched nothing, in words; else empty."""
        if isinstance(self.source, Pattern) and self.source.lines and not self.source.matched:
            return f"metrics.pattern matches none of the {self.source.lines} lines that rank 0 printed"
        return ""

    def _add(self, entry: Entry) -> None:
        position = self._position_of(entry)
        if position is None:
            return
        now = time.time()
        step = self._number(entry, "step")
        if step is None:
            step = position // self._batch
        line: dict[str, Any] = {"step": int(step), "samples": position, "stage": STAGE}
        for name in NUMBERS:
            number = self._number(entry, name)
            if number is not None:
                line[name] = number
        if not line.get("samples_per_second") and self._last is not None and now > self._last[1]:
            speed = (position - self._last[0]) / (now - self._last[1])
            if speed > 0:
                line["samples_per_second"] = speed
        self._record_ready(position, now, line.get("samples_per_second"))
        self._last = position, now
        self.position = position
        self.line_at = time.monotonic()
        line["time"] = now
        line["seconds"] = self.seconds
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()
        shown = {key: line.get(key) for key in ("step", "samples", *NUMBERS)}
        remaining = None
        if self.total and line.get("samples_per_second"):
            remaining = max(0, self.total - position) / line["samples_per_second"]
        self.status(STATUS_SECONDS, phase="training", eta_seconds=remaining, **shown)

    def _record_ready(self, position: int, now: float, speed: float | None) -> None:
        """Record once since when the program works: its first line, less the steps before it at the first speed."""
        if self._is_ready:
            return
        self._first = self._first or (position, now)
        if not speed:
            return
        self._is_ready = True
        reached, at = self._first
        ready = max(self._started, at - max(0, reached - self._start) / speed)
        record = {"samples": self._start, "environment": {}, "restoring": 0.0, "accumulate": 1, "time": ready}
        write_json(self._run.attempt(self._n) / "ready.json", record)

    def _position_of(self, entry: Entry) -> int | None:
        for name in POSITIONS:
            number = self._number(entry, name)
            if number is None or not 0 <= number < LARGEST:
                continue
            if name == "epoch" and not self._per_epoch:
                continue
            if name == "epoch":
                return round(number * self._per_epoch + (self._number(entry, IN_EPOCH) or 0.0))
            if name == "step":
                return int(number) * self._batch
            return int(number)
        return None

    def _number(self, entry: Entry, name: str) -> float | None:
        """A finite number of an entry, by our name; None without one."""
        value = entry.get(self._names.get(name, name))
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return None
        try:
            number = float(str(value).replace(",", ""))
        except ValueError:
            return None
        return number if math.isfinite(number) and abs(number) <= 1e30 else None

    def status(self, every: float = 0.0, **fields: Any) -> None:
        """Update status.json, at most every ``every`` seconds, unless a newer attempt exists."""
        self._status.update(fields)
        if time.monotonic() - self._written < every:
            return
        try:
            if self._run.is_current_attempt(self._n):
                write_json(self._run.status, {**self._status, "time": time.time()})
                self._written = time.monotonic()
        except OSError as error:
            log.warning("status.json cannot be written, tried again later: %s", error)

    def close(self, phase: str, reason: str = "") -> None:
        self.status(phase=phase, reason=reason)
        self._lines.close()


def _seconds_at(run: RunDir, samples_seen: int) -> float:
    """Seconds of training until S, by the newest metric line at or before it."""
    for _, file in sorted(metric_files(run).items(), reverse=True):
        for line in file.newest_first():
            if line["samples"] <= samples_seen:
                return float(line.get("seconds", 0.0))
    return 0.0
