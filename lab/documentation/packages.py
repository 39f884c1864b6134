"""The page with every package and the question that it answers, from their docstrings."""

import ast
from collections.abc import Iterator
from pathlib import Path

from jobs.common.paths import REPOSITORY
from lab.documentation.markdown import code, table

_HEAD = """# Packages

`flip/` is the library, `jobs/` the launcher with the program `flip`, `tools/` its other commands, `kernel/` a
distribution in C; `lab/` holds the studies and the generators of these pages. `tests/test_imports.py` checks their
order. Tests mirror sources: `flip/config/merge.py` is tested by `tests/flip/config/test_merge.py`. Each row is the
first paragraph of the docstring of a package.
"""


def packages_page() -> str:
    """The page."""
    return f"{_HEAD}\n{table(('package', 'question'), ((code(name), about) for name, about in packages()))}"


def packages() -> Iterator[tuple[str, str]]:
    """(folder, first paragraph of its docstring) of each package."""
    for top in ("flip", "jobs", "tools", "lab"):
        for path in sorted((REPOSITORY / top).rglob("__init__.py")):
            about = _first_paragraph(path)
            if about:
                yield f"{path.parent.relative_to(REPOSITORY).as_posix()}/", about


def _first_paragraph(path: Path) -> str:
    documented = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(documented.partition("\n\n")[0].split()).replace("``", "`")
