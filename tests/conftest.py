"""Stub commands, the order of tests and their processes, and profiles of hypothesis: how many examples are tried.

- ``ci``: 25, the same each time; the default, and that of ``make check`` and ``make test``.
- ``all``: 100, the same each time; ``make test-all``.
- ``search``: 5,000, others each time; by hand: ``pytest tests/parsers --hypothesis-profile=search``.
"""

import fcntl
import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:  # more processes than cores: a second thread of each would only wait
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

pytest.register_assert_rewrite("tests.harness")  # before its first import

from tests.harness import slurm_command_lines  # noqa: E402

#: A fixture of a function, such as a folder, serves all examples of a test.
SHARED = [HealthCheck.function_scoped_fixture]

for name, examples in (("ci", 25), ("all", 100)):
    settings.register_profile(
        name, max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=SHARED
    )
settings.register_profile("search", max_examples=5000, deadline=None, suppress_health_check=SHARED)
settings.load_profile("ci")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers():
    """Run two processes more than there are cores, for four cores at most: tests that wait leave cores idle."""
    return min(len(os.sched_getaffinity(0)), 4) + 2


def pytest_collection_modifyitems(items):
    """Run tests that use a real Slurm or kill first: they take minutes, and at the end would run alone."""
    items.sort(
        key=lambda item: (
            item.get_closest_marker("slurm") is None,
            item.get_closest_marker("kill") is None,
            item.path,  # the same order in all processes
        )
    )


def rotated(arguments, number, count):
    """The test files below ``arguments``, in an order of its own for each of ``count`` processes.

    All processes collect all files at the same time, and the first one to reach a file compiles it for the others. In
    a new clone, equal orders would let each process compile each file."""
    if not all(os.path.isdir(argument) for argument in arguments):
        return arguments
    files = sorted(str(path) for argument in arguments for path in Path(argument).rglob("test_*.py"))
    start = len(files) * number // count
    return files[start:] + files[:start]


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """Collect no garbage while tests are collected, where it finds none, and leave modules and tests out of it later.

    Modules and tests stay until the end. Collecting garbage took 2 s of processor time, 7 s if tests are rewritten, and
    a tenth of the time of tests."""
    worker = getattr(session.config, "workerinput", None)  # of pytest-xdist
    if worker is not None:
        number = int(worker["workerid"].removeprefix("gw"))
        session.config.args = rotated(session.config.args, number, worker["workercount"])
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout: a test's limit begins after the wait
def pytest_runtest_protocol(item):
    """Let one test at a time use a real Slurm, which has daemons and jobs of several ranks; this file is the lock."""
    if item.get_closest_marker("slurm") is None:
        return (yield)
    with open(__file__, "r+b") as lock:  # NFS locks only what may be written
        fcntl.flock(lock, fcntl.LOCK_EX)
        return (yield)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """``commands(name, script)`` puts a shell script with this name first on PATH; ``.calls()`` lists all calls.

    A stand-in for a command of Slurm fails the test if it was called in a way that no real Slurm has accepted."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    calls = tmp_path / "calls"
    words = tmp_path / "words"

    def put(name, script):
        record = f"""printf '%s\\0' $# {name} "$@" >> {words}; echo "{name} $*" >> {calls}"""
        (tmp_path / name).write_text(f"#!/bin/sh\n{record}\n{script}\n")
        (tmp_path / name).chmod(0o755)

    put.calls = lambda: calls.read_text().splitlines() if calls.exists() else []
    yield put
    left = []
    if words.exists():
        left = words.read_text().split("\0")[:-1]
    while left:
        end = int(left[0]) + 2
        slurm_command_lines.check(left[1:end])
        left = left[end:]
