"""Ctrl-C, SIGTERM and a reader that leaves, at commands that work or wait for long.

Each ends at once with the exit code of docs/commands.md, without a traceback, and leaves nothing that is half done.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tests.harness.common import ROOT, wait_until
from tests.harness.terminal import Terminal
from tests.jobs.commands.test_clean import Desk

pytestmark = pytest.mark.long

CTRL_C = "Ctrl-C"
TERM = "SIGTERM"
CLOSED = "closed pipe"
CODES = {CTRL_C: {130}, TERM: {143, -signal.SIGTERM}, CLOSED: {141}}
"""A process that SIGTERM kills is 143 for a shell, too."""
WAYS = list(CODES)
SECONDS = 10.0
"""For the end of a command, on a slow machine."""


class Command:
    """A command in a process of its own, whose output is in pipes; as in a terminal, Ctrl-C reaches it."""

    def __init__(self, *words):
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs"), *map(str, words)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), start_new_session=True,
        )  # fmt: skip

    def end(self, way):
        """Interrupt it; returns what it has written to standard error."""
        error = b""
        if way == CLOSED:
            self.process.stdout.close()
            self.process.stderr.close()
            self.process.wait(6 * SECONDS)
        else:
            start = time.monotonic()
            if way == CTRL_C:
                os.killpg(self.process.pid, signal.SIGINT)  # a terminal sends it to all
            else:
                self.process.terminate()
            _, error = self.process.communicate(timeout=6 * SECONDS)
            assert time.monotonic() - start < SECONDS
        assert self.process.returncode in CODES[way], error
        assert b"Traceback" not in error, error
        return error.decode()


def processes_of(process):
    """Ids of the processes that a command, which has a session of its own, has left."""
    listed = subprocess.run(["ps", "-o", "pid=", "-s", str(process.pid)], capture_output=True, text=True, timeout=60)
    return listed.stdout.split()


@pytest.fixture
def started():
    commands = []

    def start(*words):
        commands.append(Command(*words))
        return commands[-1]

    yield start
    for each in commands:
        if each.process.poll() is None:
            os.killpg(each.process.pid, signal.SIGKILL)
            each.process.communicate()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images for some seconds of ``shards make``."""
    folder = tmp_path_factory.mktemp("images")
    Image.effect_noise((600, 600), 90).save(folder / "0.png")
    (folder / "0.txt").write_text("noise")
    for n in range(1, 1500):
        os.link(folder / "0.png", folder / f"{n}.png")
        os.link(folder / "0.txt", folder / f"{n}.txt")
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_make_leaves_no_part_of_a_data_set(way, images, tmp_path, started):
    made = started("shards", "make", images, "--out", tmp_path / "out")
    wait_until(lambda: os.listdir(tmp_path), "the first file")
    made.end(way)
    left = os.listdir(tmp_path)
    assert not left or (way == CLOSED and left == ["out"] and (tmp_path / "out" / "manifest.json").exists()), left


@pytest.mark.parametrize(
    "words, way",
    # Of a closed pipe `logs -f` hears at its next line, as `tail -f` does.
    [*((("status", "--watch"), way) for way in WAYS), *((("logs", "-f"), way) for way in (CTRL_C, TERM))],
)
def test_watching_ends_and_leaves_the_run_alone(words, way, field, started):
    run = field.run(total=10_000, step=0.1)
    field.submit(run)
    field.until_moving(run, 1)
    watch = started(words[0], run.path, *words[1:])
    assert watch.process.stdout.read(1)
    watch.end(way)
    assert field.state(run) == "running" and run.newest_attempt() == 1


@pytest.mark.parametrize("way", WAYS)
def test_measurement_ends_with_its_processes_and_keeps_its_rows(way, tmp_path, started, monkeypatch):
    monkeypatch.setenv("FLIP_RUNS", str(tmp_path / "runs"))
    rows = ["matmul", "step_emoji_0.5", "fault_rank"]
    words = ["doctor", "--measure", "--only", *rows, "--minutes", "1", "--yes"]
    measuring = started(*words, "--out", tmp_path / "out")
    file = tmp_path / "out" / "measured.json"
    wait_until(lambda: file.exists() or measuring.process.poll() is not None, "the first row", 60)
    measuring.end(way)
    assert not processes_of(measuring.process) and json.loads(file.read_text())["rows"][0]["name"] == "matmul"
    assert not os.listdir(tmp_path / "runs")


@pytest.mark.parametrize("way", [CTRL_C, TERM])
def test_doctor_ends_while_slurm_does_not_answer(way, tmp_path, started, monkeypatch):
    for name in ("scontrol", "sinfo", "sbatch", "sacctmgr"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nexec sleep 300\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    asking = started("doctor", "--write", tmp_path / "site.yaml")
    wait_until((tmp_path / "asked").exists, "the first question", 60)
    asking.end(way)
    assert not processes_of(asking.process) and not (tmp_path / "site.yaml").exists()


@pytest.fixture
def desk(tmp_path, capsys):
    return Desk(tmp_path, capsys)


@pytest.mark.parametrize("way", [CTRL_C, TERM])
@pytest.mark.parametrize("name", ["clean", "rm"])
def test_interrupted_question_changes_nothing(way, name, desk):
    path = desk.trash() if name == "clean" else desk.run().path
    target = ["--older", "0"] if name == "clean" else ["demo/base"]
    with Terminal(120, 20) as screen:
        words = [sys.executable, str(ROOT / "jobs"), name, *target, "--root", str(desk.runs)]
        process = screen.start(*words, cwd=ROOT)
        wait_until(lambda: b"?" in screen.raw, "the question", 60, story=lambda: screen.raw.decode())
        process.send_signal(signal.SIGINT if way == CTRL_C else signal.SIGTERM)
        assert process.wait(SECONDS) in CODES[way]
        assert "Traceback" not in screen.close().text() and screen.cursor
    assert path.is_dir()


@pytest.mark.parametrize("way", [CTRL_C, TERM])
def test_clean_continues_after_an_interrupt(way, desk, started):
    path = desk.trash()
    (path / "many").mkdir()
    for n in range(20_000):
        (path / "many" / str(n)).touch()
    words = ["clean", "demo", "--older", "0", "--yes", "--root", desk.runs]
    cleaning = started(*words)

    def is_deleting():
        # Unlike `rglob`, `os.walk` passes over a folder that is deleted in this moment.
        left = sum(len(files) for _, _, files in os.walk(desk.runs / ".trash"))
        return cleaning.process.poll() is not None or left < 20_000

    wait_until(is_deleting, "the first deletion", 60, pause=0.01)
    cleaning.end(way)
    rest = started(*words)
    _, error = rest.process.communicate(timeout=60)
    assert rest.process.returncode == 0 and not list((desk.runs / ".trash").rglob("*")), error
