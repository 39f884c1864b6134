"""A process in which a node agent checks something, with a limit of its own: ``start``, and ``CheckProcess``.

It leads a session of its own and writes a line of JSON per result to a pipe (``write_row``). GPUs and threads are used
there alone, because the agent forks ranks.
"""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from flip.common.shutdown import SIGNALS
from flip.runs.checks import UNKNOWN, Check, check_of
from jobs.host import sessions

END = {"name": "end"}
"""The last line. A process with a thread that waits for a disk cannot end, so its end is no sign."""


class CheckProcess:
    """A process that checks this node. ``poll`` it until it returns True, then read ``results``, and ``close``.

    ``name``: of the check that is not known if the process ends early, or has no answer after ``seconds``.
    """

    def __init__(self, pid: int, output: int, name: str, seconds: float) -> None:
        self.pid = pid
        self.output = output
        """Descriptor that becomes readable with each result."""
        self.results: list[Check] = []
        self._start = sessions.start_time(pid)
        self._name = name
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._text = b""
        self._ended = False

    def poll(self) -> bool:
        """Read what there is. Whether the check is over: all results are there, or the time is."""
        is_closed = self._read()
        *lines, self._text = self._text.split(b"\n")
        for row in map(json.loads, lines):
            if row == END:
                self._ended = True
            else:
                self.results.append(check_of(row))
        if self._ended:
            return True
        if is_closed:
            self._end("its process ended early")
        elif time.monotonic() >= self._deadline:
            self._end(f"no answer in {self._seconds:g} s")
        return self._ended

    def _read(self) -> bool:
        """Read what there is; returns whether no more will come."""
        try:
            while part := os.read(self.output, 1 << 16):
                self._text += part
        except BlockingIOError:
            return False
        return True

    def rows(self) -> dict[str, dict[str, Any]]:
        """Name of each check -> its row as plain data, which ``flip.runs.checks.check_of`` reads."""
        return {row.name: row.as_json() for row in self.results}

    def close(self) -> None:
        """End the process and its children. It may stay until a disk answers, without being waited for."""
        os.close(self.output)
        sessions.kill_session(self.pid, self._start)
        try:
            os.kill(self.pid, signal.SIGKILL)  # it may not have opened its session yet
            os.waitpid(self.pid, os.WNOHANG)
        except (ProcessLookupError, ChildProcessError):
            pass

    def _end(self, evidence: str) -> None:
        """Without its process nothing is known of this node."""
        self._ended = True
        self.results.append(Check(UNKNOWN, evidence, name=self._name))


def start(work: Callable[[int], object], name: str, seconds: float) -> CheckProcess:
    """Call ``work`` in a forked process, with the descriptor for its results. Raises OSError."""
    output, inner = os.pipe()
    os.set_blocking(output, False)
    try:
        pid = os.fork()
        if pid == 0:
            _become_check(work, inner)
    except OSError:
        os.close(output)
        raise
    finally:
        os.close(inner)
    return CheckProcess(pid, output, name, seconds)


def write_row(output: int, row: dict[str, Any]) -> None:
    """A single write, past the buffers of files, which a forked process has of its parent."""
    os.write(output, (json.dumps(row) + "\n").encode())


def _become_check(work: Callable[[int], object], output: int) -> NoReturn:
    """In the child: leave all that belongs to the parent, and check. Libraries may print, so that standard output leads
    to the log."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (*SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(2, 1)
        os.closerange(3, output)
        os.closerange(output + 1, os.sysconf("SC_OPEN_MAX"))
        work(output)
        code = 0
    except BaseException:  # whatever happens here must not continue as a second parent
        traceback.print_exc()
    finally:
        os._exit(code)
