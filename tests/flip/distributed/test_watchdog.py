"""A process that does not move ends itself, and says where it stood."""

import subprocess
import sys

from flip.runs.errors import HANG

SCRIPT = """
import sys, threading, time
from flip.distributed.watchdog import Watchdog
dog = Watchdog({seconds}, lambda what: print(what, flush=True))
def waits_for_nobody():
    threading.Event().wait(60)
for _ in range(40):
    dog.beat("a step from S = 7", {times})
    time.sleep(0.01)
{end}
"""


def run(seconds, end, times=1.0):
    script = SCRIPT.format(seconds=seconds, end=end, times=times)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def test_no_beat_is_the_end():
    ended = run(0.5, "waits_for_nobody()")
    assert ended.returncode == HANG == 71
    assert ended.stdout.startswith("no progress for ") and "a step from S = 7" in ended.stdout
    assert "in waits_for_nobody" in ended.stderr


def test_a_cause_that_cannot_be_told_holds_nobody_up():
    ended = run(0.5, "dog._tell = None; waits_for_nobody()")
    assert ended.returncode == HANG and "in waits_for_nobody" in ended.stderr


def test_who_moves_or_is_allowed_to_take_long_lives_on():
    assert run(0.5, "dog.close(); time.sleep(1.5); sys.exit(3)").returncode == 3
    assert run(0.5, "time.sleep(1.5); sys.exit(3)", times=60).returncode == 3
    assert run(0, "time.sleep(1.5); sys.exit(3)").returncode == 3
