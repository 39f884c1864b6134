"""Background work: the fork server, a parallel map over its processes, and daemon threads.

Worker processes ignore the signals that stop a run, hold nothing worth saving, and exit when the main process exits.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from multiprocessing import connection, forkserver, resource_tracker, util
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from flip.common.shutdown import SIGNALS
from flip.files import python_path
from flip.runs import temporary_folders
from flip.runs.credentials import scrub_stderr
from flip.runs.errors import FlipError, describe
from flip.runs.rundir import OWNER, RunDir

Task = TypeVar("Task")
Result = TypeVar("Result")
_MAX_TMPDIR = 107 - len("/pymp-abcdefgh/listener-abcdefgh")
"""Bytes of the path below which multiprocessing creates its sockets: the path of a Unix socket has at most 107."""


def prepare_forkserver() -> None:
    """Start the fork server with the signals that stop a run blocked; server and workers inherit the mask.

    Ignoring the signals instead would lose those that arrive meanwhile.
    """
    names = (*SIGNALS, signal.SIGINT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, names)
    try:
        # The server finds our modules by its environment: it does not get this process's sys.path.
        with python_path.for_children(python_path.ROOT):
            multiprocessing.get_context("forkserver").set_forkserver_preload(["flip.data.worker_pool"])
            _avoid_long_tmpdir()
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, names)  # the line above unblocks some of them
            forkserver.ensure_running()
            _claim_folder()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _avoid_long_tmpdir() -> None:
    """Create multiprocessing's folder in /tmp if the path of TMPDIR is too long for sockets."""
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) > _MAX_TMPDIR:
        tempfile.tempdir = "/tmp"
        try:
            util.get_temp_dir()  # created once, for this process and its children
        finally:
            tempfile.tempdir = usual


def _claim_folder() -> None:
    """Record who owns multiprocessing's folder, and delete those of processes that were killed."""
    folder = Path(util.get_temp_dir())
    with contextlib.suppress(OSError):
        if {"FLIP_RUN", "FLIP_ATTEMPT"} <= os.environ.keys():
            temporary_folders.claim(folder, RunDir(os.environ["FLIP_RUN"]), int(os.environ["FLIP_ATTEMPT"]))
        elif not (folder / OWNER).exists():
            temporary_folders.claim(folder)
    temporary_folders.delete_left()


def leave_with_parent() -> None:
    """Wait for the end of the parent process, then end this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Processes that are started inside do not import the program's main module.

    They need nothing of it, and a script without ``if __name__ == "__main__"`` would train again in each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def data_loader_workers() -> int:
    """The number of worker processes of the torch DataLoader that runs this code; 0 outside of such processes."""
    torch = sys.modules.get("torch.utils.data")  # loaded in each worker of a DataLoader
    worker = torch and torch.get_worker_info()
    return worker.num_workers if worker else 0


def unexpected_error(error: Exception) -> dict[str, Any]:
    """An unexpected error of a worker as plain data, for ``received_error`` in the main process."""
    kind = ""
    for known in (MemoryError, OSError):
        if isinstance(error, known):
            kind = known.__name__
    return {"kind": kind, "errno": getattr(error, "errno", None), "unexpected": describe(error)}


def received_error(record: dict[str, Any], process: str) -> Exception:
    """The error for ``unexpected_error`` of a worker: MemoryError and OSError, which decide whether a run is started
    again, keep their class; others become RuntimeError. The message has class and notes of the original."""
    text = f"{process} ended: {record['unexpected']}"
    if record["kind"] == "MemoryError":
        return MemoryError(text)
    if record["kind"] == "OSError":
        return OSError(record["errno"], text)
    return RuntimeError(text)


def map_in_processes(
    prepare: Callable[..., Callable[[Task], Result]], arguments: Sequence[Any], tasks: Iterable[Task], workers: int,
    name: str,
) -> Generator[Result, None, None]:  # fmt: skip
    """Yield the result of each task as soon as it is ready, in no order. Raises the error of a process: a FlipError as
    it is, others as ``received_error``.

    Closing the iterator (Ctrl-C does) ends the processes at once.

    Args:
        prepare: function of a module; called in each process with ``arguments``, it returns the function of a task.
        workers: number of processes; with 0, this process does everything, in order.
        name: prefix of the names of the processes.
    """
    if not workers:
        yield from map(prepare(*arguments), tasks)
        return
    prepare_forkserver()
    context = multiprocessing.get_context("forkserver")
    pipes = []
    processes = list[ForkServerProcess]()
    try:
        for number in range(workers):
            pipe, worker_end = context.Pipe()
            work = (prepare, arguments, worker_end)
            process = context.Process(target=_work, args=work, daemon=True, name=f"{name}-{number}")
            process.start()
            processes.append(process)  # only now: a process that never started cannot be killed
            worker_end.close()  # so that the end of the process is the end of the pipe
            pipes.append(pipe)
        yield from _distribute(iter(tasks), pipes)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _distribute(tasks: Iterator[Any], pipes: Sequence[connection.Connection]) -> Iterator[Any]:
    busy = [pipe for pipe in pipes if _send_next(tasks, pipe)]
    while busy:
        ready = connection.wait(busy)
        for pipe in [pipe for pipe in busy if pipe in ready]:
            try:
                failed, result = pipe.recv()
            except (EOFError, ConnectionError) as error:
                remedy = "Was it killed for its memory? Try again with fewer workers."
                raise FlipError("a worker process ended by itself", remedy=remedy) from error
            if failed:
                raise result
            if not _send_next(tasks, pipe):
                busy.remove(pipe)
            yield result


def _send_next(tasks: Iterator[Any], pipe: connection.Connection) -> bool:
    """Send the next task, if any, to a process that has none: a busy one may wait until its result is read."""
    for task in tasks:
        with contextlib.suppress(ConnectionError):  # it has ended; an error that it sent before is still in the pipe
            pipe.send(task)
        return True
    return False


def _work(prepare: Callable[..., Callable[[Any], Any]], arguments: Sequence[Any], pipe: connection.Connection) -> None:
    for name in (*SIGNALS, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)  # the main process handles Ctrl-C
    scrub_stderr()
    threading.Thread(target=leave_with_parent, daemon=True).start()
    try:
        function = prepare(*arguments)
        while True:
            pipe.send((False, function(pipe.recv())))
    except FlipError as error:
        pipe.send((True, error))
    except (EOFError, ConnectionError):
        return  # the main process has closed its end
    except Exception as error:  # the outermost frame: any error must reach the main process
        pipe.send((True, received_error(unexpected_error(error), multiprocessing.current_process().name)))
        raise  # prints the traceback


class DaemonExecutor:
    """Runs calls in ``threads`` daemon threads, first come, first served.

    The interpreter waits at its exit for threads of concurrent.futures, however long storage is away; not for these.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._threads = threads
        self._closed = False
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        for number in range(threads):
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True).start()

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Queue a call and return its future, which cannot be cancelled."""
        future: Future[Result] = Future()

        def call() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # any error belongs to the caller of result()
                future.set_exception(error)

        self._queue.put(call)
        return future

    def close(self) -> None:
        """Drop the calls that have not started. Running calls are not waited for."""
        self._closed = True
        for _ in range(self._threads):
            self._queue.put(None)

    def _serve(self) -> None:
        while (call := self._queue.get()) is not None and not self._closed:
            call()
            del call  # frees the arguments while the thread waits
