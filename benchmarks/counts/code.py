"""What developers read: packages, modules, statements, branches, and required distributions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.counts.rows import Row, listed

PRODUCT = ("flip", "jobs", "tools")
"""Folders of the product."""
LAB = ("lab",)
"""What is published about the product, counted beside it. Tests and benchmarks are not counted."""
BRANCHING = (ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case)


@dataclass(frozen=True)
class Module:
    """A source file. ``name``: as Python imports it."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"


def read_modules(root: Path, folders: Sequence[str] = PRODUCT) -> list[Module]:
    """All modules of these folders below the folder ``root``."""
    modules = []
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            modules.append(Module(name, path, text, ast.parse(text)))
    return modules


def rows(modules: Sequence[Module]) -> list[Row]:
    """The rows on sources."""
    lines = sum(code_lines(module) for module in modules)
    branching = sum(branches(module.tree) for module in modules)
    return [
        listed("packages", [module.name for module in modules if module.is_package]),
        listed("modules", [module.name for module in modules if not module.is_package]),
        Row("lines of code", lines),
        Row("statements", sum(statements(module.tree) for module in modules)),
        Row("statements with docstrings", sum(statements(module.tree, True) for module in modules)),
        Row("branches", branching),
        Row("branches per 1,000 lines of code", round(1000 * branching / lines, 1)),
        listed("file names that stand twice", doubled_file_names(modules)),
    ]


def requirement_rows(root: Path) -> list[Row]:
    """The rows on distributions that have to be installed."""
    return [
        listed("required distributions", requirements(root / "requirements.txt")),
        listed("distributions of developers", requirements(root / "requirements-dev.txt")),
    ]


def statements(tree: ast.AST, with_docstrings: bool = False) -> int:
    """Statements, also those inside others."""
    documented = set() if with_docstrings else set(docstrings(tree))
    return sum(isinstance(node, ast.stmt) and node not in documented for node in ast.walk(tree))


def branches(tree: ast.AST) -> int:
    """Conditions, loops, handlers, assertions, further operands of and/or, and conditions of comprehensions."""
    count = 0
    for node in ast.walk(tree):
        count += isinstance(node, BRANCHING)
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            count += len(node.ifs)
    return count


def code_lines(module: Module) -> int:
    """Lines that are neither blank, nor a comment alone, nor part of a docstring."""
    skipped: set[int] = set()
    for node in docstrings(module.tree):
        skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(module.text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and i not in skipped for i, line in lines)


def docstrings(tree: ast.AST) -> Iterator[ast.Expr]:
    """Statements that are only a text, also those below an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node


def texts(tree: ast.AST) -> Iterator[str]:
    """The texts in the code, without docstrings."""
    documented = {node.value for node in docstrings(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documented:
            yield node.value


def requirements(path: Path) -> Iterator[str]:
    """Names of the distributions in a file for pip."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if name := re.match(r"[A-Za-z][\w.-]*", line):
            yield name[0].lower()


def doubled_file_names(modules: Sequence[Module]) -> Iterator[str]:
    """Names of files that several folders have, without those that Python gives."""
    names = [module.path.name for module in modules]
    for name in names:
        if names.count(name) > 1 and not name.startswith("__"):
            yield name
