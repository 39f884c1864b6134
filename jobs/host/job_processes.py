"""The processes that the owner of a job starts by the batch script: the step of agents or ranks, and the followers.

A step is srun with what it starts on the nodes. A follower sends the metrics of a run to a tracker; one process serves
all attempts of a job. They have the environment that the setup lines of the profile leave. Standard library,
Python >= 3.6.
"""

import signal
import time
from typing import Any, Callable, List, Optional, Sequence

from jobs.host.rank_step import exit_code

POLL_SECONDS = 0.2  # between two looks whether they have ended
STEP_EXIT_SECONDS = 20.0  # for srun to end after all node agents have ended their ranks and have left
FOLLOWER_SECONDS = 60.0  # for trackers to get the last values


class JobProcesses:
    """The step and the followers of a job.

    ``start``: starts the batch script with these words as arguments; returns the process. ``retry``: calls it until
    its files are there.
    """

    def __init__(
        self, start: Callable[..., Any], retry: Callable[[Callable[[Any], Any]], Any], log: Callable[[object], None]
    ) -> None:
        self.step: Any = None
        """The process of the step; None before the first one."""
        self._start = start
        self._retry = retry
        self._log = log
        self._followers: List[Any] = []
        self._unsent = 0
        """A signal that came while a step starts, which this process does not know yet."""

    def start_step(self, kind: str, nodes: int) -> None:
        """Start the step of ``nodes`` node agents (``agents``) or of ranks (``ranks``). Raises what ``retry`` does."""
        self._unsent = 0
        self.step = self._retry(lambda error: self._start("step", kind, str(nodes)))
        if self._unsent:
            self.signal_step(self._unsent)

    def start_followers(self, trackers: Sequence[str]) -> None:
        """Start a follower for each tracker, once in a job. A run does not depend on them."""
        if self._followers:
            return
        for name in trackers:
            try:
                self._followers.append(self._start("follow", name, str(self.step.pid)))
            except OSError as error:
                self._log("no follower for %s: %s" % (name, error))

    def signal_step(self, number: int) -> None:
        """Send a signal to srun, which passes it on, or to the step that is being started, as soon as it runs."""
        self._unsent = number
        if self.has_step():
            self._unsent = 0
            self.step.send_signal(number)

    def has_step(self) -> bool:
        """Whether a step runs."""
        return self.step is not None and self.step.poll() is None

    def code_of_step(self) -> Optional[int]:
        """The exit code of srun, as a shell shows it; None while it runs."""
        return exit_code(self.step.poll())

    def end_step(self, wait: Callable[[float], None]) -> None:
        """Wait for the step of agents that have left, and kill srun if it outlives them: it waits for the task of a
        lost node until Slurm notices the loss, for ever if the node is back before that."""
        deadline = time.monotonic() + STEP_EXIT_SECONDS
        while self.has_step() and time.monotonic() < deadline:
            wait(POLL_SECONDS)
        if self.has_step():
            self._log("srun was killed: all node agents have left, and Slurm did not notice the end of a lost one")
            self.step.kill()

    def end_followers(self, pause: Callable[[float], None]) -> None:
        """Wait for the followers; what is not sent then, the next attempt sends."""
        deadline = time.monotonic() + FOLLOWER_SECONDS
        for process in self._followers:
            if process.poll() is None:  # followers of a job do not end with an attempt
                process.send_signal(signal.SIGUSR1)
        for process in self._followers:
            while process.poll() is None and time.monotonic() < deadline:
                pause(POLL_SECONDS)
