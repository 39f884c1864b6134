"""Tests of a command with a limit: it leaves no process, and its end is told by a status and one line."""

import os
import sys

import pytest

from jobs.host.processes import has_ended, read_stat
from jobs.measuring.limited import run_limited
from jobs.planning.measurement import FAILED, MEASURED, OUT_OF_MEMORY, TIME_LIMIT
from tests.harness.common import wait_until

SLEEP = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
SLEEP += "open(sys.argv[1], 'w').write(str(p.pid)); time.sleep(60)"


def python(*words, limit=30.0):
    return run_limited([sys.executable, "-c", *words], limit, os.environ)


def test_output_of_a_successful_command():
    ended = python("import sys; print('[1]'); print('a warning', file=sys.stderr)")
    assert (ended.status, ended.output.strip(), ended.detail) == (MEASURED, "[1]", "")


@pytest.mark.parametrize(
    ("code", "status", "detail"),
    [
        ("raise SystemExit('no peer')", FAILED, "no peer"),
        ("import os; os._exit(3)", FAILED, "it ended with code 3"),
        ("print(1 / 0)", FAILED, "ZeroDivisionError: division by zero"),
        ("import sys; print('no time was left', file=sys.stderr); sys.exit(124)", TIME_LIMIT, "no time was left"),
        ("raise MemoryError('of a GPU')", OUT_OF_MEMORY, "MemoryError: of a GPU"),
    ],
)
def test_failure_has_status_and_last_line(code, status, detail):
    ended = python(code)
    assert (ended.status, ended.detail, ended.output) == (status, detail, "")


@pytest.mark.long
def test_time_limit_ends_all_processes(tmp_path):
    file = tmp_path / "pid"
    limit = 2.0
    while not file.exists() or not file.read_text():  # a busy machine starts processes late
        limit *= 2
        assert python(SLEEP, str(file), limit=limit).status == TIME_LIMIT
    pid = int(file.read_text())
    wait_until(lambda: has_ended(read_stat(pid)[1]), "the end of the grandchild")
