"""Tests of packaging: files of the wheel, installed commands, README badges, and names that hide no other module."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from urllib.parse import unquote

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import flip
from flip.common.yaml_io import read_yaml
from tests.synthetic import make_dataset, make_tokenizer

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


# -- wheel and source distribution -----------------------------------------------------------------------------------

FOLDERS = ("flip", "jobs", "sweeps", "tools")


def project_table():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_dependencies_and_extras_together_are_the_requirements():
    lines = [
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    ]
    extras = dict(project_table()["optional-dependencies"])
    (everything,) = map(Requirement, extras.pop("all"))
    assert everything.extras == extras.keys()
    stated = project_table()["dependencies"] + [line for rows in extras.values() for line in rows]
    assert sorted(stated, key=str.lower) == sorted(filter(None, lines), key=str.lower)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that is built, without a network, from the source distribution of a copy of the repository."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, copy)
    for name in (*FOLDERS, "lab"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    build(copy, "build_sdist")
    (source,) = (copy / "dist").glob("flip_toolkit-*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(copy / "unpacked", filter="data")
    (unpacked,) = (copy / "unpacked").iterdir()
    build(unpacked, "build_wheel")
    (built,) = (unpacked / "dist").glob("flip_toolkit-*.whl")
    return built


def build(folder, step):
    script = f"from setuptools import build_meta; build_meta.{step}('dist')"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def distributions(requirements):
    """The installed distributions that these requirements need, directly or not."""
    needed = {}
    waiting = [(Requirement(line), "") for line in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found = importlib.metadata.distribution(name)
        new = name not in needed
        needed[name] = found
        for wanted in [""] * new + sorted(requirement.extras):
            waiting += [(Requirement(line), wanted) for line in found.requires or ()]
    return needed.values()


def environment(folder, wheel, extras=()):
    """Create an environment with the wheel and the packages of its dependencies and ``extras``; return its ``bin``.

    Packages are links into the environment of the tests, so that nothing is fetched."""
    venv.create(folder, with_pip=False)
    (site,) = (folder / "lib").glob("python*/site-packages")
    rows = list(project_table()["dependencies"])
    for extra in extras:
        rows += project_table()["optional-dependencies"][extra]
    for distribution in distributions(rows):
        for top in {path.parts[0] for path in distribution.files if path.parts[0] not in ("..", "__pycache__")}:
            link = site / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    install = [sys.executable, "-m", "pip", "--python", str(folder), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    return folder / "bin"


def run_in(folder, *command, code=0):
    """Run a program in ``folder`` without the variables of Python and FLIP; return its output."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FLIP_"))}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=300, env=inherited
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.long
def test_wheel_holds_every_file_of_its_folders(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    paths = [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    sources = {str(path.relative_to(ROOT)) for path in paths if "__pycache__" not in path.parts}
    assert {"flip/py.typed", "flip/evaluation/datasets/datasets.yaml", "sweeps/model_scaling.yaml"} <= sources
    assert packed == sources


@pytest.fixture(scope="module")
def trained(wheel, tmp_path_factory):
    """An environment with the wheel and the extras, and a folder with data and the run of a sweep."""
    folder = tmp_path_factory.mktemp("trained")
    programs = environment(folder / "environment", wheel, ("train", "s3", "report"))
    make_dataset(folder / "data")
    make_tokenizer(folder / "data" / "tokenizer.json")
    settings = {
        "model": {"size": "tiny"},
        "data": {"manifest": str(folder / "data"), "tokenizer": str(folder / "data/tokenizer.json"), "workers": 1},
        "stages": [{"name": "pretrain", "samples": 16, "batch": 8, "mask": "0.5"}],
        "compute": {"device": "cpu", "threads": 1},
    }
    (folder / "first.yaml").write_text(json.dumps({"set": settings, "runs": {"one": {}}}))
    run_in(folder, programs / "flip", "submit", "first.yaml", "--foreground", "--yes")
    return programs, folder


@pytest.mark.long
def test_commands_of_the_wheel_train_report_and_read_shards(trained):
    """The job ran the code of the installed package, and nothing else of its environment, as a snapshot."""
    programs, folder = trained
    assert "complete" in run_in(folder, programs / "flip", "status", "first")
    assert "one" in run_in(folder, programs / "flip", "report", "first")
    assert "200" in run_in(folder, programs / "flip", "shards", "info", "data")
    assert "model_scaling" in run_in(folder, programs / "flip", "submit", "model-scaling", code=78)
    (code,) = (folder / "runs" / "first" / ".code").glob("[0-9a-f]*")
    assert {path.name for path in code.iterdir()} == set(FOLDERS)


@pytest.mark.long
def test_wheel_without_extras_loads_models_and_names_the_extra_of_a_command(wheel, trained, tmp_path):
    programs, folder = trained
    run_in(folder, programs / "flip", "export", "first/one", "--out", tmp_path / "export")
    library = environment(tmp_path / "environment", wheel)
    script = (
        "import flip, importlib.metadata, PIL.Image, sys\n"
        "assert importlib.metadata.version('flip-toolkit') == flip.__version__\n"
        "for source in sys.argv[1:]:\n"
        "    model = flip.load(source)\n"
        "    assert model.encode_text('an image').shape == model.encode_image(PIL.Image.new('RGB', (40, 30))).shape\n"
        "print(flip.__file__)\n"
    )
    sources = [folder / "runs" / "first" / "one", tmp_path / "export"]
    assert run_in(tmp_path, library / "python", "-c", script, *sources).startswith(str(library.parent))
    text = run_in(tmp_path, library / "flip", "submit", "quickstart", "--dry-run", code=78)
    assert "pip install 'flip-toolkit[all]'" in text


@pytest.mark.long
def test_tools_of_another_package_are_named(wheel, tmp_path):
    """``tools`` is a common name: another distribution may have replaced the folder."""
    programs = environment(tmp_path / "environment", wheel, ("train",))
    (site,) = (programs.parent / "lib").glob("python*/site-packages")
    shutil.rmtree(site / "tools")
    (site / "tools").mkdir()
    text = run_in(tmp_path, programs / "flip", "shards", "info", code=78)
    assert f"{site / 'tools'} is another package" in text and "environment of its own" in text
