"""Tests which processes a supervisor adopts, signals and kills: ranks of the run that pids.json names."""

import contextlib
import os
import signal
import socket
import subprocess

import pytest

from flip.runs.rundir import write_json
from jobs.host import sessions
from jobs.local import adopted, backend

pytestmark = pytest.mark.long


@pytest.fixture
def start_process():
    """``start_process(program, **environment)`` starts a shell in a session of its own, which is killed at the end."""
    started = []

    def spawn(program, *arguments, **environment):
        command = ["sh", "-c", program, "sh", *map(str, arguments)]
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, start_new_session=True, stdout=subprocess.DEVNULL
        )
        started.append(process)
        return process

    yield spawn
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def record_rank(run, pid):
    """Prepare attempt 1 of a run whose pids.json names a process with its true start time."""
    run.start_attempt({"host": socket.gethostname(), "world": 1})
    write_json(run.attempt(1) / "pids.json", [{"rank": 0, "pid": pid, "start": sessions.start_time(pid)}])


def ended(process):
    """Whether a process ends within a second."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(1.0)
    return process.returncode is not None


UNRELATED = {
    "no environment": lambda run: {},
    "another attempt": lambda run: {"FLIP_RUN": str(run.path), "FLIP_ATTEMPT": "2"},
    "another run": lambda run: {"FLIP_RUN": str(run.path.parent / "other"), "FLIP_ATTEMPT": "1"},
    "no run": lambda run: {"FLIP_ATTEMPT": "1"},
}


@pytest.mark.parametrize("kind", UNRELATED)
def test_unrelated_process_in_record_is_neither_killed_nor_signalled(field, start_process, kind):
    """A copied or prepared pids.json may name any process of this user, with its true start time."""
    run = field.run()
    process = start_process("sleep 600; :", **UNRELATED[kind](run))
    record_rank(run, process.pid)
    field.cluster.signal_ranks(run)
    assert backend.live_ranks(run) == []
    attempt = adopted.adopt(run, 1, patience=0.0)
    attempt.terminate(0.0)
    assert attempt.poll() and attempt.code is None
    assert not ended(process)


def test_session_of_dead_leader_in_record_is_not_killed(field, start_process):
    """What a closed shell has left running in the background still has its session number."""
    run = field.run()
    program = "sleep 600 > /dev/null 2>&1 & echo $!"
    shell = subprocess.Popen(["sh", "-c", program], start_new_session=True, stdout=subprocess.PIPE, text=True)
    left = int(shell.stdout.readline())
    record_rank(run, shell.pid)
    shell.communicate()
    start = sessions.start_time(left)
    try:
        attempt = adopted.adopt(run, 1, patience=0.0)
        assert attempt.poll() and sessions.alive(left, start)
    finally:
        os.kill(left, signal.SIGKILL)


def test_adopted_rank_and_its_session_are_killed(field, start_process):
    run = field.run()
    process = start_process("sleep 600 & sleep 600; :", FLIP_ATTEMPT="1", FLIP_RUN=str(run.path))
    record_rank(run, process.pid)
    assert [row["pid"] for row in backend.live_ranks(run)] == [process.pid]
    attempt = adopted.adopt(run, 1, patience=0.0)
    field.until(attempt.poll)
    assert ended(process) and process.returncode == -signal.SIGKILL
