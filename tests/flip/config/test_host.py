"""Tests of what a machine offers."""

import pytest

from flip.config.host import throttled_seconds


@pytest.mark.parametrize(
    ("line", "folder", "counted"),
    [
        ("3:cpu,cpuacct:/job/step", "cpu,cpuacct/job", "nr_throttled 9\nthrottled_time 2500000000\n"),
        ("0::/job/step", "job", "usage_usec 7\nthrottled_usec 2500000\n"),
    ],
)
def test_limit_of_an_outer_group_is_seen(tmp_path, line, folder, counted):
    (tmp_path / "cgroup").write_text(f"5:memory:/other\n{line}\n")
    assert set(throttled_seconds(str(tmp_path / "cgroup"), str(tmp_path)).values()) == {0.0}
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "cpu.stat").write_text(counted)
    counts = throttled_seconds(str(tmp_path / "cgroup"), str(tmp_path))
    assert counts.pop(str(tmp_path / folder)) == 2.5 and set(counts.values()) == {0.0}
    assert throttled_seconds(str(tmp_path / "none"), str(tmp_path)) == {}


def test_each_group_counts_its_own_history(tmp_path):
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    for folder, microseconds in (("job/step", 1_500_000), ("job", 90_000_000)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "cpu.stat").write_text(f"throttled_usec {microseconds}\n")
    counts = throttled_seconds(str(tmp_path / "cgroup"), str(tmp_path))
    assert counts == {str(tmp_path / "job/step"): 1.5, str(tmp_path / "job"): 90.0, str(tmp_path): 0.0}
