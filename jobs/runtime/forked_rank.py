"""What a process needs to become a rank by a fork: ``preloads`` and ``why_unsafe_to_fork`` before, ``execute`` after.

Nothing here knows of attempts and their coordinator (``jobs/runtime/node_agent.py``).
"""

import contextlib
import importlib
import os
import runpy
import sys
import types
from collections.abc import Sequence
from pathlib import Path


def preloads(module: str) -> Sequence[str]:
    """The modules that ranks import, as the one that they execute names them."""
    names: Sequence[str] = getattr(importlib.import_module(module), "PRELOAD", ())
    sys.modules.pop(module)  # it is executed as the main program, not imported
    return names


def why_unsafe_to_fork(process: Path = Path("/proc/self")) -> str:
    """Why this process must not be forked; empty if it may. ``process``: its folder in /proc."""
    if not (process / "task").exists():
        return "this system has no /proc"
    threads = len(os.listdir(process / "task"))
    if threads > 1:
        return f"the agent has {threads} threads"
    for name in os.listdir(process / "fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            if os.readlink(process / "fd" / name).startswith("/dev/nvidia"):
                return "the agent has opened a GPU"
    return ""


def execute(module: str, path: str) -> int:
    """Run a module as the main program of this process; returns its exit code.

    ``__main__`` is an empty module: multiprocessing imports the main module in loader processes, and that of this
    process is the agent.
    """
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = [module, path]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    return 0
