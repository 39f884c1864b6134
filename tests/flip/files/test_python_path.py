"""Tests of the module path of commands and of the processes that they start, with real interpreters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flip.files import python_path

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import importlib.util, subprocess, sys
from flip.files import python_path
python_path.leave_current_folder()
print(importlib.util.find_spec("lazy") is not None)
child = "import importlib.util; print(importlib.util.find_spec('lazy') is not None)"
subprocess.run([sys.executable, "-c", child], check=True)
import jobs.common.text, json
"""


@pytest.fixture
def run(tmp_path):
    """``run(stated)`` prints whether the program and its child find a module of the current folder."""
    program = tmp_path / "bin" / "program.py"
    program.parent.mkdir()
    program.write_text(PROGRAM)

    def call(stated, folder=tmp_path):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment["PYTHONPATH"] = stated
        done = subprocess.run(
            [sys.executable, program], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    (tmp_path / "lazy.py").touch()
    return call


@pytest.mark.parametrize("stated", ["{root}", ":{root}", "{root}:", "{root}::/x", ".:{root}", "{root}:./"])
def test_empty_entries_of_pythonpath_do_not_mean_the_current_folder(run, stated):
    assert run(stated.format(root=ROOT)) == ["False", "False"]


def test_current_folder_stays_if_pythonpath_names_it(run, tmp_path):
    assert run(f"{tmp_path}::{ROOT}") == ["True", "True"]


def test_repository_stays_if_it_is_the_current_folder(run):
    assert run(f":{ROOT}", folder=ROOT) == ["False", "False"]
    assert run(":", folder=ROOT) == ["False", "False"]


def test_variables_name_the_code_first():
    assert python_path.variables("/code", ":/a:.:b") == {"PYTHONPATH": "/code:/a:b", "PYTHONSAFEPATH": "1"}
    assert python_path.variables("/code")["PYTHONPATH"] == "/code"


def test_variables_of_children_are_restored(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":/a")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with python_path.for_children("/code"):
        assert (os.environ["PYTHONPATH"], os.environ["PYTHONSAFEPATH"]) == ("/code:/a", "1")
    assert os.environ["PYTHONPATH"] == ":/a" and "PYTHONSAFEPATH" not in os.environ


def test_command_keeps_pythonpath_with_safe_path(tmp_path):
    """Python puts no folder of a script first then, which the repository would replace."""
    (tmp_path / "extra.py").touch()
    code = "import runpy, sys; sys.argv = ['submit.py', '--version']\n"
    code += f"try: runpy.run_path({str(ROOT / 'jobs' / 'submit.py')!r}, run_name='__main__')\n"
    code += "except SystemExit: import extra, jobs"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path.parent, check=True, capture_output=True)
