"""How every command ends where it cannot go on: its reader has gone (``python jobs/status.py | head -1``), or a package
that it needs is missing (the wrong Python).

Imported before arguments are parsed, so it must cost nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

CUT_OFF = 141
"""Exit code: what a shell says of a program that SIGPIPE ended. Not that signal: a lost connection sends it too."""


def add_root_option(parser: argparse.ArgumentParser) -> None:
    """Add --root, whose value ``jobs.profile.roots`` takes."""
    parser.add_argument(
        "--root", help="where run directories live; default: FLIP_RUNS, else ./runs, then the runs_root of each profile"
    )


def quietly(main: Callable[[], int]) -> int:
    """``main()``, its output written out; 141 and no word where the reader has gone; 78 where a package is missing."""
    try:
        try:
            return main()
        finally:
            print(end="", flush=True)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("flip", "jobs", "tools"):
            raise
        remedy = "Run `make install`, then `source .venv/bin/activate`."
        print(f"{error.name} is not installed for this Python ({sys.executable}). {remedy}", file=sys.stderr)
        return 78
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for handle in (1, 2):  # what is left for them would complain at the interpreter's end
            os.dup2(nowhere, handle)
        return CUT_OFF
