"""Notes the functions that a Python process calls, each at its first call.

``first_step`` copies this file into an environment of its own. Every interpreter of that environment imports it at its
start, and its forks continue it: launcher, supervisor, agent, ranks and loaders. A line per function: time, file below
the root of the code, name. Standard library only.
"""

import os
import sys
import threading
import time

PACKAGES = ("flip", "jobs", "tools")
OPTIMIZED = 1  # of the flags of a code object: it is a function

_noted = set()


def start(folder: str) -> None:
    """Note calls of this process and its forks in files below ``folder``."""

    def note(frame, event, _):
        if event != "call" or frame.f_code in _noted:
            return
        code = frame.f_code
        _noted.add(code)
        place = _place(code.co_filename)
        if not place:
            return
        if code.co_name == "<module>":
            name = ""
        elif code.co_flags & OPTIMIZED and not code.co_name.startswith("<"):
            name = code.co_qualname
        else:
            return  # the body of a class, a lambda or a comprehension
        line = f"{time.time():.4f}\t{place}\t{name}\n"
        file = os.open(os.path.join(folder, f"{os.getpid()}.calls"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(file, line.encode())
        os.close(file)

    threading.setprofile(note)
    sys.setprofile(note)


def _place(path: str) -> str:
    """The path of a module of the product below its root, which may be a snapshot; empty for other code."""
    if "/site-packages/" in path or not path.endswith(".py"):
        return ""
    parts = path.split("/")
    for name in PACKAGES:
        if name in parts:
            root = "/".join(parts[: parts.index(name)])
            if os.path.exists(f"{root}/jobs/worker.py"):
                return "/".join(parts[parts.index(name) :])
    return ""
