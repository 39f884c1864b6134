"""Tests that the counts of mechanisms react to a mechanism more, and that the tree has an answer to each question."""

import argparse
import ast
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.counts import __main__ as command
from benchmarks.counts import answers, code, compare, first_step, imports, rows, surface
from benchmarks.counts.code import Module
from benchmarks.counts.rows import Row

ROOT = Path(__file__).resolve().parents[2]


def module(text, name="flip.example", root=Path("/root")):
    return Module(name, root / f"{name.replace('.', '/')}.py", text, ast.parse(text))


def parsers(*more):
    """Return the parsers of a command with two subcommands; ``more``: options of the second one."""
    top = argparse.ArgumentParser(prog="flip shards")
    commands = top.add_subparsers()
    first = commands.add_parser("index", aliases=["build"])
    first.add_argument("-o", "--out")
    first.add_argument("shards", nargs="+")
    second = commands.add_parser("verify")
    for name in more:
        second.add_argument(name, help=argparse.SUPPRESS)
    return surface.with_subcommands(top)


def test_subcommand_counts_once_and_each_option_of_each_command_counts():
    few = parsers()
    many = parsers("--out", "--sample")
    assert [parser.prog for parser in few] == ["flip shards", "flip shards index", "flip shards verify"]
    assert set(surface.options(few)) == {"flip ... --help", "flip shards index --out"}
    assert set(surface.options(many)) - set(surface.options(few)) == {
        "flip shards verify --out",
        "flip shards verify --sample",
    }
    assert list(surface.arguments(many)) == ["flip shards index shards"]


@dataclass
class Part:
    size: int = 1


@dataclass
class ClusterProfile:
    one: Part = field(default_factory=Part)
    many: list[Part] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)


def test_fields_of_sections_and_keys_of_free_dictionaries_count():
    assert list(surface.field_names(ClusterProfile)) == ["one.size", "many.NAME.size", "names", "options"]
    text = """
profile.options.get("exclude")
self.profile.options["gres"]
"mem" in profile.options
{"gpus"} & profile.options.keys()
other.options["no"], profile.names["no"]
"""
    keys = surface.free_keys(ClusterProfile, [module(text)])
    assert sorted(keys) == ["options.exclude", "options.gpus", "options.gres", "options.mem"]


def test_environment_variables_count_if_they_are_keys_of_an_environment(tmp_path):
    text = '''
"""FLIP_IN_DOCSTRING"""
VISIBLE = "CUDA_VISIBLE_DEVICES"
os.environ.get("HOME"), os.environ[VISIBLE], "TERM" in environ, colours["RED"]
line = "export FLIP_NEW=$FLIP_OLD"
'''
    assert set(surface.read_variables([module(text)])) == {"HOME", "CUDA_VISIBLE_DEVICES", "TERM"}
    script = tmp_path / "jobs" / "start.sh"
    script.parent.mkdir()
    script.write_text("echo $FLIP_SCRIPT")
    assert set(surface.own_variables([module(text)], tmp_path)) == {"FLIP_NEW", "FLIP_OLD", "FLIP_SCRIPT"}


def test_file_names_and_numbers_of_formats_count():
    text = """
VERSION = 2
SCHEMA_VERSION = 1
NAME = "folder/start.json"
'*.json', "say a.json", f"{n}.jsonl"
"""
    assert set(surface.file_names([module(text)])) == {"start.json"}
    assert list(surface.format_numbers([module(text)])) == ["flip.example.VERSION", "flip.example.SCHEMA_VERSION"]


def test_statements_branches_and_lines_of_code():
    text = '''"""About."""

# a comment
def f(x):
    """About."""
    if x and x > 1:
        return [i for i in x if i]
    return 1 if x else 2
'''
    tree = ast.parse(text)
    assert code.statements(tree) == 4 and code.statements(tree, with_docstrings=True) == 6
    assert code.branches(tree) == 4
    assert code.code_lines(module(text)) == 4


@pytest.mark.parametrize("late", ["def f():\n    import flip.a", "if TYPE_CHECKING:\n    from flip.a import A"])
def test_circle_counts_if_one_import_is_in_a_function_or_for_types(late):
    modules = [module("from flip import b", "flip.a"), module(late, "flip.b"), module("import flip.a", "flip.c")]
    assert imports.circles_of(imports.edges(modules)) == [["flip.a", "flip.b"]]
    assert imports.circles_of(imports.edges(modules, everywhere=False)) == []


def test_only_existing_places_answer_and_question_without_answer_is_an_error(tmp_path):
    path = tmp_path / "flip" / "a.py"
    path.parent.mkdir()
    path.write_text("")
    here = [
        module("class Check:\n    x = '/proc/limit'\ndef g() -> int: return 1\nfrom b import Other", "flip.a", tmp_path)
    ]
    places = ("flip/a.py", "flip/a.py:Check", "flip/a.py:Other", "flip/b.py:Check", "text: /proc/limit", "options: --x")
    places += ("flip/a.py:g -> int", "flip/a.py:g -> str")
    row = answers.answered("Who?", places, here, tmp_path, {"options": ["--x"]})
    assert row.names == ("flip/a.py", "flip/a.py:Check", "flip/a.py:g -> int", "options: --x")
    with pytest.raises(LookupError, match=r"Who\?"):
        answers.answered("Who?", ("flip/b.py",), here, tmp_path, {})


def test_lab_is_counted_beside_the_product(tmp_path):
    product = module("x = 1\nif x:\n    y = 2\n")
    proof = module("z = 3\n", "lab.example")
    counted = rows.with_lab(code.rows([product]), code.rows([proof]), code.rows([product, proof]))
    lines = compare.table([*counted, Row("options", 7)]).splitlines()
    assert "| lines of code | 3 | 1 | 4 |" in lines
    assert "| branches per 1,000 lines of code | 333.3 | 0.0 | 250.0 |" in lines
    assert "| options | 7 | | |" in lines
    rows.write(counted, "abc", tmp_path / "after.json")
    assert rows.read(tmp_path / "after.json") == ("abc", counted)
    earlier = [Row("lines of code", 4)]
    assert "| lines of code | 4 | 3 + 1 = 4 | +0 |" in compare.compared(earlier, counted, ("a", "b"))


def test_table_of_two_results_names_what_came_and_went(tmp_path):
    before = [Row("options", 2, ("--a", "--b")), Row("statements", 1000), Row("old", 1)]
    after = [Row("options", 1, ("--c",)), Row("statements", 900)]
    rows.write(before, "abc", tmp_path / "before.json")
    assert rows.read(tmp_path / "before.json") == ("abc", before)
    lines = compare.compared(before, after, ("abc", "def")).splitlines()
    assert "| statements | 1,000 | 900 | -100 |" in lines and "| old | 1 | - | - |" in lines
    assert "- gone (2): `--a`, `--b`" in lines and "- new (1): `--c`" in lines


@pytest.mark.long
def test_every_row_of_this_tree_counts_something():
    counted = {row.name: row for row in command.count(trace=False)}
    assert {question for question in answers.QUESTIONS if counted[question].value >= 1} == set(answers.QUESTIONS)
    assert {"flip submit", "flip shards index"} <= set(counted["commands"].names)
    assert "flip submit --dry-run" in counted["options"].names
    assert "data.sets.NAME.weight" in counted["configuration fields"].names
    assert "FLIP_RUNS" in counted["environment variables of FLIP"].names
    assert "CUDA_VISIBLE_DEVICES" in counted["environment variables of others"].names
    empty = {name for name, row in counted.items() if not row.value}
    assert empty <= {name for name in counted if "circle" in name}


WORKER = """
class A:
    def f(self):
        return [g() for _ in range(3)]

def g():
    pass
"""
START = """
import os
from jobs import worker

if not os.fork():
    worker.A().f()
    os._exit(0)
os.wait()
"""


@pytest.mark.long
def test_tracer_notes_functions_of_process_and_fork_once(tmp_path):
    traces = tmp_path / "traces"
    traces.mkdir()
    tree = tmp_path / "snapshot"
    (tree / "jobs").mkdir(parents=True)
    (tree / "jobs" / "__init__.py").write_text("")
    (tree / "jobs" / "worker.py").write_text(WORKER)
    (tree / "start.py").write_text(START)
    python = first_step.traced_python(tmp_path / "environment", traces)
    subprocess.run([python, "start.py"], cwd=tree, env={}, check=True, timeout=60)
    calls = sorted(first_step.read_calls(traces, float("inf")))
    worker = "jobs/worker.py"
    assert calls == [("jobs/__init__.py", ""), (worker, ""), (worker, "A.f"), (worker, "g")]
    assert list(first_step.read_calls(traces, 0)) == []


@pytest.mark.slow
def test_trace_reaches_submission_ranks_and_loaders(tmp_path):
    functions, _, _ = first_step.rows(ROOT, tmp_path)
    names = set(functions.names)
    assert 500 < functions.value < 2000
    assert {"jobs/commands/submit.py:main", "jobs/runtime/rank_process.py:main"} <= names
    assert any(name.startswith("flip/data/worker.py:") for name in names)
