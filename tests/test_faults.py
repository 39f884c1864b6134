"""Tests of the faults by which changes of tests are judged: they change one line, and know the tests of a module."""

import ast

import pytest

from tests import faults
from tests.faults import Fault

TEXT = '''"""About."""


def f(a, b):
    if a < b and a:
        g(a, b)
    return "a b"
'''


def test_fault_changes_one_line():
    found = list(faults.faults_of("x.py", TEXT))
    assert [(fault.line, fault.after.strip()) for fault in found] == [
        (5, "if (not (a < b and a)):"),
        (5, "if a < b or a:"),
        (5, "if a <= b and a:"),
        (6, "pass"),
        (6, "g(b, a)"),
    ]
    for fault in found:
        changed = faults.faulted(TEXT, fault)
        ast.parse(changed)
        assert len(set(changed.splitlines()) ^ set(TEXT.splitlines())) == 2


def test_fault_of_a_changed_line_is_refused():
    fault = Fault("flip/data", "x.py", 6, "        h(a, b)", "        pass")
    with pytest.raises(ValueError, match=r"x\.py:6"):
        faults.faulted(TEXT, fault)


def test_fault_follows_its_line_within_the_file_and_to_another(tmp_path):
    fault = Fault("flip/data", "flip/data/x.py", 2, "    g(a, b)", "    g(b, a)")
    moved = tmp_path / "flip" / "base" / "y.py"
    moved.parent.mkdir(parents=True)
    moved.write_text(TEXT)
    assert faults.located(fault, tmp_path) == "flip/base/y.py"
    assert faults.faulted(TEXT, fault).splitlines()[5] == "        g(b, a)"
    moved.with_name("z.py").write_text(TEXT)
    with pytest.raises(ValueError, match="2 files have the line"):
        faults.located(fault, tmp_path)


def test_module_has_the_tests_of_its_name_and_those_that_import_it():
    assert "tests/flip/data/test_order.py" in faults.tests_of("flip/data/order.py")
    assert "tests/flip/checkpoint/test_restorer.py" in faults.tests_of("flip/checkpoint/remote.py")
    assert len(faults.tests_of("flip/data/parquet/thrift.py")) > 5, "it has no test of its own"
