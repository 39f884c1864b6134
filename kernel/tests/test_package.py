"""Tests of the package: wheels that are built with and without a C compiler run the example of the README, and a
library that cannot be used is no error."""

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
from images import draw_image

KERNEL = Path(__file__).resolve().parents[1]
EXAMPLE = re.search(r"```python\n(.*?)```", (KERNEL / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
HEADER = (KERNEL / "src" / "visible_jpeg.h").read_text(encoding="utf-8")
FUNCTIONS = sorted(re.findall(r"^VJ_API .*?(vj_\w+)\(", HEADER, re.MULTILINE))


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
    pixels = draw_image(np.random.default_rng(4), 90, 70)
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


def answer_with_stub(folder: Path, functions: list[str]) -> str:
    """What ``python -m visible_jpeg`` prints with a library of these functions, which all return 0."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    package = shutil.copytree(KERNEL / "visible_jpeg", folder / "visible_jpeg", ignore=shutil.ignore_patterns("*.so"))
    (folder / "stub.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in functions))
    run([compiler, "-shared", "-fPIC", "stub.c", "-o", str(package / "_library.so")], folder)
    return run([sys.executable, "-m", "visible_jpeg"], folder, PYTHONPATH=str(folder)).strip()


@pytest.mark.parametrize("missing", FUNCTIONS)
def test_library_that_lacks_a_function_is_a_reason_and_no_error(missing, tmp_path):
    answer = answer_with_stub(tmp_path, [name for name in FUNCTIONS if name != missing])
    assert answer.startswith("kernel: no, because the library cannot be loaded: ")
    assert answer.endswith(f"undefined symbol: {missing}")


def test_stub_with_all_functions_is_loaded(tmp_path):
    assert answer_with_stub(tmp_path, FUNCTIONS) == "kernel: no, because the processor has no AVX2"
