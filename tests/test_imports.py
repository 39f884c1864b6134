"""Arrows between rooms point down only, and no command but the worker waits for torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("flip", "jobs", "tools")
HEAVY = ("torch", "torchvision", "timm")
#: What host and launcher share: no torch.
LIGHT = (
    "flip.config",
    "flip.flops",
    "flip.runs.rundir",
    "flip.runs.commit",
    "flip.runs.errors",
    "flip.monitoring.results",
    "flip.distributed.shutdown",
)
LIGHT += ("flip.costs", "flip.accelerators", "flip.runs.pins", "flip.training.warm_start", "flip.export.format")
LIGHT += ("flip.evaluation.datasets", "flip.evaluation.forms", "flip.evaluation.prompts", "flip.evaluation.task")
LIGHT += ("flip.evaluation.open_clip_folder",)
#: What loader processes and the tools for shards load.
LIGHT += tuple(
    f"flip.data.{name}" for name in ("stream", "pool", "index", "verify", "look", "compare", "bench", "filters")
)


def modules():
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imports(path, everywhere=True):
    """Names that a file imports; with everywhere=False only those of its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def under(name, *rooms):
    return any(name == room or name.startswith(room + ".") for room in rooms)


@pytest.mark.parametrize("name, path", modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_arrows_point_down(name, path):
    found = set(imports(path))
    if under(name, "flip"):
        assert not [x for x in found if under(x, "jobs", "tools", "tests", "benchmarks")]
    if under(name, "flip.data"):
        assert not [
            x
            for x in found
            if under(
                x, "flip.models.clip", "flip.training.trainer", "flip.training.optimizer", "flip.distributed.parallel"
            )
        ]
    if under(name, "flip.models.clip"):
        assert not [
            x for x in found if under(x, "flip.data.loader", "flip.data.storage.client", "flip.data.manifest.manifest")
        ]
    if name == "jobs.runtime.worker":
        return
    if under(name, "jobs"):
        assert not [x for x in found if under(x, "flip.training.trainer", "tools", *HEAVY)]


#: Packages of jobs/: each imports only what stands behind it.
ORDER = ("", "submission", "reporting", "planning", "runs", "slurm", "local", "runtime", "sweeps", "common", "host")
#: Those that do not import each other.
APART = ({"submission", "reporting"}, {"slurm", "local", "runtime"}, {"common", "host"})


def package(name):
    """The package of jobs/ that a module is in; empty: a command."""
    part = name.split(".")[1:2]
    return part[0] if part and part[0] in ORDER else ""


@pytest.mark.parametrize(
    "name, path", [item for item in modules() if under(item[0], "jobs")], ids=lambda v: str(v)[:40]
)
def test_packages_of_jobs_have_an_order(name, path):
    own, found = package(name), {n for n, _ in modules()} & set(imports(path)) - {"jobs"}
    for other in {package(n) for n in found if under(n, "jobs")} - {own}:
        assert ORDER.index(own) < ORDER.index(other), f"{name} imports jobs.{other}"
        assert not any({own, other} <= apart for apart in APART), f"{name} imports jobs.{other}"
    if own == "host":
        assert all(under(n, "jobs.host", "flip.runs") for n in found)


ALONE = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
    if set(sys.argv[1].split()) & sys.modules.keys():
        sys.exit(f"{name} waits for torch")
    for module in [module for module in sys.modules if module.split(".")[0] in ("flip", "jobs")]:
        del sys.modules[module]  # the next one imports what it needs itself
"""


def test_no_torch():
    """Each by itself, in one process: to start one for each takes a minute."""
    names = [n for n, _ in modules() if under(n, *LIGHT) or (under(n, "jobs") and n != "jobs.runtime.worker")]
    assert len(names) > 80
    done = subprocess.run(
        [sys.executable, "-c", ALONE, " ".join(HEAVY), *names], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_packages_import_nothing(room):
    for path in (ROOT / room).rglob("__init__.py"):
        assert not list(imports(path, everywhere=False))
