"""Background work: the fork server of processes, tasks shared out to processes, and threads that no exit waits for.

`run` maps tasks over processes of the fork server, for commands that read much and keep nothing in their processes.
`Background` runs one piece of work beside the caller's own; `Threads` answers requests to storage. Processes ignore the
signals that end the main one, hold nothing worth saving, and go when the main process goes. Threads are daemons, not
those of concurrent.futures, which the interpreter waits for at its end however long storage is away.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import connection, forkserver, resource_tracker, util
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from flip.distributed.shutdown import SIGNALS
from flip.runs.errors import FlipError
from flip.runs.rundir import OWNER, write_json

AHEAD = 2
"""Tasks that a process holds: one in work, one waiting."""

Task = TypeVar("Task")
Answer = TypeVar("Answer")
_ADDRESS = 107 - len("/pymp-abcdefgh/listener-abcdefgh")
"""Bytes of the folder below which multiprocessing's sockets lie: a Unix socket's path has no more than 107."""


def prepare_forkserver(torch: bool = False) -> None:
    """Start the fork server deaf to the signals that stop a run; this process's own handlers lose none meanwhile.

    Server and workers inherit a mask that blocks them. Ignoring them here for a moment would drop what comes then.

    What it imports here its workers need not import again. ``torch``: also torch, for ``resize: torchvision`` (it is
    right without, only slower to start and larger).
    """
    names = (*SIGNALS, signal.SIGINT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, names)
    # The server finds our modules by its environment: it does not get this process's sys.path.
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *([path] if path else [])])
    try:
        multiprocessing.get_context("forkserver").set_forkserver_preload(
            ["flip.data.worker_pool", *(["torch.nn.functional"] if torch else [])]
        )
        _leave_long_folder()
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, names)  # the line above unblocks some of them
        forkserver.ensure_running()
        _sign_folder()
    finally:
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_long_folder() -> None:
    """A job may have a TMPDIR of its own whose path is too long for a socket's: /tmp then, for sockets alone."""
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) > _ADDRESS:
        tempfile.tempdir = "/tmp"
        try:
            util.get_temp_dir()  # it is made once, and kept for this process and its children
        finally:
            tempfile.tempdir = usual


def _sign_folder() -> None:
    """Leave in multiprocessing's temporary folder whose it is, so that a later attempt can delete what a killed rank
    left."""
    if {"FLIP_RUN", "FLIP_ATTEMPT"} <= os.environ.keys():
        owner = {"run": os.environ["FLIP_RUN"], "attempt": int(os.environ["FLIP_ATTEMPT"])}
        with contextlib.suppress(OSError):
            write_json(Path(util.get_temp_dir()) / OWNER, owner)


def leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def run(
    prepare: Callable[..., Callable[[Task], Answer]], arguments: Sequence[Any], tasks: Iterable[Task], workers: int,
    name: str,
) -> Generator[Answer, None, None]:  # fmt: skip
    """The answer to each task, as it comes, in no order. ``prepare``: a function of a module; called in each process
    with ``arguments``, it returns what answers a task. ``workers``: processes; 0: this one does all itself, in order.

    Closing the iterator (Ctrl-C does) ends the processes at once. A FlipError of a process is raised here.
    """
    if not workers:
        yield from map(prepare(*arguments), tasks)
        return
    prepare_forkserver()
    context, pipes, processes = multiprocessing.get_context("forkserver"), [], list[ForkServerProcess]()
    try:
        for number in range(workers):
            ours, theirs = context.Pipe()
            work = (prepare, arguments, theirs)
            process = context.Process(target=_work, args=work, daemon=True, name=f"{name}-{number}")
            process.start()
            processes.append(process)  # only now: one that was never started cannot be killed
            theirs.close()  # so that the end of the process is the end of the pipe
            pipes.append(ours)
        yield from _share_out(iter(tasks), pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share_out(tasks: Iterator[Any], pipes: Sequence[connection.Connection]) -> Iterator[Any]:
    open_tasks = dict.fromkeys(pipes, 0)
    for pipe in [*pipes] * AHEAD:
        _give(tasks, pipe, open_tasks)
    while busy := [pipe for pipe, count in open_tasks.items() if count]:
        ready = connection.wait(busy)
        for pipe in (pipe for pipe in busy if pipe in ready):
            try:
                failed, answer = pipe.recv()
                open_tasks[pipe] -= 1
                if failed:
                    raise answer
                _give(tasks, pipe, open_tasks)
            except (EOFError, ConnectionError) as error:
                remedy = "Was it killed for its memory? Try again with fewer workers."
                raise FlipError("a working process ended by itself", remedy=remedy) from error
            yield answer


def _give(tasks: Iterator[Any], pipe: connection.Connection, open_tasks: dict[connection.Connection, int]) -> None:
    for task in tasks:
        open_tasks[pipe] += 1
        with suppress(ConnectionError):  # it has ended: what it said before is read from the pipe
            pipe.send(task)
        return


def _work(prepare: Callable[..., Callable[[Any], Any]], arguments: Sequence[Any], pipe: connection.Connection) -> None:
    for name in (*SIGNALS, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)  # Ctrl-C is the main process's to hear
    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        do = prepare(*arguments)
        while True:
            pipe.send((False, do(pipe.recv())))
    except FlipError as error:
        pipe.send((True, error))
    except (EOFError, ConnectionError):
        return  # the main process has closed its end: it wants no more


class Background:
    """At most one piece of work is under way. A daemon: a process that must end does not wait for it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._under_way: Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Start ``work`` in a thread of its own; what was begun before must have been waited for."""
        assert self._under_way is None, f"{self._name} is under way"
        future: Future[None] = Future()
        self._under_way = future

        def run() -> None:
            try:
                work()
            except BaseException as error:  # whatever it is, it belongs to whoever waits
                future.set_exception(error)
            else:
                future.set_result(None)

        threading.Thread(target=run, name=self._name, daemon=True).start()

    @property
    def failed(self) -> bool:
        """Whether ``wait`` would raise at once."""
        future = self._under_way
        return future is not None and future.done() and future.exception() is not None

    def wait(self) -> None:
        """Return when nothing is under way any more. Raises, once, what the work raised."""
        future, self._under_way = self._under_way, None
        if future is not None:
            future.result()


class Threads(Generic[Task, Answer]):
    """``work`` in ``count`` threads, first come, first served."""

    def __init__(self, work: Callable[[Task], Answer], count: int) -> None:
        self._work, self._open, self._count = work, True, count
        self._asked: SimpleQueue[tuple[Future[Answer], Task] | None] = SimpleQueue()
        for number in range(count):
            threading.Thread(target=self._serve, name=f"read-{number}", daemon=True).start()

    def submit(self, question: Task) -> Future[Answer]:
        future: Future[Answer] = Future()
        self._asked.put((future, question))
        return future

    def close(self) -> None:
        """Forget what is not begun; nobody waits for the rest."""
        self._open = False
        for _ in range(self._count):
            self._asked.put(None)

    def _serve(self) -> None:
        while (asked := self._asked.get()) is not None and self._open:
            future, question = asked
            try:
                future.set_result(self._work(question))
            except BaseException as error:  # whatever it is, it belongs to whoever asks for the answer
                future.set_exception(error)
