"""Which processes still run."""

from jobs.local import processes
from tests.threads import only_first_thread_ended


def test_a_process_runs_until_its_last_thread_ends():
    """A rank that was killed may still write in another thread when its first one is a zombie."""
    with only_first_thread_ended() as pid:
        start = processes.start_time(pid)
        assert processes.alive(pid, start) and processes.session(pid) == [pid]
        processes.kill_session(pid, start)
    assert not processes.alive(pid, start) and processes.session(pid) == []
