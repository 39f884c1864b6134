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
LIGHT += ("flip.data.worker", "flip.data.worker_pool", "flip.data.manifest", "tools.shards_commands")


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
