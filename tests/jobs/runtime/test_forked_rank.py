"""Tests when a process may be forked. ``test_node_agent.py`` forks ranks."""

from jobs.runtime import forked_rank


def test_process_that_has_opened_a_gpu_is_not_forked(tmp_path):
    (tmp_path / "task" / "1").mkdir(parents=True)
    (tmp_path / "fd").mkdir()
    (tmp_path / "fd" / "0").symlink_to("/dev/null")
    assert forked_rank.why_unsafe_to_fork(tmp_path) == ""
    (tmp_path / "fd" / "7").symlink_to("/dev/nvidiactl")
    assert forked_rank.why_unsafe_to_fork(tmp_path) == "the agent has opened a GPU"
    assert forked_rank.why_unsafe_to_fork(tmp_path / "elsewhere") == "this system has no /proc"
