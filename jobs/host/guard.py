"""A process beside the owner of a job (``job.py``) that restarts the job if the owner is killed, or hangs.

The owner forks it before it opens any file, and again if it was killed. It opens no file before it has restarted the
job, so that no file system stops it. Through a pipe it hears what it needs: lines ``NAME=VALUE`` with the newest
attempt, what the next start needs, and ``over=1`` before the owner ends. Any other end of the owner is one that
nobody wanted. A line ``beat=1`` says that the owner is at work: an owner without it hangs in a call of a file system,
and then the guard looks at the job in its place. Standard library, Python >= 3.6.
"""

import os
import select
import signal
import time
from typing import Any, Callable, Dict, NoReturn, Optional

BEAT_SECONDS = 5.0  # between two beats of the owner
SILENT_SECONDS = 120.0  # without a beat after which the guard looks at the job; calls of Slurm last up to 30 s
FOREVER = float("inf")
ANSWER_SECONDS = 1.5  # that an owner has to notice TERM, which Slurm sends to both when it ends the job
HURRIED_BEAT_SECONDS = 0.5  # between two beats from then on

Heard = Dict[str, str]
"""The newest value of each name that the owner has sent."""


class Guard:
    """The owner's end of the pipe.

    ``on_gone``: called in the guard when the owner is gone without ``over``. ``on_silent``: called in the guard while
    the owner hangs; returns the seconds until the next call, None if there is nothing more to do.
    """

    def __init__(self, on_gone: Callable[[Heard], Any], on_silent: Callable[[Heard], Optional[float]]) -> None:
        self._on_gone = on_gone
        self._on_silent = on_silent
        self._facts: Heard = {}
        self._is_behind = False
        """Whether the guard lacks some of them: it was stopped, and its pipe was full."""
        self._beat_seconds = BEAT_SECONDS
        self._beat_due = 0.0
        self._fork()

    def say(self, **fields: Any) -> None:
        """Let the guard know these facts."""
        self._facts.update({name: str(value) for name, value in fields.items()})
        self._send(fields)

    def beat(self) -> None:
        """Say that the owner is at work, if that is due. Also notices that the guard was killed."""
        if time.monotonic() >= self._beat_due:
            self._beat_due = time.monotonic() + self._beat_seconds
            self._send({"beat": 1})

    def hurry(self) -> None:
        """Beat often from now on: perhaps Slurm ends the job, and the guard waits for a sign of the owner. It may
        notice that after the first."""
        self._beat_seconds = HURRIED_BEAT_SECONDS
        self._beat_due = 0.0

    def _send(self, fields: Dict[str, Any]) -> None:
        if self._is_behind:
            fields = dict(self._facts, **fields)
        text = "".join("%s=%s\n" % pair for pair in sorted(fields.items()))
        try:
            os.write(self._pipe, text.encode())
            self._is_behind = False
        except BlockingIOError:
            self._is_behind = True
        except OSError:
            self._replace()

    def _replace(self) -> None:
        """Fork another guard in place of one that was killed."""
        os.close(self._pipe)
        try:
            os.waitpid(self._pid, os.WNOHANG)
        except ChildProcessError:
            pass
        self._is_behind = False
        self._fork()

    def _fork(self) -> None:
        read, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._pid = os.fork()
        if self._pid == 0:
            _run(read, self._on_gone, self._on_silent, self._facts)
        os.close(read)


def _run(
    pipe: int, on_gone: Callable[[Heard], Any], on_silent: Callable[[Heard], Optional[float]], heard: Heard
) -> NoReturn:
    try:
        _close_others(pipe)
        serve(pipe, on_gone, on_silent, heard)
    finally:
        os._exit(0)


def _close_others(pipe: int) -> None:
    """Close all descriptors but the pipe and the standard ones: agents notice the end of the owner by its sockets."""
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number > 2 and number != pipe:
            try:
                os.close(number)
            except OSError:  # that of the listing itself
                pass


def serve(
    pipe: int, on_gone: Callable[[Heard], Any], on_silent: Callable[[Heard], Optional[float]], heard: Heard
) -> None:
    """Listen to the owner until it has ended. ``heard``: what an earlier guard has heard."""
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # read by sigtimedwait
    rest = b""
    look_at = time.monotonic() + SILENT_SECONDS
    while True:
        data = _read(pipe, look_at - time.monotonic())
        now = time.monotonic()
        if data == b"":
            break
        if data is not None:
            lines = (rest + data).split(b"\n")
            rest = lines.pop()
            for line in lines:
                name, _, value = line.decode().partition("=")
                heard[name] = value
            look_at = now + SILENT_SECONDS
        elif now >= look_at:
            pause = FOREVER if heard.get("over") == "1" else on_silent(heard)
            if pause is None:
                return
            look_at = time.monotonic() + pause
        if _term_came():
            look_at = min(look_at, time.monotonic() + ANSWER_SECONDS)
    if heard.get("over") != "1":
        on_gone(heard)


def _read(pipe: int, seconds: float) -> Optional[bytes]:
    """What the owner has sent, b"" at its end, None if nothing comes within ``seconds``, or a second of them."""
    ready = select.select([pipe], [], [], min(1.0, max(0.0, seconds)))[0]
    if not ready:
        return None
    return os.read(pipe, 4096)


def _term_came() -> bool:
    return signal.sigtimedwait([signal.SIGTERM], 0) is not None
