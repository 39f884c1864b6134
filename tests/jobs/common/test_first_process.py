"""Tests of a command as process 1: what it inherits is reaped, and signals reach the command."""

import os
import signal
import subprocess
import sys

import pytest

from jobs.common import first_process
from tests.harness.common import ROOT
from tests.harness.first_process import UNSHARE, first_process_of, why_no_namespace

NAMESPACE = pytest.mark.skipif(bool(why_no_namespace()), reason=why_no_namespace())
HEAD = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from jobs.common import first_process

def orphan(seconds):
    if os.fork() == 0:
        if os.fork() == 0:
            time.sleep(seconds)
            print("the orphan ends", flush=True)
        os._exit(0)
    os.wait()

def zombies():
    found = [name for name in os.listdir("/proc") if name.isdigit()]
    return [name for name in found if open(f"/proc/{{name}}/stat").read().rpartition(")")[2].split()[0] == "Z"]

assert first_process.is_first()
"""


def start(text):
    script = HEAD.format(root=str(ROOT)) + text
    return subprocess.Popen([*UNSHARE, sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


@NAMESPACE
def test_exit_code_is_that_of_command_and_orphans_are_reaped():
    process = start("""
def command():
    orphan(0)
    time.sleep(0.3)
    print("zombies", zombies(), "command is", os.getpid() != 1, flush=True)
    sys.exit(75)

first_process.run_below(command, [signal.SIGTERM])
""")  # fmt: skip
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "zombies [] command is True" in shown


@NAMESPACE
def test_signal_reaches_command_once():
    process = start("""
def command():
    received = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    print("ready", flush=True)
    while not received:
        time.sleep(0.01)
    time.sleep(0.2)
    return 10 + len(received)

first_process.run_below(lambda: sys.exit(command()), [signal.SIGTERM])
""")  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    os.kill(first_process_of(process), signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 11


@NAMESPACE
def test_command_without_handler_ends_by_signal():
    process = start("""
def command():
    print("ready", flush=True)
    time.sleep(60)

first_process.run_below(command, [signal.SIGTERM])
""")  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    os.kill(first_process_of(process), signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


@NAMESPACE
def test_processes_that_are_left_may_end():
    """Process 1 takes all others with it: it waits for those that still save or upload."""
    process = start("""
first_process.run_below(lambda: sys.exit(orphan(0.5)), [signal.SIGTERM])
""")  # fmt: skip
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "the orphan ends" in shown


def test_other_processes_are_not_first():
    assert not first_process.is_first()
