"""Commands whose output somebody reads only the beginning of: ``python jobs/status.py | head -1``.

Imported before arguments are parsed, so it must cost nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable

CUT_OFF = 141
"""Exit code: what a shell says of a program that SIGPIPE ended. Not that signal: a lost connection sends it too."""


def quietly(main: Callable[[], int]) -> int:
    """``main()``, its output written out; 141, without a word, where the reader has gone."""
    try:
        try:
            return main()
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for handle in (1, 2):  # what is left for them would complain at the interpreter's end
            os.dup2(nowhere, handle)
        return CUT_OFF
