"""The process of a program of the user: its start, its output and its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from flip.files.creation import read_regular
from flip.runs.restart_policy import HARDWARE, PORT_TAKEN
from jobs.host import processes

TAIL = 400
"""Lines of each stream among which the error of a program is looked for."""
LONGEST_LINE = 1 << 16
"""Bytes after which a line is cut for readers; the log gets all."""
DRAIN_SECONDS = 5.0
"""For the rest of the output, and for processes that a program leaves behind to end by themselves."""
START = Path(__file__).with_name("program_start.py")
_NAMED_ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Failure)\b", re.ASCII)
_ERROR = re.compile(r"error|fatal|exception|assert", re.IGNORECASE)


class Program:
    """A running program. ``on_line``: gets each line of its output, also of standard error, on two threads."""

    def __init__(
        self,
        words: Sequence[str],
        environ: Mapping[str, str],
        folder: Path,
        stop_signal: str,
        on_line: Callable[[str], None] = lambda line: None,
    ) -> None:
        processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)  # what it leaves behind becomes a child of this process
        self.active_at = time.monotonic()
        """When it has last printed something."""
        self._stop_signal = signal.Signals[f"SIG{stop_signal}"]
        self._others = set(_children())
        self._tails = [deque[str](maxlen=TAIL), deque[str](maxlen=TAIL)]
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(START), stop_signal, str(os.getpid()), *words],
            cwd=folder,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        streams = ((self._process.stdout, 1), (self._process.stderr, 2))
        self._readers = [
            threading.Thread(target=self._copy, args=(stream.fileno(), target, on_line), daemon=True)
            for stream, target in streams
        ]
        for reader in self._readers:
            reader.start()

    def wait(self, seconds: float) -> int | None:
        """Its exit code, negative if a signal has killed it; None if it still runs after these seconds."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def request_stop(self) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(self._stop_signal)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self, patience: float = DRAIN_SECONDS) -> list[str]:
        """Read the rest of the output of a program that has ended, and kill what it leaves behind.

        Returns the names of processes that were still at work after ``patience`` seconds.
        """
        until = time.monotonic() + patience
        left = self._left()
        while left and time.monotonic() < until:
            time.sleep(0.05)
            left = self._left()
        names = [" ".join(processes.arguments(pid))[:80] or str(pid) for pid in left]
        for _ in range(100):  # the children of a killed process become those of this one
            if not left:
                break
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
            left = self._left()
        for reader in self._readers:
            reader.join(DRAIN_SECONDS)
        return names

    def _left(self) -> list[int]:
        """Children of this process that it did not have before the program."""
        return [pid for pid in _children() if pid not in self._others]

    def error(self, record: Path) -> str:
        """Its error: the message in ``record``, TORCHELASTIC_ERROR_FILE, or the last line of output that names one."""
        message = _recorded(record)
        if message:
            return message
        lines = [line for tail in self._tails for line in list(tail) if line.strip()]
        for pattern in (HARDWARE, PORT_TAKEN, _NAMED_ERROR, _ERROR):
            matching = [line for line in lines if pattern.search(line.strip())]
            if matching:
                return matching[-1].strip()
        return ""

    def _copy(self, source: int, target: int, read: Callable[[str], None]) -> None:
        """Copy a stream to the log of this rank, whatever its bytes, and hand its lines to ``read``."""
        tail = self._tails[target - 1]
        rest = b""
        while True:
            data = os.read(source, 1 << 16)
            if not data:
                break
            self.active_at = time.monotonic()
            with suppress(OSError):  # a full disk must not stop the program
                _write_all(target, data)
            *lines, rest = (rest + data).replace(b"\r", b"\n").split(b"\n")
            rest = rest[-LONGEST_LINE:]
            for line in lines:
                text = line[-LONGEST_LINE:].decode("utf-8", "replace")
                tail.append(text)
                read(text)
        if rest:
            text = rest.decode("utf-8", "replace")
            tail.append(text)
            read(text)


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _children() -> list[int]:
    """Living children of this process; ended ones are reaped."""
    own = str(os.getpid())
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else []:
        if not name.isdigit():
            continue
        fields = processes.read_stat(int(name))[1]
        if len(fields) < 2 or fields[1] != own:
            continue
        if processes.has_ended(fields):
            with suppress(ChildProcessError):
                os.waitpid(int(name), os.WNOHANG)
        else:
            found.append(int(name))
    return found


def _recorded(path: Path) -> str:
    """The message that ``torch.distributed.elastic`` or a program wrote; empty if there is none."""
    try:
        value = json.loads(read_regular(path).decode("utf-8"))
    except (OSError, ValueError):
        return ""
    for _ in range(2):  # {"message": {"message": TEXT, "extraInfo": {...}}}
        if isinstance(value, dict):
            value = value.get("message")
    if isinstance(value, str):
        return " ".join(value.split())
    return ""
