"""Tests of packaging: files of the wheel, installed commands, README badges, and names that hide no other module."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from urllib.parse import unquote

import pytest

import flip
from flip.common.yaml_io import read_yaml

ROOT = Path(__file__).resolve().parents[1]

#: Runs a script of jobs/ as Python does, with its folder first in sys.path. Prints the file of each named module.
SCRIPT = """
import contextlib, importlib.util, io, json, runpy, sys
folder, script, *names = sys.argv[1:]
sys.path[0], sys.argv = folder, [script, "submit", "--help"]
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    runpy.run_path(f"{folder}/{script}", run_name="__main__")
specs = {name: importlib.util.find_spec(name) for name in names}
print(json.dumps({name: spec and spec.origin for name, spec in specs.items()}))
"""


@pytest.mark.parametrize("script", ["__main__.py", "submit.py"])
def test_scripts_shadow_no_foreign_module(script, tmp_path):
    """Other packages may import modules with the names of packages of jobs/: common, runtime, slurm."""
    names = ["common", "runtime", "slurm", "worker", "jobs", "flip"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "jobs"), script, *names],
        capture_output=True, text=True, cwd=tmp_path, timeout=60,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    origins = json.loads(done.stdout)
    assert origins.pop("jobs") == str(ROOT / "jobs" / "__init__.py")
    assert origins.pop("flip") == str(ROOT / "flip" / "__init__.py")
    assert not [origin for origin in origins.values() if origin and origin.startswith(str(ROOT / "jobs"))]


def test_readme_badges_match_project_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    badges = re.findall(r"^\[!\[(.*?)\]\(.*?/badge/(\S*?)\)\]", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert [label for label, _ in badges] == [
        f"Licence: {project['license']}",
        f"Python {project['requires-python'].removeprefix('>=')} or newer",
        re.search(r"arXiv [\d.]+", project["description"])[0],
    ]
    for label, path in badges:
        assert label.split()[1] in unquote(path).replace("--", "-")


def test_citation_names_version_and_licence_of_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = read_yaml(ROOT / "CITATION.cff")
    assert citation["version"] == flip.__version__ and citation["license"] == project["license"]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == re.search(r"arXiv [\d.]+", project["description"])[0].replace(" ", ":")


@pytest.mark.long
def test_make_install_installs_flip_command(tmp_path):
    """The Makefile's rule runs in a copy of the tree, with the packages of this environment and without a network.

    The copy is named flip, as a clone is: in its parent folder Python first meets a folder flip that is no package.
    """
    copy = tmp_path / "flip"
    site = sysconfig.get_paths()["purelib"]
    for name in ("flip", "jobs", "tools", "sweeps", "kernel"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "requirements.txt", "requirements.lock"):
        shutil.copy(ROOT / name, copy)
    venv.create(copy / ".venv", with_pip=False)
    (own,) = (copy / ".venv" / "lib").glob("python*/site-packages")
    (own / "packages.pth").write_text(site)
    (copy / ".venv" / "bin" / ".ready").touch()
    line = ["make", "install"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment = {**outside, "PIP_NO_INDEX": "1", "PYTHONPATH": ""}
    for _ in range(2):
        done = subprocess.run(line, cwd=copy, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(("kernel: yes\n", "kernel: no, because "))
    assert done.stdout.count("\n") == 1, "the second time there is nothing to be done"
    flip = str(copy / ".venv" / "bin" / "flip")
    for arguments, answer in (
        (["--version"], f"({copy}, "),
        (["shards", "info", "--help"], "usage: flip shards info [op"),
    ):
        done = subprocess.run([flip, *arguments], cwd="/", capture_output=True, text=True, timeout=60, env=environment)
        assert (done.returncode, done.stderr) == (0, "") and answer in done.stdout
    script = tmp_path / "mine.py"
    script.write_text("import flip\nprint(flip.__file__, flip.load, flip.__version__)\n")
    python = str(copy / ".venv" / "bin" / "python")
    for command, folder in (
        ([python, "mine.py"], tmp_path),
        ([python, str(script)], "/"),
        ([python, "-c", "import flip; print(flip.__file__)"], tmp_path),
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=environment)
        assert done.stdout.startswith(str(copy / "flip" / "__init__.py")), done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return the folder of an unpacked wheel, built without a network from a copy of the repository."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, copy)
    for name in ("flip", "jobs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    script = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "dist").glob("flip_toolkit-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(copy / "installed")
    return copy / "installed"


@pytest.mark.long
def test_wheel_holds_every_file_of_package(wheel):
    sources = {path.relative_to(ROOT) for path in (ROOT / "flip").rglob("*") if path.is_file()}
    sources = {str(path) for path in sources if "__pycache__" not in path.parts}
    assert {"flip/py.typed", "flip/evaluation/datasets/datasets.yaml"} <= sources
    assert sources == {str(path.relative_to(wheel)) for path in (wheel / "flip").rglob("*") if path.is_file()}


def test_wheel_works_outside_repository(wheel, tmp_path):
    script = (
        "import flip, importlib.metadata\n"
        "from flip.evaluation.datasets.catalog import entries\n"
        "assert entries() and importlib.metadata.version('flip-toolkit') == flip.__version__\n"
        "print(flip.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(wheel)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(wheel / "flip" / "__init__.py")
