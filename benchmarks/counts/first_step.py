"""Functions and modules from ``flip submit`` to the first step of a tiny run on this machine."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.counts.rows import Row, listed
from flip.files.creation import create_file, output_folder
from flip.runs.rundir import write_text

STEPS = 3
BATCH = 8
SAMPLES = 64
SIDE = 64
LIMIT = 600
"""Seconds for each command. The tracer makes it slow."""
WORDS = ["a", "red", "green", "blue", "small", "large", "square", "circle", "on", "the", "table", "of", "my", "house"]


def rows(root: Path, folder: Path) -> list[Row]:
    """The two rows of this module, of the code below ``root``. ``folder``: empty; for data, run and traces."""
    sweep = prepare(root, folder)
    traces = folder / "traces"
    output_folder(traces)
    python = traced_python(folder / "environment", traces)
    _flip(python, root, "submit", str(sweep), "--cluster", str(folder / "here.yaml"), "--foreground", "--yes")
    (metrics,) = (folder / "runs").glob("*/*/metrics/1.jsonl")
    first = json.loads(metrics.read_text(encoding="utf-8").splitlines()[0])
    calls = set(read_calls(traces, first["time"]))
    functions = [f"{place}:{name}" for place, name in calls if name]
    return [
        listed("functions from flip submit to the first step", functions),
        listed("modules with these functions", [place for place, name in calls if name]),
        listed("modules loaded until the first step", [place for place, _ in calls]),
    ]


def read_calls(traces: Path, until: float) -> Iterator[tuple[str, str]]:
    """(file, function) of each call that the tracer noted until a time; the function is empty for a module."""
    for path in traces.glob("*.calls"):
        for line in path.read_text(encoding="utf-8").splitlines():
            time, place, name = line.split("\t")
            if float(time) <= until:
                yield place, name


def prepare(root: Path, folder: Path) -> Path:
    """Write shards, manifest, tokenizer, profile and sweep; returns the sweep file."""
    write_shards(folder / "shards")
    _flip(sys.executable, root, "shards", "index", str(folder / "shards/*.tar"), "--out", str(folder / "manifest"))
    tokenizer = folder / "tokenizer.json"
    captions = folder / "captions.txt"
    write_text(captions, "\n".join(_caption(i) for i in range(SAMPLES)) + "\n")
    words = ("tokenizer", "train", "--captions", str(captions), "--vocabulary", "200", "--out", str(tokenizer))
    _flip(sys.executable, root, *words)
    profile = {"kind": "local", "runs_root": str(folder / "runs")}
    write_text(folder / "here.yaml", json.dumps(profile))
    settings = {
        "model": {"size": "tiny"},
        "data": {"manifest": str(folder / "manifest"), "tokenizer": str(tokenizer), "workers": 1},
        "stages": [{"name": "pretrain", "samples": STEPS * BATCH, "batch": BATCH, "mask": "0.5"}],
        "compute": {"device": "cpu", "threads": 1},
        "monitor": {"log_every": 1},
    }
    sweep = folder / "first.yaml"
    write_text(sweep, json.dumps({"set": settings, "runs": {"run": {}}}))
    return sweep


def write_shards(folder: Path) -> None:
    """Two shards of images of one colour with captions."""
    output_folder(folder)
    for shard in range(2):
        with create_file(folder / f"{shard}.tar") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for i in range(shard, SAMPLES, 2):
                image = io.BytesIO()
                colour = np.random.default_rng(i).integers(0, 256, 3).tolist()
                Image.new("RGB", (SIDE, SIDE), tuple(colour)).save(image, "JPEG")
                for ending, content in (("jpg", image.getvalue()), ("txt", _caption(i).encode())):
                    member = tarfile.TarInfo(f"{i:04d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def traced_python(folder: Path, traces: Path) -> str:
    """An interpreter with the packages of this one, whose processes all note their calls below ``traces``."""
    venv.create(folder, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    tracer = Path(__file__).with_name("tracer.py").read_text(encoding="utf-8")
    write_text(packages / "counts_tracer.py", tracer)
    lines = [f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})"]
    lines.append(f"import counts_tracer; counts_tracer.start({str(traces)!r})")
    write_text(packages / "counts.pth", "\n".join(lines) + "\n")
    return str(folder / "bin" / "python")


def _caption(i: int) -> str:
    rng = np.random.default_rng(i)
    return " ".join(rng.choice(WORDS, 6).tolist())


def _flip(python: str, root: Path, *words: str) -> None:
    """Run a command of the code below ``root``. Raises RuntimeError with its output if it fails."""
    command = [python, str(root / "jobs"), *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
