"""Tests that an assert of a test fits in a line: it states one fact, and a reader sees it whole.

ruff's E501 does not hold this: its formatter breaks a long assert into lines that are short. Tables that an assert
compares with do not count: a list, dict, tuple or set, also in ``pytest.approx``, has a line for each entry.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 120
TABLES = (ast.List, ast.Dict, ast.Tuple, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)


class _WithoutTables(ast.NodeTransformer):
    """Replaces tables by a short name."""

    def visit_Compare(self, node):
        self.generic_visit(node)
        node.left = _short(node.left)
        node.comparators = [_short(side) for side in node.comparators]
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if ast.unparse(node.func) == "pytest.approx":
            node.args = [_short(argument) for argument in node.args]
        return node


def _short(side):
    return ast.Name("table") if isinstance(side, TABLES) else side


def long_asserts(text):
    """(line, length) of each assert that is longer than LONGEST as a single line, with its indentation."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assert):
            length = node.col_offset + len(ast.unparse(_WithoutTables().visit(node)))
            if length > LONGEST:
                yield node.lineno, length


def test_asserts_fit_in_a_line():
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for line, length in long_asserts(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(ROOT)}:{line}: {length} characters")
    assert found == [], "give parts a name, split `and`, or assert value, place and remedy of a message"


LONG = "x" * 70


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        (f"assert f({LONG!r}) == 1", []),
        (f"assert f({LONG!r}) == g({LONG!r})", [1]),
        (f"assert a in {LONG!r} and b in {LONG!r}", [1]),
        (f"assert a == 1, {LONG + LONG!r}", [1]),
        (f"assert f(a) == [{LONG!r}, {LONG!r}]", []),
        (f"assert f(a) == pytest.approx([{LONG}, {LONG}])", []),
        (f"assert f(a) == {LONG + LONG!r}", [1]),
        (f"def test():\n    assert f({LONG!r}, {'y' * 20}, {'z' * 20})", [2]),
    ],
)
def test_rule_knows_long_asserts(code, lines):
    assert [line for line, _ in long_asserts(code)] == lines
