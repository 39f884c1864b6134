"""A command as the first process of a container (process 1), which the kernel treats unlike others.

Process 1 inherits every process whose parent has ended, such as a supervisor, and must reap it; a signal without a
handler does not reach it; and its end kills all others. ``run_below`` leaves these duties to this process, and the
command to a child.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

LEFT_SECONDS = 20.0
"""How long processes that are left, such as followers of trackers, may take to end after the command."""


def is_first() -> bool:
    """Whether this is process 1 of its container, pod or PID namespace."""
    return os.getpid() == 1


def run_below(work: Callable[[], int], forwarded: Sequence[signal.Signals]) -> int:
    """Run a command in a child process, pass signals on to it, and reap all processes. Returns its exit code.

    Call it before threads start. As long as the command runs, ``forwarded`` reach it alone.
    """
    handlers = {number: signal.getsignal(number) for number in forwarded}
    signal.pthread_sigmask(signal.SIG_BLOCK, forwarded)  # until there is a child that can receive them
    child = os.fork()
    if child == 0:
        _lead_terminal()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
        return work()
    for number in forwarded:
        if handlers[number] is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: _send(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, forwarded)
    code = _reap_until(child)
    _reap_left()
    sys.stdout.flush()
    os._exit(code)  # the handlers at exit, and the rest of this call, are the child's


def _lead_terminal() -> None:
    """Give this process the terminal, if there is one: its Ctrl-C then comes once, not from process 1 too."""
    os.setpgid(0, 0)
    if not os.isatty(0):
        return
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # it is not the terminal that controls this process
        os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, before)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _reap_until(child: int) -> int:
    """The exit code of a child, as a shell shows it. Reaps all that end before it."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _reap_left() -> None:
    until = time.monotonic() + LEFT_SECONDS
    while time.monotonic() < until:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.05)
