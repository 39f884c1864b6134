"""Tests of what limits this process, as the files of cgroups of version 1 and 2 have it."""

import pytest

from flip.common.host import this_host
from flip.runs import cgroup

NONE = 9223372036854771712
"""The value that cgroups version 1 reports if there is no limit."""
JOB = "/system.slice/slurmstepd.scope/job_57"
EVENTS = "low 0\nhigh 0\nmax 12\noom 1\noom_kill {}\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


@pytest.fixture
def files(tmp_path):
    """Writes /proc/self/cgroup and the files of groups; returns the paths of both."""

    def write(own, contents):
        (tmp_path / "own").write_text(own)
        for name, text in contents.items():
            path = tmp_path / "mounts" / name.strip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        return tmp_path / "own", tmp_path / "mounts"

    return write


@pytest.mark.parametrize(
    ("own", "limits", "least"),
    [
        (f"0::{JOB}/step_0/task_0", {f"{JOB}/memory.max": 2**22, f"{JOB}/step_0/memory.max": "max"}, 2**22),
        (f"0::{JOB}", {f"{JOB}/memory.max": "max", "/system.slice/memory.max": "max"}, None),
        (f"0::{JOB}", {f"{JOB}/memory.max": 2**30, "/system.slice/memory.max": 2**20}, 2**20),
        ("0::/", {"/memory.max": 2**20}, 2**20),  # in a container
        ("0::/../../elsewhere", {"/memory.max": 2**20}, 2**20),
        (
            "12:cpu,cpuacct:/slurm/job_57\n4:memory:/slurm/uid_0/job_57/step_0\n1:name=systemd:/memory\n0::/user:1",
            {
                "/memory/memory.limit_in_bytes": NONE,
                "/memory/slurm/uid_0/job_57/memory.limit_in_bytes": 2**26,
                "/memory/slurm/uid_0/job_57/step_0/memory.limit_in_bytes": NONE,
                "/memory/slurm/job_57/memory.limit_in_bytes": 1,
                "/memory/memory.max": 1,
            },
            2**26,
        ),
        ("4:memory,blkio:/docker/3f", {"/memory/memory.limit_in_bytes": 2**21}, 2**21),  # path of the host
        ("4:memory:/", {"/memory/memory.limit_in_bytes": NONE}, None),
        ("", {"/memory.max": 1}, None),
    ],
)
def test_total_memory_is_the_least_limit_of_enclosing_groups_or_of_the_host(files, own, limits, least, tmp_path):
    physical = cgroup.total_memory(tmp_path / "none", tmp_path)
    assert physical > 10**8
    assert cgroup.total_memory(*files(own, limits)) == (least or physical)


def test_resources_of_a_machine_count_the_limit_of_its_cgroup(monkeypatch):
    monkeypatch.setattr("flip.common.host.total_memory", lambda: 2**20)
    assert this_host().memory == 2**20


@pytest.mark.parametrize(
    ("own", "contents", "least"),
    [
        ("0::/job/task", {}, 9_000_000 * 1024),
        ("0::/job/task", {"job/memory.max": 5000, "job/memory.current": 4000}, 1000),
        ("0::/job", {"job/memory.max": "max", "job/memory.current": 4000}, 9_000_000 * 1024),
        ("0::/job", {"job/memory.max": 5000, "job/memory.current": 6000}, 0),
        (
            "0::/job",
            {
                "job/memory.max": 5000,
                "job/memory.current": 4900,
                "job/memory.stat": "anon 800\nshmem 100\nactive_file 1500\ninactive_file 2500",
            },
            4100,
        ),
        (
            "4:memory:/job",
            {
                "memory/job/memory.limit_in_bytes": 5000,
                "memory/job/memory.usage_in_bytes": 4900,
                "memory/job/memory.stat": "active_file 1\ntotal_active_file 1500\ntotal_inactive_file 2500",
            },
            4100,
        ),
    ],
)
def test_available_memory_is_that_of_host_and_groups_without_file_cache(files, own, contents, least, tmp_path):
    host = tmp_path / "meminfo"
    host.write_text("MemTotal:       16000000 kB\nMemAvailable:    9000000 kB\nBuffers: 7 kB\n")
    assert cgroup.available_memory(*files(own, contents), host) == least


def test_available_memory_is_unknown_without_that_of_the_host(files, tmp_path):
    assert cgroup.available_memory(*files("0::/job", {"job/memory.max": 5000}), tmp_path / "none") is None
    assert (cgroup.available_memory() or 0) > 10**7, "this machine"


@pytest.mark.parametrize(
    ("own", "contents", "count"),
    [
        ("0::/job/task\n", {"job/task/memory.events": EVENTS.format(2), "memory.events": EVENTS.format(9)}, 2),
        ("4:memory:/job\n1:cpu:/job\n0::/\n", {"memory/job/memory.oom_control": CONTROL.format(3)}, 3),
        ("0::/of/host\n", {"memory.events": EVENTS.format(1)}, 1),
        ("5:devices:/\n4:cpu,memory:/a\n", {"memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"}, 0),
        ("", {}, 0),
    ],
)
def test_memory_kills_are_those_of_the_own_group(files, own, contents, count):
    assert cgroup.memory_kills(*files(own, contents)) == count


@pytest.mark.parametrize(
    ("line", "folder", "counted"),
    [
        ("3:cpu,cpuacct:/job/step", "cpu,cpuacct/job", "nr_throttled 9\nthrottled_time 2500000000"),
        ("3:cpu,cpuacct:/job/step", "cpu/job", "nr_throttled 9\nthrottled_time 2500000000"),
        ("0::/job/step", "job", "usage_usec 7\nthrottled_usec 2500000"),
    ],
)
def test_limit_of_an_outer_group_is_seen(files, line, folder, counted):
    own, mounts = files(f"5:memory:/other\n{line}\n", {})
    assert set(cgroup.throttled_seconds(own, mounts).values()) == {0.0}
    files(own.read_text(), {f"{folder}/cpu.stat": counted})
    counts = cgroup.throttled_seconds(own, mounts)
    assert counts.pop(str(mounts / folder)) == 2.5 and set(counts.values()) == {0.0}
    assert cgroup.throttled_seconds(mounts / "none", mounts) == {}


def test_each_group_counts_its_own_history(files):
    contents = {"job/step/cpu.stat": "throttled_usec 1500000", "job/cpu.stat": "throttled_usec 90000000"}
    own, mounts = files("0::/job/step\n", contents)
    counts = cgroup.throttled_seconds(own, mounts)
    assert counts == {str(mounts / "job/step"): 1.5, str(mounts / "job"): 90.0, str(mounts): 0.0}
