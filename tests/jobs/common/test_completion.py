"""Completion in interactive bash and zsh: the test types keys into a terminal and reads the line back."""

import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
START = {
    "bash": ["bash", "--noprofile", "--norc", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}
SETUP = {
    "bash": 'eval "$(flip completion bash)"\n',
    "zsh": 'autoload -U compinit; compinit -u; eval "$(flip completion zsh)"\n',
}


class Terminal:
    def __init__(self, shell, home):
        (home / "flip").write_text(f'#!/bin/sh\nexec {sys.executable} -m jobs "$@"\n')
        (home / "flip").chmod(0o755)
        for run in ("emoji/mask50", "emoji/mask75", "other/clip"):
            (home / "runs" / run).mkdir(parents=True)
        (home / "own").mkdir()
        (home / "own" / "mine.yaml").touch()
        environment = {"HOME": str(home), "PATH": f"{home}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "$ "}
        environment |= {"PYTHONPATH": str(ROOT), "FLIP_RUNS": str(home / "runs"), "COLUMNS": "200"}
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.chdir(home)
            os.execvpe(shell, START[shell], environment)
        self.type(SETUP[shell] + "echo read''y\n", "ready")

    def type(self, keys, expected):
        """Type the keys and return the output up to the pattern ``expected``."""
        os.write(self.handle, keys.encode())
        output = ""
        limit = time.monotonic() + 60
        while not re.search(expected, output):
            assert time.monotonic() < limit, f"{keys!r}: timeout: {expected!r} is not in {output!r}"
            if select.select([self.handle], [], [], 0.2)[0]:
                output += os.read(self.handle, 4096).decode("utf-8", "replace")
        return output

    def close(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.handle)


@pytest.fixture(params=["bash", "zsh"])
def terminal(request, tmp_path):
    if shutil.which(request.param) is None:
        assert "FLIP_REQUIRE_BSDTAR" not in os.environ, f"no {request.param} (make test installs it)"
        pytest.skip(f"no {request.param}")
    started = Terminal(request.param, tmp_path)
    yield started
    started.close()


@pytest.mark.long
def test_completion_completes_commands_options_sweeps_and_runs(terminal):
    clear = "\x15"  # Ctrl-U
    terminal.type("flip statu\t", "flip status")
    terminal.type(f"{clear}flip submit --swe\t", "--sweep")
    terminal.type(f"{clear}flip submit --sweep quickstart_\t", "quickstart_full")
    terminal.type(f"{clear}flip logs em\t", "emoji/")
    terminal.type(f"{clear}flip logs emoji/mask5\t", "emoji/mask50")
    terminal.type(f"{clear}flip export emoji/mask7\t", "emoji/mask75")
    terminal.type(f"{clear}flip shards verif\t", "verify")
    terminal.type(f"{clear}flip submit quickstart_\t", "quickstart_full")
    terminal.type(f"{clear}flip submit own/min\t", "own/mine.yaml")
    terminal.type(f"{clear}flip status --verb\t", "--verbose")
    terminal.type(f"{clear}flip submit x --changed fo\t", "fork")
    terminal.type(f"{clear}flip compl\t", "completion")
