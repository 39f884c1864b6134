"""A simulated clock that advances only when all processes wait: a year passes in seconds.

Product code runs unchanged, as a coroutine (``Process``). ``Clock.module`` replaces its module ``time``: a call of
sleep lets all other processes run until the clock has reached the end of the wait.
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

SHORTEST = 1e-3
"""Seconds of a wait."""
EPOCH = 1_700_000_000.0
"""What the clock shows at 0, in seconds since 1970."""


class Clock:
    def __init__(self):
        self.now = 0.0
        self.current = None
        """The process that runs at this moment."""
        self._events = []
        self._order = itertools.count()
        self.module = SimpleNamespace(
            time=lambda: EPOCH + self.now, monotonic=lambda: self.now, sleep=self.sleep, strftime=None
        )

    def at(self, delay, do, *arguments):
        """Call ``do`` after ``delay`` seconds; returns the event, for ``cancel``."""
        event = [self.now + max(0.0, delay), next(self._order), do, arguments]
        heapq.heappush(self._events, event)
        return event

    @staticmethod
    def cancel(event):
        if event is not None:
            event[2] = None

    def run(self, until, enough=lambda: False):
        """Advance the clock to ``until``, or until ``enough()`` is true."""
        while self._events and self._events[0][0] <= until and not enough():
            self.now, _, do, arguments = heapq.heappop(self._events)
            if do is not None:
                do(*arguments)
        if not enough():
            self.now = max(self.now, until)

    def sleep(self, seconds):
        """As time.sleep. Only a process may call it."""
        assert self.current is not None, "only processes may sleep"
        self.current.wait(seconds)


class Process:
    """Calls ``do()`` with its own environment, standard output and standard error, then ``over(code, output)``.

    An uncaught exception gives code 1, as in a real process. ``skin`` is a context manager for the code between two
    waits, such as an unavailable file system.
    """

    def __init__(self, clock, do, environ, over, skin=contextlib.nullcontext, about=None):
        self._clock = clock
        self._do = do
        self._over = over
        self._skin = skin
        self.environ = dict(environ)
        self.out = io.StringIO()
        self.err = io.StringIO()
        self.about = about
        """Whatever its maker wants to know of it later."""
        self._code = 1
        self._dozes = False
        self._greenlet = greenlet(self._body)
        if clock.current is not None:  # a wait goes back to the clock, not to the process that has started this one
            self._greenlet.parent = clock.current._greenlet.parent
        self._event = clock.at(0.0, self._go)

    def kill(self):
        """End the process at once, as by SIGKILL."""
        self._clock.cancel(self._event)
        self._over = None
        if self._greenlet is not getcurrent():
            self._greenlet.throw(GreenletExit)

    @property
    def alive(self):
        return self._over is not None

    def wait(self, seconds):
        self._event = self._clock.at(seconds, self._go)
        self._greenlet.parent.switch()

    def wake(self):
        """End the wait of the process now."""
        self._clock.cancel(self._event)
        self._event = self._clock.at(0.0, self._go)

    def doze(self, seconds):
        """``wait`` that ``look_up`` ends. It takes time: after a year, a float can no longer hold a nanosecond."""
        self._dozes = True
        self.wait(max(seconds, SHORTEST))
        self._dozes = False

    def look_up(self):
        """End ``doze`` now, if the process is in it."""
        if self._dozes:
            self.wake()

    def _body(self):
        try:
            self._code = self._do() or 0
        except SystemExit as error:
            if isinstance(error.code, int):
                self._code = error.code
            else:
                self._code = 1
        except Exception:  # any uncaught exception ends the interpreter
            traceback.print_exc(file=self.err)

    def _go(self, error=None):
        clock = self._clock
        before = os.environ, sys.stdout, sys.stderr
        os.environ, sys.stdout, sys.stderr, clock.current = self.environ, self.out, self.err, self  # type: ignore
        try:
            with self._skin():
                self._greenlet.throw(error) if error else self._greenlet.switch()
        finally:
            os.environ, sys.stdout, sys.stderr = before
            clock.current = None
        if self._greenlet.dead and self._over is not None:
            over = self._over
            self._over = None
            over(self._code, self.out.getvalue())
