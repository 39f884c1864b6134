"""Tests of exit codes: they are constants of ``flip.runs.errors``, and no other file of the sources writes one."""

import ast
from pathlib import Path

import pytest

from flip.files import ownership
from flip.runs import errors

ROOT = Path(__file__).resolve().parents[3]
CODES = {
    name: value
    for name, value in vars(errors).items()
    if name.isupper() and type(value) is int and value != errors.COMPLETE
}
#: Files that cannot import the constants, with their own.
OWN = {
    "flip/runs/errors.py": set(CODES.values()),
    "flip/files/ownership.py": {ownership.REFUSED},  # nothing of flip.runs
    "jobs/__main__.py": {errors.CONFIG},  # for a Python that is too old
}


def written_codes(source):
    """Lines of a file that return a number of CODES, exit with it, compare with it, or give it a name or a text."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        numbers = []
        if isinstance(node, ast.Return):
            numbers = [node.value]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("exit", "sys.exit", "os._exit", "SystemExit"):
            numbers = node.args
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            numbers = node.args[2:]
        elif isinstance(node, ast.Compare) and "code" in ast.unparse(node):
            sides = [node.left, *node.comparators]
            numbers = [side for each in sides for side in (each.elts if isinstance(each, ast.Tuple) else [each])]
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            is_code = any(word in ast.unparse(node.targets[0]) for word in (*CODES, "CODE", "REFUSED"))
            numbers = [node.value] if is_code else []
        elif isinstance(node, ast.Dict) and all(isinstance(value, ast.Constant) for value in node.values):
            numbers = [key for key, value in zip(node.keys, node.values, strict=True) if isinstance(value.value, str)]
        for number in numbers:
            if isinstance(number, ast.Constant) and type(number.value) is int and number.value in CODES.values():
                found[node.lineno] = number.value
    return found


def test_exit_codes_differ():
    assert len(set(CODES.values())) == len(CODES)
    assert set(errors.CAUSES.values()) <= {*CODES.values(), errors.COMPLETE}


@pytest.mark.parametrize("folder", ["flip", "jobs", "tools"])
def test_no_other_file_writes_an_exit_code(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        found = written_codes(path.read_text(encoding="utf-8"))
        assert set(found.values()) <= OWN.get(name, set()), f"{name}: lines {sorted(found)}: use flip.runs.errors"


def test_files_that_cannot_import_the_codes_have_the_same():
    assert ownership.REFUSED == errors.PERMISSION
    assert written_codes((ROOT / "jobs" / "__main__.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line", ["def f(): return 78", "sys.exit(65)", "x = code in (None, 137)", "DATA = 65", "getattr(error, 'code', 70)",
             "TEXTS = {69: 'storage'}"],
)  # fmt: skip
def test_scan_finds_codes(line):
    assert written_codes(line)
