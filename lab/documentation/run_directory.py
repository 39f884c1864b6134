"""The page with every file of a run directory, from ``flip.runs.run_files``."""

import re

from flip.runs.run_files import RUN_FILES, SWEEP_FILES
from lab.documentation.markdown import code, table

_HEAD = """# Run directory

Every file of a run and of its sweep, from `flip/runs/run_files.py`. `<n>` is the number of an attempt, `<r>` a rank, S
the position. [contracts.md](../contracts.md#run-directory) has the rules.

## RUNS_ROOT/SWEEP/RUN
"""


def run_directory_page() -> str:
    """The page."""
    parts = [_HEAD, _table(RUN_FILES), "## RUNS_ROOT\n", _table(SWEEP_FILES)]
    return "\n".join(parts)


def _table(files: dict[str, str]) -> str:
    return table(("path", "contents"), ((code(path), _linked(about)) for path, about in files.items()))


def _linked(about: str) -> str:
    """The text with pages as links, and names in angle brackets as code."""
    about = re.sub(r"docs/(\w+\.md)", r"[\1](../\1)", about)
    return re.sub(r"((?:[\w.-]*<[\w-]+>[\w.-]*/?)+)", r"`\1`", about)
