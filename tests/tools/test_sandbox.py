"""Tests of simulated node failures: all processes of a node die at once, so none can report the death of another."""

import subprocess
import time

import pytest

from tests.threads import only_first_thread_ended
from tools.sandbox import processes

REPORTS = 'echo started > "$1/started"; sleep 60; echo "its child has died" > "$1/reported"'


@pytest.fixture
def family(tmp_path):
    """Start a shell, a child that reports the death of its own child, and that grandchild."""
    shell = subprocess.Popen(
        ["bash", "-c", f"(set -m; {REPORTS}) & wait; echo reported > $1/reported", "_", str(tmp_path)]
    )
    limit = time.monotonic() + 30
    while len(tasks := processes.tasks([process_of(shell.pid)], [])) < 3:
        assert time.monotonic() < limit
        time.sleep(0.02)
    yield tasks
    processes.kill(tasks)
    shell.wait(30)


def process_of(pid):
    return processes.running()[pid]


def test_kill_after_freeze_lets_no_process_report_death_of_another(family, tmp_path):
    processes.freeze(family)
    assert {processes.state(process.pid) for process in family} == {"T"}
    order = processes.children_first(family)
    for process in order:  # slowly: any process that could still run would report a death
        processes.kill([process])
        time.sleep(0.2)
    assert processes.wait(family, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["started"]


def test_process_is_alive_until_last_thread_ends():
    """Its children keep their parent until then; stopped children that lose their parent receive SIGHUP."""
    with only_first_thread_ended() as pid:
        assert processes.state(pid) == "Z"
        process = process_of(pid)
        assert processes.alive(process) and not processes.wait([process], 0)
        processes.kill([process])
        assert processes.wait([process], 10)


def test_children_first_orders_children_before_parents(family):
    order = [process.pid for process in processes.children_first(family)]
    for process in family:
        if process.parent in order:
            assert order.index(process.pid) < order.index(process.parent)
