"""Tests of the package: wheels that are built with and without a C compiler run the example of the README."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from pictures import picture

KERNEL = Path(__file__).resolve().parents[1]
EXAMPLE = re.search(r"```python\n(.*?)```", (KERNEL / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]


def run(arguments: list[str], folder: Path, **variables: str) -> str:
    done = subprocess.run(arguments, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def unpacked_wheel(folder: Path, **variables: str) -> Path:
    """The folder of a wheel's content."""
    names = shutil.ignore_patterns("build", "*.egg-info", "*.so")
    source = shutil.copytree(KERNEL, folder / "source", ignore=names)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder / "wheels")]
    run([sys.executable, "-m", "pip", "wheel", *options, str(source)], folder, **variables)
    (wheel,) = (folder / "wheels").iterdir()
    assert "-py3-none-" in wheel.name, "one wheel for every Python"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def call_example(folder: Path, package: Path) -> str:
    pixels = picture(np.random.default_rng(4), 90, 70)
    (folder / "photo.jpg").write_bytes(simplejpeg.encode_jpeg(pixels, 90))
    where = "\nprint(visible_jpeg.__file__)"
    result, file = run([sys.executable, "-c", EXAMPLE + where], folder, PYTHONPATH=str(package)).splitlines()
    assert Path(file).is_relative_to(package)
    return result


@pytest.mark.long
def test_wheel_runs_the_example_of_the_readme(kernel, tmp_path):
    assert len(EXAMPLE.splitlines()) <= 8
    assert call_example(tmp_path, unpacked_wheel(tmp_path)) == "(98, 768)"


@pytest.mark.long
def test_wheel_that_was_built_without_compiler_says_so(tmp_path):
    package = unpacked_wheel(tmp_path, CC=str(tmp_path / "missing"))
    assert call_example(tmp_path, package) == "the package was built without a C compiler"
