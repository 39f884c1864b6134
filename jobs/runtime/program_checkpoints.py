"""Follows the checkpoints of a program, and records the complete ones (``flip.runs.command_record``).

A path is complete if it is unchanged between two looks of the attempt that wrote it, or when the program has ended with
0 or 75. A file of torch or safetensors must also end as its format says. What a killed attempt leaves unfinished never
is: the next attempt sees it before its program starts.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flip.runs import checkpoint_folder
from flip.runs.checkpoint_folder import SavedCheckpoint
from flip.runs.command_record import Content, content_of, is_whole, newest_intact, record_checkpoint
from flip.runs.errors import DataError
from flip.runs.rundir import RunDir

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Least time between two looks."""
MOST_NAMES = 5


class CheckpointFollower:
    """Looks at the folder of an attempt's checkpoints. ``position``: the newest S that the metrics show, or None."""

    def __init__(
        self,
        run: RunDir,
        n: int,
        resume: Mapping[str, Any],
        folder: Path | None,
        position: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._run = run
        self._n = n
        self._resume = resume
        self._folder = folder
        """None: its checkpoints are not followed."""
        self._position = position
        self._number = re.compile(resume.get("number") or r"(\d+)(?!.*\d)")
        self._recorded = checkpoint_folder.checkpoints(run)
        self._looked_at = float("-inf")
        self._before: dict[Path, Content] = {}
        """What was there before the program started, or is recorded."""
        self._seen: dict[Path, Content] = {}
        """At the look before."""
        self.saved_at = time.monotonic()
        self.saves = 0

    @property
    def newest(self) -> SavedCheckpoint | None:
        return self._recorded[-1] if self._recorded else None

    def start(self) -> SavedCheckpoint | None:
        """The checkpoint from which the program continues; None: there was none yet.

        Raises DataError if all that were recorded are gone or have changed.
        """
        self._before = self._present()
        if self._resume.get("renames") and self._n > 1:
            known = {(c.record["path"], c.record["content"]) for c in self._recorded}
            for path, content in self._before.items():
                if (str(path), content.digest) not in known and is_whole(path):
                    self._record(path, content)
        if not self._recorded:
            return None
        intact = newest_intact(self._recorded)
        if intact is None:
            newest = self._recorded[-1].record["path"]
            what = "the checkpoint of the program has vanished, or has changed since it was complete"
            remedy = "Restore it, or start from zero with `flip submit --changed restart`, or in a new sweep."
            raise DataError(what, newest, remedy=remedy)
        if intact is not self._recorded[-1]:
            log.warning(
                "%s is gone or has changed; %s is used", self._recorded[-1].record["path"], intact.record["path"]
            )
        return intact

    def look(self, final: bool = False) -> None:
        """Record what is complete. ``final``: the program has ended well, so that nothing changes any more."""
        now = time.monotonic()
        if self._folder is None or (now - self._looked_at < LOOK_SECONDS and not final):
            return
        present = self._present()
        for path, content in present.items():
            is_new = self._before.get(path) != content
            is_stable = self._seen.get(path) == content or final or self._resume.get("renames")
            if is_new and is_stable and is_whole(path):
                self._record(path, content)
                self._before[path] = content
        self._seen = present
        self._looked_at = now

    def why_none(self) -> str:
        """That no path matched, in words; empty if one did, or if none is expected."""
        if self._folder is None or self.saves or self._present():
            return ""
        try:
            names = sorted(os.listdir(self._folder))
            there = f"there: {', '.join(names[:MOST_NAMES]) or 'nothing'}"
        except OSError:
            there = "that folder does not exist"
        return f"resume.pattern {self._resume['pattern']!r} matches nothing below {self._folder} ({there})"

    def _present(self) -> dict[Path, Content]:
        """The paths that match, with a mark of completeness if they have one, oldest number first."""
        if self._folder is None or not self._folder.is_dir():
            return {}
        present = {}
        for path in sorted(self._folder.glob(self._resume["pattern"]), key=lambda path: (self._count(path) or 0, path)):
            if self._resume.get("done") and not (path / self._resume["done"]).exists():
                continue
            content = content_of(path)
            if content is not None and content.bytes:
                present[path] = content
        return present

    def _count(self, path: Path) -> int | None:
        assert self._folder is not None
        match = self._number.search(str(path.relative_to(self._folder)))
        digits = match and (match.group(1) if match.groups() else match.group(0))
        if digits and digits.isdecimal() and len(digits) <= 15:
            return int(digits)
        return None

    def _record(self, path: Path, content: Content) -> None:
        newest = self._recorded[-1].samples_seen if self._recorded else 0
        number = self._count(path)
        if number is not None:
            samples_seen = number * int(self._resume["unit"])
        else:  # no number: later than the one before
            samples_seen = max(newest + 1, self._position() or 0)
        if not self._run.is_current_attempt(self._n):
            return
        checkpoint = record_checkpoint(self._run, self._n, samples_seen, path, content)
        log.info("checkpoint at %d: %s", samples_seen, path)
        others = [each for each in self._recorded if each.path != checkpoint.path]
        self._recorded = sorted([*others, checkpoint], key=lambda each: (each.samples_seen, each.attempt))
        self.saved_at = time.monotonic()
        self.saves += 1
