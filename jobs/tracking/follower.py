"""Sends the metric lines of a run to a tracker: one run there over all attempts, each step once.

A tracker cannot take a step back, so a step is sent when it can no longer be lost. By the protocol of checkpoints
(``flip.runs.checkpoint_folder``) an attempt resumes from a checkpoint, and the steps after it are repeated. Hence a
line of attempt n is final if its S is not after the S from which each later attempt resumed (``ready.json``); a line of
the newest attempt, if its S is not after the newest checkpoint of this attempt. If a checkpoint turns out to be
damaged, steps up to it
are repeated after they were sent: the tracker keeps the first values.

The position is in ``trackers/<tracker>.json``, written when the tracker has closed; a follower that is killed leaves
the rest to the next. Training never waits for a follower, and does not notice it.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from flip.files.creation import open_lock, run_folder
from flip.monitoring import results
from flip.monitoring.curves import CurvePoints, scores
from flip.runs import checkpoint_folder
from flip.runs.credentials import scrub
from flip.runs.errors import ConfigError, StorageError
from flip.runs.metric_lines import MetricFile, metric_file
from flip.runs.rundir import RunDir, load_record, write_json
from jobs.common.filesystem import locked, writing
from jobs.tracking.tracker import TrackedRun, Tracker, load_tracker

POLL = 5.0
RETRY = 60.0  # seconds until an unavailable tracker is tried again
CLOSE_SECONDS = 60.0  # for the rest after the end of an attempt; then the next follower sends it

log = logging.getLogger("follower")


def final_samples(run: RunDir) -> dict[int, int]:
    """Attempt -> S up to which its metric lines are final."""
    newest: dict[int, int] = {}
    for each in checkpoint_folder.checkpoints(run):
        newest[each.attempt] = max(each.samples_seen, newest.get(each.attempt, 0))
    limits: dict[int, int] = {}
    resumed = load_record(run.result).get("samples")  # a complete run may have lost its checkpoints
    for n in reversed(run.attempt_numbers()):
        limits[n] = newest.get(n, 0) if resumed is None else resumed
        ready = load_record(run.attempt(n) / "ready.json").get("samples")
        if resumed is None:
            resumed = ready
        elif ready is not None:
            resumed = min(resumed, ready)
    return limits


def tracked_run(run: RunDir, tracker: str, project: str) -> TrackedRun:
    """What the tracker is given. The id is a hash of identity, project, path, and start of the first attempt."""
    identity = load_record(run.identity)
    settings = results.read_run(run.path).settings
    first = load_record(run.attempt(1) / "start.json")
    original = [*identity.get("before", []), identity][0].get("hash")  # before it continued with other data
    origin = [original, project, os.path.realpath(run.path), first.get("host"), first.get("time")]
    config = {key: scrub(value) if isinstance(value, str) else value for key, value in settings.items()}
    id_ = hashlib.sha256(repr(origin).encode()).hexdigest()[:16]
    return TrackedRun(id_, project, run.name, run.sweep, config, run.path / "trackers" / tracker)


class Follower:
    """Follows one run for one tracker. ``project``: instead of ``monitor.<tracker>``. Use it under ``lock``."""

    def __init__(self, run: RunDir, tracker: str, project: str = "") -> None:
        project = project or results.read_run(run.path).settings.get(f"monitor.{tracker}", "")
        if not project:
            remedy = f"Set monitor.{tracker}=PROJECT in the sweep, or use --project."
            raise ConfigError("no project for this run", f"monitor.{tracker}", run.name, remedy)
        self.run = run
        self._name = tracker
        self._about = tracked_run(run, tracker, project)
        self._state_file = run.path / "trackers" / f"{tracker}.json"
        self._reload()

    def _reload(self) -> None:
        """Start at the stored position, unless it is that of a copied directory."""
        state = load_record(self._state_file)
        if state.get("id") != self._about.id:
            state = {}
        self._step: int = state.get("step", -1)
        self._summary: dict[str, Any] = state.get("summary", {})
        self._scored: set[str] = set(state.get("scored", ()))
        self._files: dict[int, MetricFile] = {}
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._points = CurvePoints()
        self._tracker: Tracker | None = None

    def send(self) -> None:
        """Send what has become final."""
        self._pending += self._new_lines()
        limits = final_samples(self.run)
        final = {line["step"]: line for n, line in self._pending if line["samples"] <= limits.get(n, 0)}
        # a line that is not final can become so only in the newest attempt: others are repeated steps
        self._pending = [(n, line) for n, line in self._pending if line["samples"] > limits.get(n, 0)]
        complete = self.run.is_complete()
        unsent = []
        if final or complete:
            unsent = self._unsent_scores()
        for step, line in sorted(final.items()):
            points = self._points.of(line)
            if step > self._step and step > self._open():
                self._log(step, line["samples"], {"time": line.get("time", time.time()), **points}, unsent)
        while complete and unsent:
            self._log(self._open() + 1, unsent[0]["samples"], {}, unsent)

    def _log(self, step: int, samples_seen: int, values: dict[str, float], unsent: list[dict[str, Any]]) -> None:
        """Log a row, with the oldest scores up to its S; they name their own S."""
        if unsent and unsent[0]["samples"] <= samples_seen:
            record = unsent.pop(0)
            values |= {"scored_samples": record["samples"], **scores(record["evaluations"])}
            self._scored.add(_name(record))
        assert self._tracker is not None
        self._tracker.log(step, {"samples": samples_seen, **values})
        self._step = step

    def _unsent_scores(self) -> list[dict[str, Any]]:
        """Evaluations by S. Each is written after the checkpoint of its S."""
        return [record for record in results.read_run(self.run.path).curve() if _name(record) not in self._scored]

    def _new_lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(attempt, metric line) of lines that were not read yet, without damaged ones."""
        for n in self.run.attempt_numbers():
            for line in self._files.setdefault(n, metric_file(self.run, n)):
                yield n, line

    def _open(self) -> int:
        """Open the tracker, if it is not; returns the last step that it holds."""
        if self._tracker is None:
            tracker = load_tracker(self._name)
            self._step = tracker.open(self._about, self._step)
            self._tracker = tracker
        return self._step

    def close(self) -> None:
        """Send the results as far as they are known, close the tracker, and store the position."""
        row = results.row(results.read_run(self.run.path))
        if row["state"] == "unknown":  # the files do not prove it: the run may continue
            row |= {"state": None, "reason": None}
        summary = {key: value for key, value in row.items() if value is not None}
        if self._tracker is None and summary == self._summary:
            return
        self._open()
        assert self._tracker is not None
        self._tracker.summary(summary)
        self._tracker.close()
        self._tracker = None
        self._summary = summary
        state = {"id": self._about.id, "step": self._step, "scored": sorted(self._scored), "summary": summary}
        write_json(self._state_file, state)

    def follow(self, ended: Callable[[], bool]) -> None:
        """Send until ``ended()``, then what is left. An unavailable tracker is retried."""
        while not ended():
            try:
                self.send()
            except StorageError as error:
                log.warning("%s", error)
                self._reload()
                _wait(RETRY, ended)
            _wait(POLL, ended)
        self.send()


def _name(record: dict[str, Any]) -> str:
    return f"{record.get('stage')}-{record['samples']}"


def _wait(seconds: float, ended: Callable[[], bool]) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and not ended():
        time.sleep(0.5)


@contextlib.contextmanager
def lock(run: RunDir, tracker: str, ended: Callable[[], bool] | None = None) -> Iterator[bool]:
    """Hold the lock of the run's followers; false if another has it, until ``ended()`` if given."""
    with writing(run.path, "The owner of the run can follow it."):
        handle = open_lock(run_folder(run.path / "trackers") / f"{tracker}.lock")
    try:
        while not (mine := locked(handle, fcntl.LOCK_EX, run.path)) and ended is not None and not ended():
            time.sleep(0.5)
        yield mine
    finally:
        os.close(handle)


def has_ended(run: RunDir, n: int, parent: int) -> bool:
    """Whether attempt n has ended, or the process that started this follower."""
    over = not run.path.exists() or (run.attempt(n) / "end.json").exists() or not run.is_current_attempt(n)
    return over or os.getppid() != parent


def exit_after(ended: Callable[[], bool]) -> None:
    """End this process CLOSE_SECONDS after ``ended()``, whatever it waits for then."""

    def watch() -> None:
        while not ended():
            time.sleep(1.0)
        time.sleep(CLOSE_SECONDS)
        log.error("the tracker did not finish within %g s; the next follower continues", CLOSE_SECONDS)
        os._exit(StorageError("").code)

    threading.Thread(target=watch, daemon=True).start()
