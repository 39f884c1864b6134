"""Signals are a flag; none is lost while helpers are started; the leash's end is a stop."""

import os
import signal
import subprocess
import sys
import time

SCRIPT = """
import os, signal, subprocess, sys
from flip import interrupt
flag = interrupt.install()
{body}
print(flag.reason)
"""


def run(body, **options):
    code = SCRIPT.format(body=body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **options)


def test_a_signal_sets_the_flag_and_nothing_else():
    done = run("os.kill(os.getpid(), signal.SIGUSR2)\nos.kill(os.getpid(), signal.SIGTERM)")
    assert (done.returncode, done.stdout.strip()) == (0, "signal SIGUSR2")


def test_a_signal_during_start_up_of_helpers_is_delivered_afterwards_and_the_helper_ignores_it():
    helper = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); print('alive')"
    body = (
        "with interrupt.deaf():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        f"    child = subprocess.run([sys.executable, '-c', {helper!r}], capture_output=True, text=True)\n"
        "    assert not flag\n"
        "assert child.stdout == 'alive\\n', child"
    )
    done = run(body)
    assert (done.returncode, done.stdout.strip()) == (0, "signal SIGTERM"), done.stderr


def test_the_end_of_the_supervisor_is_a_stop():
    reader, writer = os.pipe()
    body = "import time\nfor _ in range(200):\n    time.sleep(0.05)\n    if flag: break"
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body="print('up', flush=True)\n" + body)],
        env={**os.environ, "FLIP_LEASH_FD": str(reader)}, pass_fds=[reader], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(reader)
    assert child.stdout.readline() == "up\n"
    time.sleep(0.2)
    assert child.poll() is None
    os.close(writer)
    assert child.communicate(timeout=30)[0].strip() == "the supervisor is gone"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
