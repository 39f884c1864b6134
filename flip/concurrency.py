"""Tasks shared out to processes of the fork server, for commands that read much and keep nothing in their processes.

The processes ignore the signals that end the main one, hold nothing worth saving, and go when the main process goes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from typing import Any, TypeVar

from flip.data.worker_pool import leave_with_parent, prepare_forkserver
from flip.distributed.shutdown import SIGNALS
from flip.runs.errors import FlipError

AHEAD = 2
"""Tasks that a process holds: one in work, one waiting."""

Task = TypeVar("Task")
Answer = TypeVar("Answer")


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
            processes.append(context.Process(target=_work, args=work, daemon=True, name=f"{name}-{number}"))
            processes[-1].start()
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
