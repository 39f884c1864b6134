"""Simulated node failures: all processes of a node die at once, so that none can report the end of another."""

import subprocess
import time

import pytest

from tests.threads import only_first_thread_ended
from tools.sandbox import processes

REPORTS = 'echo started > "$1/started"; sleep 60; echo "its child has died" > "$1/reported"'


@pytest.fixture
def family(tmp_path):
    """A shell, a child that waits for its own child and reports its end, and that grandchild."""
    shell = subprocess.Popen(
        ["bash", "-c", f"(set -m; {REPORTS}) & wait; echo reported > $1/reported", "_", str(tmp_path)]
    )
    limit = time.monotonic() + 30
    while len(found := processes.tasks([own(shell.pid)], [])) < 2:
        assert time.monotonic() < limit
        time.sleep(0.02)
    found.append(own(shell.pid))
    yield found
    processes.kill(found)
    shell.wait(30)


def own(pid):
    return processes.running()[pid]


def test_no_process_sees_the_end_of_another(family, tmp_path):
    processes.freeze(family)
    assert {processes.state(process.pid) for process in family} == {"T"}
    order = processes.children_first(family)
    for process in order:  # slowly: a process that could still run would report
        processes.kill([process])
        time.sleep(0.2)
    assert processes.wait(family, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["started"]


def test_a_process_is_there_until_its_last_thread_ends():
    """Until then its children keep their parent; a stopped child would get SIGHUP when it loses it."""
    with only_first_thread_ended() as pid:
        assert processes.state(pid) == "Z"
        process = own(pid)
        assert processes.alive(process) and not processes.wait([process], 0)
        processes.kill([process])
        assert processes.wait([process], 10)


def test_children_come_first(family):
    order = [process.pid for process in processes.children_first(family)]
    for process in family:
        if process.parent in order:
            assert order.index(process.pid) < order.index(process.parent)
