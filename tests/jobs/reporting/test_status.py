"""Watching runs: output, Ctrl-C and exit codes."""

import io
import signal
import subprocess
import sys
import time
from pathlib import Path

from flip.runs.rundir import write_json
from jobs.reporting import status as run_status

ROOT = Path(__file__).resolve().parents[3]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_worst_code_and_both_ways_of_telling(field):
    good = field.run("good", total=2)
    bad = field.run("bad", attempts={"1": {"0": "diverge"}})
    left = field.run("left")
    write_json(left.cancel, {"who": "me", "why": "", "time": 0})
    field.submit(good, bad)
    lines = io.StringIO()
    assert run_status.watch([good.path, left.path, bad.path], lines, poll=0.05) == 76
    shown = lines.getvalue()
    assert "good: complete" in shown and "bad: failed" in shown and "as asked" in shown
    assert "\x1b" not in shown
    screen = Terminal()
    assert run_status.watch([good.path], screen) == 0
    assert "#" * 20 in screen.getvalue() and "\x1b[2K" in screen.getvalue()


def test_runs_that_nobody_looks_after_are_no_reason_to_wait(field):
    assert run_status.watch([field.run().path], io.StringIO()) == 75


def test_interrupt_leaves_the_runs_going(field):
    run = field.run(total=40, step=0.1)
    field.submit(run)
    # As from a terminal: a test run in the background inherits SIGINT ignored, and so would the command.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from jobs.reporting.status import watch; sys.exit(watch([sys.argv[1]], again='COME BACK'))"
    )
    looker = subprocess.Popen([sys.executable, "-c", script, run.path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    field.until_moving(run, 1)
    assert "run: " in looker.stdout.readline(), "it has begun to look"
    looker.send_signal(signal.SIGINT)
    shown, _ = looker.communicate(timeout=20)
    assert looker.returncode == 130 and "COME BACK" in shown and "Traceback" not in shown
    time.sleep(0.3)
    assert field.state(run) == "running" and run.newest_attempt() == 1
