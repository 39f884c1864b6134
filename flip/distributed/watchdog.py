"""Ends a process that makes no progress: what it waits for may never come, and nobody else can tell."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from flip.runs.errors import HANG

LONG = 6.0
"""How many times longer than a step the long parts may take: starting, and a commit, which one rank hashes alone."""


class Watchdog:
    """Where no ``beat`` comes for ``seconds``, at first for ``LONG`` times as many, the stacks of all threads go to
    stderr, ``tell`` is called with what happened, and the process ends with 71. ``seconds`` 0: it never does.

    A thread that holds the interpreter's lock for good stops this one too; the ranks that wait for it end then.
    """

    def __init__(self, seconds: float, tell: Callable[[str], None]) -> None:
        self._seconds, self._tell, self._over = seconds, tell, threading.Event()
        self.beat("starting", LONG)
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, what: str, times: float = 1.0) -> None:
        """There is progress; ``what`` comes next and may take ``times`` the seconds."""
        self._expected = what, times * self._seconds, time.monotonic()

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 10)):
            what, allowed, since = self._expected
            waited = time.monotonic() - since
            if waited > allowed:
                break
        else:
            return
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        try:
            self._tell(f"no progress for {waited:.0f} s: {what}; the stacks are in the log")
        finally:
            os._exit(HANG)
