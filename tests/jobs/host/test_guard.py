"""Tests of the guard of a job's owner, with real processes that are killed and stopped."""

import contextlib
import fcntl
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from flip.runs.rundir import RunDir, write_json
from jobs.host import guard, processes
from jobs.host.guard import Guard
from tests.harness.common import ROOT, wait_until
from tests.harness.job_records import write_job
from tests.jobs.host.scontrol_answers import show

FULL_PIPE = 3000
"""Facts of 100 bytes: more than a pipe holds."""


class OwnerProcess:
    """A process with a guard. It executes the calls that ``call`` sends, and beats while it waits for them.

    Its guard writes what happens to files in ``folder``, and in ``on_gone`` it waits for the file ``go``.
    """

    def __init__(self, folder):
        self.folder = folder
        self.peer, self.inherited = socket.socketpair()
        self._calls, self._answers = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._serve()
            finally:
                os._exit(1)
        self.inherited.close()
        os.close(self._calls[0])
        os.close(self._answers[1])
        self._started = {}
        assert os.read(self._answers[0], 1) == b"."
        self.guard()

    # -- in the owner and in its guard

    def _serve(self):
        self.peer.close()
        os.close(self._calls[1])
        own = Guard(self._on_gone, self._on_silent)
        does_beat = True
        while True:
            os.write(self._answers[1], b".")
            while not select.select([self._calls[0]], [], [], 0.02)[0]:
                if does_beat:
                    own.beat()
            name, facts = json.loads(os.read(self._calls[0], 4096))
            if name == "say":
                own.say(**facts)
            elif name == "hang":
                does_beat = False
            elif name == "fill":
                for _ in range(FULL_PIPE):
                    own.say(padding="x" * 100)
            elif name == "hurry":
                own.hurry()
            elif name == "raise":
                raise ZeroDivisionError("of a test")
            else:
                os._exit(0)

    def _on_gone(self, heard):
        wait_until((self.folder / "go").exists, "the permission to end")
        write_json(self.folder / "gone.json", heard)

    def _on_silent(self, heard):
        with open(self.folder / "silent", "a") as file:
            file.write(f"{time.monotonic()}\n")
        return 0.1

    # -- in the test

    def call(self, name, **facts):
        os.write(self._calls[1], json.dumps([name, facts]).encode())
        if name not in ("raise", "exit"):
            assert select.select([self._answers[0]], [], [], 30)[0], f"the owner is blocked in {name}"
            assert os.read(self._answers[0], 1) == b"."

    def guard(self):
        """Pid of its guard, which has closed all that it has inherited but the pipe."""
        (pid,) = self.children()
        self._started[pid] = processes.start_time(pid)
        wait_until(lambda: len(descriptors(pid)) <= 4, "a guard that listens")
        return pid

    def children(self):
        pids = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in pids]

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self):
        if self.pid is not None:
            os.waitpid(self.pid, 0)
            self.pid = None

    def gone(self):
        """What the guard had heard when its owner was gone."""
        (self.folder / "go").touch()
        path = self.folder / "gone.json"
        wait_until(path.exists, "the end of the guard", 30)
        heard = json.loads(path.read_text())
        heard.pop("beat", None)
        return heard

    def silences(self):
        """When the guard has noticed that its owner hangs."""
        path = self.folder / "silent"
        return [float(line) for line in path.read_text().split()] if path.exists() else []

    def close(self):
        if self.pid is not None:
            self.guard()
            self.kill()
        for pid, started in self._started.items():
            if processes.start_time(pid) == started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.peer.close()
        os.close(self._calls[1])
        os.close(self._answers[0])


def descriptors(pid):
    return os.listdir(f"/proc/{pid}/fd")


def has_ended(pid):
    return processes.has_ended(processes.read_stat(pid)[1])


@pytest.fixture
def make_owner(tmp_path, monkeypatch):
    owners = []

    def make(**seconds):
        for name, value in {"BEAT_SECONDS": 0.1, **seconds}.items():
            monkeypatch.setattr(guard, name, value)
        owners.append(OwnerProcess(tmp_path))
        return owners[-1]

    yield make
    for owner in owners:
        owner.close()


def test_guard_of_killed_owner_knows_what_it_has_heard(make_owner):
    owner = make_owner()
    owner.call("say", attempt=3)
    owner.call("say", attempt=4, delay=60.0, exclude="n1,n2")
    owner.kill()
    assert owner.gone() == {"attempt": "4", "delay": "60.0", "exclude": "n1,n2"}


def test_exception_of_owner_is_no_end_that_it_wanted(make_owner):
    owner = make_owner()
    owner.call("say", attempt=3)
    owner.call("raise")
    owner.wait()
    assert owner.gone() == {"attempt": "3"}


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_guard_does_nothing_after_an_owner_that_was_over(make_owner, end, tmp_path):
    owner = make_owner()
    (tmp_path / "go").touch()
    pid = owner.guard()
    owner.call("say", attempt=3)
    owner.call("say", over=1)
    if end == "exit":
        owner.call("exit")
        owner.wait()
    else:
        owner.kill()
    wait_until(lambda: has_ended(pid), "the end of the guard", 30)
    assert not (tmp_path / "gone.json").exists()


def test_killed_guard_is_replaced_at_next_beat_and_the_next_knows_all(make_owner):
    owner = make_owner()
    owner.call("say", attempt=3)
    owner.call("say", delay=60.0)
    first = owner.guard()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: len(owner.children()) == 1 and owner.children() != [first], "another guard", 30)
    second = owner.guard()
    os.kill(second, signal.SIGKILL)
    wait_until(lambda: len(owner.children()) == 1 and owner.children() != [second], "another guard", 30)
    owner.guard()
    owner.kill()
    assert owner.gone() == {"attempt": "3", "delay": "60.0"}


def test_connections_of_killed_owner_end_although_its_guard_is_at_work(make_owner):
    """Agents notice the end of their owner by them."""
    owner = make_owner()
    pid = owner.guard()
    assert len(descriptors(pid)) == 4, "the standard ones and its pipe"
    owner.kill()
    assert select.select([owner.peer], [], [], 30)[0] and owner.peer.recv(1) == b""
    assert not has_ended(pid) and owner.gone() == {}


def test_term_wakes_guard_of_an_owner_that_does_not_beat(make_owner):
    """Slurm sends TERM to both when it ends the job. The guard would look after two minutes of silence."""
    owner = make_owner(ANSWER_SECONDS=0.3)
    owner.call("hang")
    sent = time.monotonic()
    os.kill(owner.guard(), signal.SIGTERM)
    wait_until(owner.silences, "a guard that looks at the job", 30)
    assert owner.silences()[0] >= sent + 0.3
    owner.call("say", attempt=3)
    owner.kill()
    assert owner.gone() == {"attempt": "3"}, "it still listens"


def test_owner_that_beats_after_term_keeps_its_guard_quiet(make_owner):
    """Also if its first answer comes before the guard has noticed the signal."""
    owner = make_owner(BEAT_SECONDS=60.0, ANSWER_SECONDS=1.5)
    owner.call("hurry")
    os.kill(owner.guard(), signal.SIGTERM)
    late = time.monotonic() + 1.0 + 1.5 + 0.5  # it notices TERM within a second
    wait_until(lambda: time.monotonic() > late, "the time after which it would look")
    owner.call("hang")
    hangs = time.monotonic()
    os.kill(owner.guard(), signal.SIGTERM)
    wait_until(owner.silences, "a guard that looks at the job", 30)
    assert owner.silences()[0] > hangs


def test_guard_looks_at_job_of_silent_owner_until_that_beats_again(make_owner):
    owner = make_owner(SILENT_SECONDS=0.5)
    owner.guard()
    os.kill(owner.pid, signal.SIGSTOP)
    wait_until(lambda: len(owner.silences()) >= 3, "looks at the job", 30)
    os.kill(owner.pid, signal.SIGCONT)
    owner.call("say", attempt=3)
    owner.kill()
    assert owner.gone() == {"attempt": "3"}


def test_stopped_guard_does_not_block_owner_and_hears_all_when_it_goes_on(make_owner):
    owner = make_owner(BEAT_SECONDS=60.0)
    pid = owner.guard()
    os.kill(pid, signal.SIGSTOP)
    owner.call("fill")
    owner.call("say", attempt=3, exclude="n" * 100)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: unread(pid) == 0, "a guard that has read all", 30)
    owner.call("say", delay=60.0)
    owner.kill()
    assert owner.gone() == {"attempt": "3", "delay": "60.0", "exclude": "n" * 100, "padding": "x" * 100}


def unread(pid):
    """Bytes in the pipe of a guard."""
    (path,) = [path for path in Path(f"/proc/{pid}/fd").iterdir() if int(path.name) > 2]
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        size = bytearray(4)
        fcntl.ioctl(pipe, termios.FIONREAD, size)
        return int.from_bytes(size, sys.byteorder)
    finally:
        os.close(pipe)


WATCHED = """
import os, runpy, sys

owner = os.getpid()
paths = ("open", "os.chdir", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink")

def watch(event, arguments):
    if event in paths and os.getpid() != owner and not isinstance(arguments[0], int):
        os.write(2, f"opens {arguments[0]!r}\\n".encode())

sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Executes a program; each file that a process opens which it has forked is a line of standard error."""


@pytest.mark.long
def test_guard_opens_no_file_before_it_has_restarted_the_job(tmp_path, monkeypatch, commands):
    """The file system of the run may hang, and may be why the owner was killed."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    write_job(run)
    script = tmp_path / "script"
    script.write_text(f"touch {tmp_path}/up; exec sleep 60\n")
    log = tmp_path / "log"
    ends = show(state="COMPLETING", reason="TimeLimit", ran="1-00:00:20")
    answer = f"[ -e {tmp_path}/ends ] || {{ {show()}\n}}; [ ! -e {tmp_path}/ends ] || {{ {ends}\n}}"
    commands("scontrol", f"[ $1 != requeue ] || echo scontrol requeue >> {log}; [ $1 != show ] || {{ {answer}\n}}")
    for name in ("SLURM_RESTART_COUNT", "SLURM_ARRAY_JOB_ID", "FLIP_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_JOB_ID": "57", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    argv = [sys.executable, "-I", "-c", WATCHED, ROOT / "jobs" / "host" / "job.py", run.path, "--token", "t"]
    with open(log, "a") as file:
        owner = subprocess.Popen([*argv, "--script", script], stderr=file, start_new_session=True)
    try:
        wait_until((tmp_path / "up").exists, "its step", story=log.read_text)
        wait_until(lambda: len(commands.calls()) > 0, "a look at the wall limit")
        (tmp_path / "ends").touch()
        owner.kill()
        wait_until((run.attempt(1) / "limit.json").exists, "the record of the limit", story=log.read_text)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(owner.pid, signal.SIGKILL)
        owner.wait()
    before, after = re.split("^scontrol requeue$", log.read_text(), flags=re.MULTILINE)
    assert set(re.findall("^opens (.*)$", before, re.MULTILINE)) <= {"'/proc/self/fd'", "'/dev/null'"}
    assert "limit.json" in after, "this test sees what it opens"
