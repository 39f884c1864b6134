"""The process of a program: daemons, output of any bytes, its error, and its signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jobs.host import processes
from jobs.runtime.program import Program
from tests.harness.common import wait_until

DAEMON = """
import os, sys, time
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
os.execvp("sleep", ["sleep", "600"])
"""
SIGNALS = """
import signal, sys, time
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append("TERM"))
print(*(signal.getsignal(each) is signal.SIG_IGN for each in (signal.SIGUSR1, signal.SIGUSR2)), flush=True)
while not got:
    time.sleep(0.01)
sys.exit(75)
"""


@pytest.fixture
def start(tmp_path):
    started = []

    def start(text, **options):
        lines = []
        words = [sys.executable, "-c", text]
        started.append(Program(words, os.environ, tmp_path, options.get("stop", "TERM"), lines.append))
        return started[-1], lines

    yield start
    for program in started:
        program.kill()


def test_daemon_is_named_and_killed(start):
    other = subprocess.Popen(["sleep", "601"])
    try:
        program, _ = start(DAEMON)
        assert program.wait(30) == 0
        assert program.close(patience=0.5) == ["sleep 600"]
        assert other.poll() is None, "a child that is older than the program is not its own"
    finally:
        other.kill()
        other.wait()
    assert not [pid for pid in children() if processes.arguments(pid) == ["sleep", "600"]]


def children():
    numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in numbers if processes.read_stat(pid)[1][1:2] == [str(os.getpid())]]


def test_one_signal_asks_to_stop_and_others_are_ignored(start):
    program, lines = start(SIGNALS)
    wait_until(lambda: lines, "its first line", 30)
    assert lines == ["True True"]
    program.request_stop()
    assert program.wait(30) == 75


def test_bytes_that_are_no_text_stop_nothing(start, capfd):
    program, lines = start("import sys; sys.stdout.buffer.write(bytes(range(256)) * 999 + b'\\nlast')")
    assert program.wait(30) == 0
    assert program.close() == [] and lines[-1] == "last"
    assert len(capfd.readouterr().out) > 100_000


def test_lines_of_standard_error_are_read_too(start):
    """Python's logging writes there."""
    program, lines = start("import logging; logging.basicConfig(level='INFO'); logging.info('step 5')")
    assert program.wait(30) == 0
    program.close()
    assert lines == ["INFO:root:step 5"]


def test_error_is_the_recorded_one_or_the_last_line_that_names_one(start, tmp_path):
    text = "import sys; print('ValueError: no such mode', file=sys.stderr); print('bye', file=sys.stderr)"
    program, _ = start(text)
    program.wait(30)
    program.close()
    assert program.error(tmp_path / "error.json") == "ValueError: no such mode"
    (tmp_path / "error.json").write_text('{"message": {"message": "out of luck"}}')
    assert program.error(tmp_path / "error.json") == "out of luck"


def test_taken_port_beats_later_errors(start, tmp_path):
    text = "print('RuntimeError: name: EADDRINUSE, message: address already in use'); print('SomeError: an echo')"
    program, _ = start(text)
    program.wait(30)
    program.close()
    assert "EADDRINUSE" in program.error(tmp_path / "none")


@pytest.mark.parametrize("words, code", [(["/no/such/program"], 127), (["/etc/hostname"], 126)])
def test_program_that_cannot_start_has_a_code_of_its_own(tmp_path, words, code):
    program = Program(words, os.environ, tmp_path, "TERM")
    assert program.wait(30) == code
    program.close()
    assert words[0] in program.error(tmp_path / "none")


def test_program_dies_with_its_parent(tmp_path):
    child = os.fork()
    if not child:
        Program(["sleep", "600"], os.environ, tmp_path, "TERM")
        time.sleep(600)
    program = wait_until(lambda: sleeping(child), "the program", 30)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_until(lambda: not os.path.exists(f"/proc/{program}") or processes.has_ended(stat(program)), "its end", 10)


def stat(pid):
    return processes.read_stat(pid)[1]


def sleeping(parent):
    """The pid of the program of a process, once it has become `sleep`; 0 before."""
    numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    own = [pid for pid in numbers if stat(pid)[1:2] == [str(parent)]]
    return next((pid for pid in own if processes.arguments(pid) == ["sleep", "600"]), 0)
