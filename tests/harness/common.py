"""Helpers of all builders: waiting for a condition, running a command, a free port, a run directory, denied access."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from flip.runs.rundir import RunDir

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534


def wait_until(condition, event, seconds=120.0, pause=0.05, story=None):
    """Call ``condition`` until its result is true, and return the result. Fail after ``seconds`` with ``event`` and the
    text of ``story()``."""
    limit = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < limit, f"timeout while waiting for {event}\n{story() if story else ''}"
        time.sleep(pause)
    return result


def free_port():
    """Return a port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_script(script, *arguments, cwd, runs, timeout=None, env=None):
    """Run ``python SCRIPT ARGUMENTS`` with ``runs`` as FLIP_RUNS; ``script`` is a path below the root."""
    environment = {**os.environ, "FLIP_RUNS": str(runs), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, ROOT / script, *arguments], capture_output=True, text=True, cwd=cwd, env=environment,
        stdin=subprocess.DEVNULL, timeout=timeout,
    )  # fmt: skip


@contextlib.contextmanager
def no_access(*paths):
    """Within the context, this process may not access ``paths``: they have mode 0, and root acts as another user."""
    user = os.geteuid()
    modes = [(path, path.stat().st_mode) for path in paths]
    for path in paths:
        path.chmod(0)
    try:
        if user == 0:  # root ignores modes
            os.seteuid(NOBODY)
        yield
    finally:
        os.seteuid(user)
        for path, mode in modes:
            path.chmod(mode)


def make_run(path, config="schema: 1\n", play=None):
    """Create a run directory with this config.yaml (none if empty) and, for scripted ranks, this play.json."""
    run = RunDir(path)
    run.path.mkdir(parents=True)
    if config:
        run.config.write_text(config, encoding="utf-8")
    if play is not None:
        (run.path / "play.json").write_text(json.dumps(play))
    return run


def attempt_lines(run, n):
    """Return the metric lines of attempt ``n`` without a line that a kill cut off."""
    path = run.metrics / f"{n}.jsonl"
    if path.exists():
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return []


def metric_lines(run):
    """Return the logged steps of a run in order, each once: of a repeated step the line of its highest attempt."""
    lines = {line["step"]: line for n in run.attempt_numbers() for line in attempt_lines(run, n)}
    return [lines[step] for step in sorted(lines)]
