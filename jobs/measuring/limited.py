"""Runs a command that measures: in a process group of its own, with a time limit, and with its error in one line."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jobs.planning.measurement import FAILED, MEASURED, OUT_OF_MEMORY, TIME_LIMIT

MEMORY_ERRORS = re.compile(r"OutOfMemoryError|MemoryError|can't allocate memory|CUDA error: out of memory")
TIMED_OUT = 124
"""Exit code of a command that has ended itself at its own limit, as of timeout(1)."""
POLL_SECONDS = 0.5
"""Seconds between two looks at ``stopped``."""
LONGEST_DETAIL = 300
"""Characters of an error that are kept."""


class MeasurementStopped(Exception):
    """The job was asked to stop; what the command started has been ended."""


@dataclass(frozen=True)
class LimitedResult:
    """How a command ended. ``output``: its standard output if it was successful. ``detail``: its last error."""

    status: str
    output: str
    detail: str
    seconds: float


def run_limited(
    command: Sequence[str],
    limit: float,
    environment: Mapping[str, str],
    stopped: Callable[[], bool] = lambda: False,
) -> LimitedResult:
    """Run a command for at most ``limit`` seconds, and end everything that it started.

    Raises MeasurementStopped once ``stopped`` returns True.
    """
    start_time = time.monotonic()
    output = ""
    process = subprocess.Popen(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, errors = _communicate(process, start_time + limit, stopped)
        if process.returncode == 0:
            status = MEASURED
            errors = ""
        elif process.returncode == TIMED_OUT:
            status = TIME_LIMIT
        elif MEMORY_ERRORS.search(errors):
            status = OUT_OF_MEMORY
        else:
            status = FAILED
            errors = errors or f"it ended with code {process.returncode}"
    except subprocess.TimeoutExpired:
        status = TIME_LIMIT
        errors = ""
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the command started, and on an interruption itself
        process.wait()
    return LimitedResult(status, output, _last_error(errors), round(time.monotonic() - start_time, 1))


def _communicate(process: subprocess.Popen[str], end: float, stopped: Callable[[], bool]) -> tuple[str, str]:
    """Output and errors of a process. Raises TimeoutExpired after ``end``, MeasurementStopped if it must stop."""
    while True:
        left = end - time.monotonic()
        try:
            return process.communicate(timeout=min(POLL_SECONDS, max(0.0, left)))
        except subprocess.TimeoutExpired:
            if stopped():
                raise MeasurementStopped from None
            if left <= POLL_SECONDS:
                raise


def _last_error(errors: str) -> str:
    lines = errors.strip().splitlines()
    lines = [line for line in lines if MEMORY_ERRORS.search(line)] or lines
    if not lines:
        return ""
    return lines[-1][:LONGEST_DETAIL]
