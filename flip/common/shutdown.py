"""Stops a run: signals and files set a flag, all ranks agree on the step, and watchers end a process that hangs or has
lost a peer.

docs/restarts.md, Stop and resume, has the rules. This file imports no torch: the signal handlers are installed before
anything slow is loaded.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from flip.runs.errors import CAUSES, HANG, STOPPED
from flip.runs.rundir import RunDir, exists

log = logging.getLogger(__name__)

ORPHAN_GRACE_SECONDS = 90.0
"""Time to save and exit after the supervisor has died."""

LIFELINE_VARIABLE = "FLIP_LIFELINE_FD"
"""Environment variable with the descriptor of the lifeline: the pipe whose end of file tells ranks that their
supervisor is gone. A supervisor may start ranks of another release, so that the name does not change."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGUSR1)
"""What a cluster sends: SIGTERM (preemption, time limit, cancel) and the warning signal; SIGUSR1 means the same."""

PEER_GRACE_SECONDS = 10.0
"""Time to end by itself after another rank has ended. Over gloo the next collective raises an error at once."""

EndCallback = Callable[[str, str], None]
"""Called with the cause (``flip.runs.errors.CAUSES``) and a message before a watcher ends this process."""

CANCELLED = "cancelled"
"""Reason of a stop because cancel.json exists."""

STOPPED_SECONDS = 30.0
"""A thread that was not scheduled for longer belongs to a process that was stopped."""

LONG_OPERATION_FACTOR = 6.0
"""Starting, saving and evaluation jobs may take this many times longer than a step: rank 0 alone hashes."""


CONNECT_SECONDS = 120.0
"""Limit of each step in which ranks that have all started connect to each other: creating a group, its first
collective. A group that does not come up has a cause that waiting does not remove."""

COMPILE_MINUTES = 20.0
"""The first step of a stage, which compiles the blocks, may take at least this long."""


class StopFlag:
    """Set by a signal, by the supervisor's death, or by the trainer itself. It is never cleared."""

    def __init__(self) -> None:
        self.reason = ""
        self.signal = ""
        """Name of the first signal, if a signal set the flag."""
        self._callback: Callable[[], None] | None = None

    def on_set(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` when the flag is set, or now if it is: a process may be killed before it can record why.

        A signal during this method may cause a second call.
        """
        self._callback = callback
        if self.reason:  # by a signal that waited for ``install``
            callback()

    def set(self, reason: str, signal_name: str = "") -> None:
        if not self.reason:
            self.reason = reason
            self.signal = signal_name
            if self._callback is not None:
                self._callback()

    def __bool__(self) -> bool:
        return bool(self.reason)


def install() -> StopFlag:
    """Install the signal handlers, and watch the lifeline if LIFELINE_VARIABLE names its descriptor."""
    flag = StopFlag()
    for number in SIGNALS:
        signal.signal(number, lambda n, _frame: flag.set(f"signal {signal.Signals(n).name}", signal.Signals(n).name))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # jobs/host/rank_entry.py blocks them until here
    lifeline = os.environ.pop(LIFELINE_VARIABLE, "")
    if lifeline:
        threading.Thread(target=_watch_lifeline, args=(int(lifeline), flag), name="lifeline", daemon=True).start()
    return flag


def _watch_lifeline(descriptor: int, flag: StopFlag) -> None:
    """Set the flag at the end of file of the lifeline, the pipe whose other end the supervisor holds."""
    os.set_inheritable(descriptor, False)  # a loader's worker must not hold the pipe open
    while os.read(descriptor, 1):
        pass
    flag.set("the supervisor is gone")
    time.sleep(ORPHAN_GRACE_SECONDS)
    os._exit(STOPPED)  # stuck in code that does not read the flag, such as waiting for ranks that never came


class RunWatcher:
    """Sets the stop flag when the run is cancelled or a newer attempt takes it over.

    A thread polls the run directory once a second, so that a file system that stalls never stalls a training step.
    """

    def __init__(self, run: RunDir, attempt: int, flag: StopFlag, seconds: float = 1.0) -> None:
        self._run = run
        self._attempt = attempt
        self._flag = flag
        self._seconds = seconds
        self._closed = threading.Event()

    def start(self) -> None:
        """Poll once now, since the cancelling signal may have come before its handler was installed; then regularly."""
        self._poll()
        threading.Thread(target=self._watch, name="run-watcher", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._flag and not self._closed.wait(self._seconds):
            self._poll()

    def _poll(self) -> None:
        try:
            if not self._run.is_current_attempt(self._attempt):
                self._flag.set("superseded by a newer attempt")
            elif exists(self._run.cancel):
                self._flag.set(CANCELLED)
        except OSError as error:  # a save, which needs the file system, reports it as a storage error
            log.warning("the run directory cannot be read, retried in %g s: %s", self._seconds, error)


class CoordinatedStop:
    """Lets all ranks learn at the same step that a rank wants to stop, or that rank 0 wants to save.

    An all-reduce of two numbers runs during the step and is read later, so no rank waits for the slowest (0.4 ms a step
    instead of 7 ms with four processes on two cores; measured). On CPUs it runs over ``group``, a gloo group of all
    ``size`` ranks, and is read at the next call. With ``with_statistics``, for GPUs, the trainer appends the numbers to
    the statistics of a step before their all-reduce, since gloo's ring takes a thousand hops among 512 ranks. They are
    read a step later still: then the device has finished that step, and the host does not wait for it.
    """

    def __init__(self, group: Any, size: int, with_statistics: bool = False) -> None:
        self._group = group
        self._size = size
        self._with_statistics = with_statistics and size > 1
        self._request = False, False
        self._stop = False
        """Agreed. It stays, as what a rank sets to request a stop is never cleared."""
        self._pending: deque[tuple[Any, Any]] = deque()
        """(what to wait for or None, (2,) sums on the host) of calls whose result was not read yet."""

    def poll(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """(stop, save) as agreed by an earlier call of all ranks; with one rank, as given. A collective."""
        if self._size == 1:
            return stop, save
        agreed_save = self._read(leave=1 if self._with_statistics else 0)
        if self._with_statistics:
            self._request = stop, save
        else:
            self._all_reduce(stop, save)
        return self._stop, agreed_save

    def poll_blocking(self, stop: bool) -> bool:
        """Whether a rank wants to stop as of this call; waits for the slowest rank. A collective."""
        if self._size == 1:
            return stop
        self.flush()
        self._all_reduce(stop, False)
        self.flush()
        return self._stop

    def flush(self) -> None:
        """Wait for the all-reduces, so that the group is free for other use. Call it before a save.

        The next ``poll`` returns a stop that they agreed on. Requests to save are dropped, this step's too.
        """
        self._read(leave=0)
        self._request = self._request[0], False

    def requests(self, device: Any) -> Any:
        """This rank's requests for ``mean_over_ranks``, (2,) fp32 on the device; None if they do not travel with the
        statistics."""
        if not self._with_statistics:
            return None
        import torch

        request = torch.tensor(self._request, dtype=torch.float32)
        if device.type == "cuda":
            return request.pin_memory().to(device, non_blocking=True)
        return request

    def submit(self, requests: Any) -> None:
        """Copy the sums of ``requests`` over ranks to the host. Call it after the step is launched."""
        if requests is None:
            return
        if not requests.is_cuda:
            self._pending.append((None, requests))
            return
        import torch

        host = torch.empty(2, pin_memory=True)
        event = torch.cuda.Event(blocking=True)
        host.copy_(requests, non_blocking=True)
        event.record()
        self._pending.append((event.synchronize, host))

    def _all_reduce(self, stop: bool, save: bool) -> None:
        import torch
        from torch import distributed

        request = torch.tensor([float(stop), float(save)])
        work = distributed.all_reduce(request, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending.append((work.wait, request))

    def _read(self, leave: int) -> bool:
        """Read all results but the newest ``leave``; whether one of them is a request to save."""
        agreed_save = False
        while len(self._pending) > leave:
            wait, sums = self._pending.popleft()
            if wait is not None:
                wait()
            self._stop = self._stop or bool(sums[0] > 0)
            agreed_save = agreed_save or bool(sums[1] > 0)
        return agreed_save


class PeerWatcher:
    """Ends this process if another rank has ended without ``close``, whatever this rank waits for: code 70.

    A GPU waits for a collective of NCCL without end if a peer is gone. So rank r waits in a thread for a byte from rank
    r + 1, over a connection that breaks when that process ends, and passes the loss on to rank r - 1: all know within
    milliseconds. A machine that vanishes breaks no connection; then Slurm or the watchdog ends the ranks.

    ``group``: a gloo group of all ``size`` ranks. ``on_end`` gets the cause peer_lost after ``seconds`` in which the
    main thread may end by itself.
    """

    _TAG = 1
    _CLOSED = 0
    _LOST = 1

    def __init__(
        self, group: Any, rank: int, size: int, on_end: EndCallback, seconds: float = PEER_GRACE_SECONDS
    ) -> None:
        self._group = group
        self._rank = rank
        self._size = size
        self._on_end = on_end
        self._seconds = seconds
        if size > 1:
            threading.Thread(target=self._watch, name="peer-watcher", daemon=True).start()

    def close(self) -> None:
        """This rank is about to end as agreed by all."""
        if self._size > 1:
            self._send(self._CLOSED)

    def _send(self, state: int) -> None:
        import torch
        from torch import distributed

        # A rank that has ended breaks the connection, or gloo waits for it without end: hence the limit.
        with contextlib.suppress(RuntimeError):
            byte = torch.tensor([state], dtype=torch.uint8)
            peer = (self._rank - 1) % self._size
            work = distributed.isend(byte, group=self._group, group_dst=peer, tag=self._TAG)
            assert work is not None
            work.wait(datetime.timedelta(seconds=self._seconds))

    def _watch(self) -> None:
        import torch
        from torch import distributed

        byte = torch.empty(1, dtype=torch.uint8)
        peer = (self._rank + 1) % self._size
        try:
            work = distributed.irecv(byte, group=self._group, group_src=peer, tag=self._TAG)
            assert work is not None
            work.wait(datetime.timedelta(days=1000))
            message = ""
            if int(byte) == self._LOST:
                message = "another rank has ended"
        except RuntimeError as error:
            message = f"rank {peer} has ended: {error}"
        if message:
            self._send(self._LOST)
            time.sleep(self._seconds)
            try:
                self._on_end("peer_lost", message)
            finally:
                os._exit(CAUSES["peer_lost"])


def flight_record() -> bytes:
    """The newest collectives of this process, from PyTorch's flight recorder: JSON, empty if there are none."""
    c10d: Any = sys.modules.get("torch._C._distributed_c10d")  # absent if torch was not loaded yet
    dump = getattr(c10d, "_dump_nccl_trace_json", None) or getattr(c10d, "_dump_fr_trace_json", None)
    return dump() if dump is not None else b""


class Watchdog:
    """Ends a process that makes no progress: without a ``heartbeat`` for ``seconds`` it exits with code 71.

    Before that it writes the stacks of all threads to stderr and calls ``on_end`` with cause hang. The time to the
    first heartbeat is ``LONG_OPERATION_FACTOR`` times as long. While the process is stopped, as in a job that Slurm
    suspends, no time passes. ``seconds`` 0: never. A thread that holds the interpreter's lock for good stops this one
    too; then the ranks that wait for it end.
    """

    def __init__(self, seconds: float, on_end: EndCallback) -> None:
        self._seconds = seconds
        self._on_end = on_end
        self._closed = threading.Event()
        self.heartbeat("starting", LONG_OPERATION_FACTOR)
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def heartbeat(self, what: str, times: float = 1.0, at_least: float = 0.0) -> None:
        """Report progress; ``what`` comes next and may take ``times`` the seconds, or ``at_least`` so many."""
        self._expected = what, max(times * self._seconds, at_least), time.monotonic()

    @contextlib.contextmanager
    def connecting(self, what: str) -> Iterator[None]:
        """Around a step in which ranks connect to each other: it may take CONNECT_SECONDS. Progress at its end."""
        before, seconds, _ = self._expected
        self._expected = what, CONNECT_SECONDS, time.monotonic()
        yield
        self._expected = before, seconds, time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        stopped = 0.0  # for which this process was stopped since the heartbeat
        looked = time.monotonic()
        before = self._expected
        while not self._closed.wait(min(1.0, self._seconds / 10)):
            expected = self._expected
            now = time.monotonic()
            what, allowed, since = expected
            if expected is not before:
                stopped = 0.0
            if now - looked > STOPPED_SECONDS:
                stopped += now - max(looked, since)
            looked = now
            before = expected
            waited = now - since - stopped
            if waited > allowed:
                break
        else:
            return
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        try:
            self._on_end("hang", f"no progress for {waited:.0f} s: {what}; the stacks are in the log")
        finally:
            os._exit(HANG)
