"""The only reader of metric lines, metrics/<n>.jsonl (docs/contracts.md, Run directory).

One rule for all readers: a line counts once its line break is written, as a process that was killed, or is writing,
leaves a part of a line at the end. A complete line is damaged if ``flip.runs.records.LINE`` does not accept it; it is
left out, counted, and the first damaged line is described. Blank lines are ignored. Standard library, Python >= 3.6.
"""

import os
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

from flip.files.creation import open_regular
from flip.runs import records
from flip.runs.rundir import RunDir, parse_file_number, sorted_glob

#: Bytes at the end of a file that ``newest_first`` reads: more than the longest line.
TAIL_BYTES = 1 << 16


class MetricFile:
    """The metric lines of one attempt, in order: ``for line in file``.

    Iterating again yields the lines that were appended since, and nothing while the file does not exist. An iteration
    that is left early continues after its last line. Iterating raises OSError if the file cannot be read, and
    ValueError with the path if it is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: Damaged lines that were met so far.
        self.damaged = 0
        #: The number of the first damaged line, and what is wrong with it; empty if all were valid.
        self.problem = ""
        self._position = 0
        self._number = 0

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            return
        with file:
            file.seek(self._position)
            for text in file:
                if not text.endswith(b"\n"):
                    return
                self._position += len(text)
                self._number += 1
                line = self._checked(text)
                if line is not None:
                    yield line

    def _checked(self, text: bytes) -> Optional[Dict[str, Any]]:
        """The values of a line; None for a blank or damaged one, which is counted."""
        if text.isspace():
            return None
        try:
            return parse_line(text)
        except ValueError as error:
            self.damaged += 1
            self.problem = self.problem or "line %d cannot be read: %s" % (self._number, error)
            return None

    def complete_lines(self) -> bytes:
        """All complete lines as bytes, for a parser of columns; empty if the file does not exist. Raises as above."""
        try:
            with open_regular(self.path) as file:
                text: bytes = file.read()
        except FileNotFoundError:
            return b""
        return text[: text.rfind(b"\n") + 1]

    def newest_first(self) -> Iterator[Dict[str, Any]]:
        """Yield the valid lines among the last TAIL_BYTES of the file, newest first.

        Yields nothing if the file does not exist or cannot be read: its callers do not depend on these lines.
        """
        try:
            with open_regular(self.path) as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
                texts = file.read().split(b"\n")[:-1]
        except (OSError, ValueError):
            return
        for text in reversed(texts):
            try:
                line = parse_line(text)
            except ValueError:
                continue
            yield line


def parse_line(text: bytes) -> Dict[str, Any]:
    """The values of a complete line. Raises ValueError if it is damaged."""
    line: Dict[str, Any] = records.checked(records.parse(text), records.LINE)
    return line


def metric_file(run: RunDir, n: int) -> MetricFile:
    """The metric lines of attempt n, which may have none."""
    return MetricFile(run.metrics / ("%d.jsonl" % n))


def metric_files(run: RunDir) -> Dict[int, MetricFile]:
    """Attempt -> its metric lines, for each attempt with a file, ascending."""
    numbered = {parse_file_number(path.stem): path for path in sorted_glob(run.metrics, "*.jsonl")}
    numbers = sorted(n for n in numbered if n is not None)
    return {n: MetricFile(numbered[n]) for n in numbers}


def newest_line(run: RunDir) -> Dict[str, Any]:
    """The newest valid line of a run; empty if it has none."""
    for _, file in sorted(metric_files(run).items(), reverse=True):
        for line in file.newest_first():
            return line
    return {}
