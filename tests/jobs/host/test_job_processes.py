"""Tests of the processes of a job: followers that still send are waited for, with pauses and until a deadline."""

import signal

from jobs.host import job_processes
from jobs.host.job_processes import JobProcesses


class Follower:
    """Ends after a number of looks."""

    pid = 1

    def __init__(self, looks):
        self.looks = looks
        self.signals = []

    def poll(self):
        self.looks -= 1
        return 0 if self.looks < 0 else None

    def send_signal(self, number):
        self.signals.append(number)


def test_followers_are_signalled_and_waited_for_with_pauses():
    follower = Follower(3)
    started = iter([Follower(9), follower])
    processes = JobProcesses(lambda *_: next(started), lambda action: action(None), print)
    processes.start_step("ranks", 1)
    processes.start_followers(["wandb"])
    pauses = []
    processes.end_followers(pauses.append)
    assert follower.signals == [signal.SIGUSR1]
    assert pauses == [job_processes.POLL_SECONDS] * 2  # the first of three looks decides about the signal
