"""Tests of the number of processes that were killed for memory, as the files of cgroups have it."""

import pytest

from jobs.host.memory_kills import memory_kills

EVENTS = "low 0\nhigh 0\nmax 12\noom 1\noom_kill {}\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


@pytest.mark.parametrize(
    "own, files, count",
    [
        ("0::/job/task\n", {"job/task/memory.events": EVENTS.format(2), "memory.events": EVENTS.format(9)}, 2),
        ("4:memory:/job\n1:cpu:/job\n0::/\n", {"memory/job/memory.oom_control": CONTROL.format(3)}, 3),
        ("0::/of/host\n", {"memory.events": EVENTS.format(1)}, 1),
        ("5:devices:/\n4:cpu,memory:/a\n", {"memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"}, 0),
        ("", {}, 0),
    ],
)
def test_memory_kills_reads_own_cgroup(own, files, count, tmp_path):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "mounts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert memory_kills(tmp_path / "own", tmp_path / "mounts") == count
