"""A clock that only moves when nothing is left to do, and code that blocks on it: a year passes in seconds.

Real code runs here as it is. It runs as a coroutine (``Process``), and what it takes for the module ``time`` is
``Clock.module``: a call of sleep lets all others go on until the clock has come that far.
"""

from __future__ import annotations

import contextlib
import heapq
import io
import itertools
import os
import sys
import traceback
from types import SimpleNamespace

from greenlet import GreenletExit, getcurrent, greenlet

EPOCH = 1_700_000_000.0
"""What the clock shows at 0, in seconds since 1970."""


class Clock:
    def __init__(self):
        self.now = 0.0
        self.current = None
        """The process that runs at this moment."""
        self._events, self._order = [], itertools.count()
        self.module = SimpleNamespace(
            time=lambda: EPOCH + self.now, monotonic=lambda: self.now, sleep=self.sleep, strftime=None
        )

    def at(self, delay, do, *arguments):
        """Call ``do`` after so many seconds; returns what ``cancel`` takes."""
        event = [self.now + max(0.0, delay), next(self._order), do, arguments]
        heapq.heappush(self._events, event)
        return event

    @staticmethod
    def cancel(event):
        if event is not None:
            event[2] = None

    def run(self, until, enough=lambda: False):
        """Let time pass up to ``until``, or until ``enough``."""
        while self._events and self._events[0][0] <= until and not enough():
            self.now, _, do, arguments = heapq.heappop(self._events)
            if do is not None:
                do(*arguments)
        if not enough():
            self.now = max(self.now, until)

    def sleep(self, seconds):
        """As time.sleep, for a process; nothing else may wait."""
        assert self.current is not None, "only processes wait"
        self.current.wait(seconds)


class Process:
    """``do()`` with an environment, standard output and standard error of its own; then ``over(code, output)``.

    An uncaught exception is code 1, as in a real one. ``skin``: a context in which each stretch between two
    waits runs, such as a file system that is away.
    """

    def __init__(self, clock, do, environ, over, skin=contextlib.nullcontext, about=None):
        self._clock, self._do, self._over, self._skin = clock, do, over, skin
        self.environ, self.out, self.err = dict(environ), io.StringIO(), io.StringIO()
        self.about = about
        """Whatever its maker wants to know of it later."""
        self._code = 1
        self._greenlet = greenlet(self._body)
        self._event = clock.at(0.0, self._go)

    def kill(self):
        """As by SIGKILL: nothing more of it is done."""
        self._clock.cancel(self._event)
        self._over = None
        if self._greenlet is not getcurrent():
            self._greenlet.throw(GreenletExit)

    def interrupt(self, error):
        """Raise ``error`` where it waits, as a signal's handler does."""
        self._clock.cancel(self._event)
        self._event = self._clock.at(0.0, self._go, error)

    @property
    def alive(self):
        return self._over is not None

    def wait(self, seconds):
        self._event = self._clock.at(seconds, self._go)
        self._greenlet.parent.switch()

    def wake(self):
        """Its wait is over now."""
        self._clock.cancel(self._event)
        self._event = self._clock.at(0.0, self._go)

    def _body(self):
        try:
            self._code = self._do() or 0
        except SystemExit as error:
            self._code = error.code if isinstance(error.code, int) else 1
        except Exception:  # whatever it is, an interpreter would end with it
            traceback.print_exc(file=self.err)

    def _go(self, error=None):
        clock, before = self._clock, (os.environ, sys.stdout, sys.stderr)
        os.environ, sys.stdout, sys.stderr, clock.current = self.environ, self.out, self.err, self  # type: ignore
        try:
            with self._skin():
                self._greenlet.throw(error) if error else self._greenlet.switch()
        finally:
            (os.environ, sys.stdout, sys.stderr), clock.current = before, None
        if self._greenlet.dead and self._over is not None:
            over, self._over = self._over, None
            over(self._code, self.out.getvalue())
