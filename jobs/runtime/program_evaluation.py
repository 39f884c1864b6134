"""Runs the evaluation of a program: the command that scores its last checkpoint, in rank 0, after all ranks ended well.

``trained.json`` records that the program has ended well, so that an attempt after it runs the evaluation alone. A score
is a line of output: JSON with ``name`` and ``score``, or what the pattern of command.json matches.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Mapping
from typing import Any

from flip.runs.errors import DataError

LARGEST = 1000
"""Scores of an evaluation that are kept."""


class ScoreLines:
    """Collects the scores among the lines of an evaluation; the last of a name counts."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern) if pattern else None
        self._lock = threading.Lock()
        self._scores: dict[str, dict[str, Any]] = {}
        self._bad = ""

    def on_line(self, line: str) -> None:
        """Called on the threads that read the output."""
        entry = self._entry(line)
        if entry is None or "score" not in entry:
            return
        name = str(entry.get("name") or "score")
        try:
            score = float(entry["score"])
        except (TypeError, ValueError):
            score = math.nan
        with self._lock:
            if not 0 <= score <= 1:
                self._bad = f"{name}: {entry['score']}"
            elif name in self._scores or len(self._scores) < LARGEST:
                self._scores[name] = {**_facts(entry), "name": name, "top1": score, "score": score}

    def _entry(self, line: str) -> Mapping[str, Any] | None:
        if self._pattern is not None:
            match = self._pattern.search(line)
            return None if match is None else match.groupdict()
        if not line.lstrip().startswith("{"):
            return None
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return entry if isinstance(entry, dict) else None

    def scores(self) -> list[dict[str, Any]]:
        """The scores, as in result.json. Raises DataError if there are none, or one is no share."""
        with self._lock:
            if self._bad:
                raise DataError("a score is a share, from 0 to 1", "evaluate", self._bad)
            if not self._scores:
                remedy = 'Print a line such as {"name": "test", "score": 0.25}, or give evaluate.pattern.'
                raise DataError("the evaluation has printed no score", "evaluate", remedy=remedy)
            return list(self._scores.values())


def _facts(entry: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"task": "program", "precision": "program", "role": "test"}
    metric = entry.get("metric")
    if isinstance(metric, str) and metric:
        facts["metric"] = metric
    number = entry.get("n")
    if type(number) is int and number > 0:
        facts["n"] = number
    return facts
