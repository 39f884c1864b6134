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
    assert throttled_seconds(str(tmp_path / "cgroup"), str(tmp_path)) == 0
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "cpu.stat").write_text(counted)
    assert throttled_seconds(str(tmp_path / "cgroup"), str(tmp_path)) == 2.5
    assert throttled_seconds(str(tmp_path / "none"), str(tmp_path)) == 0
