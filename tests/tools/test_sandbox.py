"""How a node dies on the Slurm of one machine: all at once, so that nobody is left to tell of it."""

import subprocess
import time

import pytest

from tests.threads import only_first_thread_ended
from tools.sandbox import processes

TELLS = 'echo began > "$1/began"; sleep 60; echo "its child has died" > "$1/told"'


@pytest.fixture
def family(tmp_path):
    """A shell, its process that waits for a child and tells of its end, and that child."""
    shell = subprocess.Popen(["bash", "-c", f"(set -m; {TELLS}) & wait; echo told > $1/told", "_", str(tmp_path)])
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


def test_nobody_sees_another_ones_end(family, tmp_path):
    processes.freeze(family)
    assert {processes.state(process.pid) for process in family} == {"T"}
    order = processes.children_first(family)
    for process in order:  # slowly: whoever could still run would
        processes.kill([process])
        time.sleep(0.2)
    assert processes.wait(family, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["began"]


def test_a_process_is_there_until_its_last_thread_ends():
    """Till then its children keep their parent, and one that is stopped would get SIGHUP when they lose it."""
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
