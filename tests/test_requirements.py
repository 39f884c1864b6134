"""Tests that the lock files hold every requirement with hashes, in a release within its range."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
UNLOCKED = re.compile(r"^UNLOCKED := (.*)$", re.MULTILINE).search((ROOT / "Makefile").read_text())[1]


def requirements(*names):
    """Return the requirements of these files, except packages whose build depends on the machine."""
    lines = [line.split("#")[0].strip() for name in names for line in (ROOT / name).read_text().splitlines()]
    entries = [Requirement(line) for line in lines if line]
    return [entry for entry in entries if not re.fullmatch(UNLOCKED, entry.name)]


def locked(name):
    """Return package -> its locked releases (one per range of Python versions). Check that each has hashes."""
    releases = {}
    for block in re.split(r"\n(?=[a-z])", (ROOT / name).read_text())[1:]:
        package, version = re.match(r"(\S+)==([^\s;]+)", block).groups()
        assert "--hash=sha256:" in block, f"{name}: {package} has no hash"
        releases.setdefault(canonicalize_name(package), []).append(version)
    return releases


@pytest.mark.parametrize(
    ("lock", "files"),
    [
        ("requirements.lock", ["requirements.txt"]),
        ("requirements-dev.lock", ["requirements.txt", "requirements-dev.txt"]),
        ("requirements-node.lock", ["requirements-node.txt"]),
    ],
)
def test_every_requirement_is_locked(lock, files):
    releases = locked(lock)
    for entry in requirements(*files):
        versions = releases.get(canonicalize_name(entry.name))
        assert versions, f"{entry.name} is not in {lock}: run `make lock`"
        assert all(entry.specifier.contains(version) for version in versions), f"{entry}: run `make lock`"


def test_development_lock_agrees_with_runtime_lock():
    runtime = locked("requirements.lock")
    development = locked("requirements-dev.lock")
    assert {name: development.get(name) for name in runtime} == runtime


@pytest.mark.long
def test_make_install_with_unlock_updates_an_existing_environment(tmp_path):
    names = ["Makefile", "pyproject.toml", *(path.name for path in ROOT.glob("requirements*"))]
    for name in names:
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in (".ready", ".dev", ".kernel", "flip"):
        (tmp_path / ".venv" / "bin" / name).touch()

    def make(*arguments):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        command = ["make", "-n", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    assert "pip install" not in make("dev") + make("install")
    for target in ("install", "dev"):
        text = make(target, "UNLOCK=1")
        assert "--upgrade -r requirements.txt" in text and ".lock" not in text


@pytest.mark.parametrize("index", ["", "https://mirror.example/cpu"])
def test_build_of_torch_is_the_choice_of_the_user(index):
    """Both sizes are shown before the download, and only TORCH_INDEX decides."""
    command = ["make", "-n", "-W", "requirements.txt", ".venv/bin/.ready", "PYTHON=python3", f"TORCH_INDEX={index}"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    (announced,) = [i for i, line in enumerate(lines) if "5.9 GB" in line and "0.7 GB" in line]
    installs = [i for i, line in enumerate(lines) if "pip install" in line]
    assert announced < min(installs)
    chosen = [line for line in lines if "--index-url" in line]
    assert len(chosen) == (1 if index else 0) and all(f"--index-url {index} " in line for line in chosen)
