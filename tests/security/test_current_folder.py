"""Tests that no command, and no process that it starts, imports a module from the current folder.

The folder may hold data of another user. Here it is full of modules with the names of the standard library and of all
installed packages; each records its name when it is imported.
"""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from jobs.__main__ import PACKAGES
from tests.jobs.outcomes import make
from tests.synthetic import make_dataset, make_tokenizer

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
NAMES = {*sys.stdlib_module_names, *metadata.packages_distributions(), "flip", "jobs", "tools", "lab", "sitecustomize"}


class Hostile:
    """The current folder of the commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "current"
        self.marks = folder / "marks"
        self.place = folder
        self.folder.mkdir()
        self.marks.touch()
        module = self.folder / "hostile.py"
        module.write_text(f"with open({str(self.marks)!r}, 'a') as marks: marks.write(__name__ + '\\n')\n")
        for name in NAMES:
            (self.folder / f"{name}.py").symlink_to(module)
        self.flip = folder / "flip"  # as pip writes it
        self.flip.write_text(
            "import sys\nfrom jobs.__main__ import main\nif __name__ == '__main__': sys.exit(main())\n"
        )

    def run(self, *command, code=0, timeout=300.0):
        """Run a Python command in the folder, and check that it has imported no module from there."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(self.place)}
        environment |= {"FLIP_RUNS": str(self.place / "runs")}
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=self.folder, env=environment, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, timeout=timeout,
        )  # fmt: skip
        assert (done.returncode, self.marks.read_text()) == (code, ""), (command, done.stdout, done.stderr)
        return done.stdout


@pytest.fixture
def hostile(tmp_path):
    return Hostile(tmp_path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=64, shards=2, size=32, classes=4)
    make_tokenizer(folder / "tokenizer.json")
    return folder


def test_folder_is_hostile(hostile):
    """A process with the current folder on its path imports from there."""
    subprocess.run([sys.executable, "-c", "import json"], cwd=hostile.folder, check=True)
    assert "json" in hostile.marks.read_text().split()


@pytest.mark.parametrize("safe", [False, True], ids=["", "PYTHONSAFEPATH"])
def test_no_command_imports_from_current_folder(hostile, safe, monkeypatch):
    if safe:
        monkeypatch.setenv("PYTHONSAFEPATH", "1")
    for name in PACKAGES:
        if safe:
            hostile.run(ROOT / "jobs", name, "--help")
        else:
            hostile.run(hostile.flip, name, "--help")


def test_tensorboard_is_not_imported_from_current_folder(hostile):
    pytest.importorskip("tensorboard")
    make(hostile.place / "runs" / "demo", "run").tensorboard.mkdir()
    assert hostile.run(hostile.flip, "tensorboard", "demo", "--", "--version_tb").strip()


def test_processes_of_shards_import_nothing_from_current_folder(hostile, data):
    for arguments in (
        ["index", data / "*.tar", "--out", hostile.place / "manifest", "--workers", "2"],
        ["verify", hostile.place / "manifest", "--workers", "2"],
    ):
        hostile.run(hostile.flip, "shards", *arguments)


POOLS = """
from flip import concurrency
from jobs.common.cli import run_main

def task(arguments=None):
    return len

def fork_server():
    print(sorted(concurrency.map_in_processes(task, (), ["a", "ab"], 2, "test")))

def spawned():
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        print(pool.submit(len, "ab").result())

if __name__ == "__main__":
    fork_server()
    run_main(spawned)
"""


def test_process_pools_of_a_script_import_nothing_from_current_folder(hostile):
    """The fork server also in a program of the user, which uses the library without a command."""
    script = hostile.place / "script.py"
    script.write_text(POOLS)
    assert hostile.run(script).split("\n")[:2] == ["[1, 2]", "2"]


def test_run_with_supervisor_and_loader_processes_imports_nothing_from_current_folder(hostile, data):
    sweep = hostile.place / "demo.yaml"
    sweep.write_text(f"""
set:
  model: {{size: tiny}}
  data: {{manifest: {data}, tokenizer: {data}/tokenizer.json, workers: 1, block: 1}}
  stages: [{{name: pretrain, samples: 32, batch: 16}}]
  compute: {{threads: 1}}
runs: {{base: {{}}}}
""")
    hostile.run(hostile.flip, "debug", sweep, "--run", "base", "--out", hostile.place, "data.workers=1")
    hostile.run(hostile.flip, "submit", sweep, "--cluster", "local", "--yes", "--watch")
    assert (hostile.place / "runs/demo/base/result.json").exists()
    hostile.run(hostile.flip, "status", "demo")
