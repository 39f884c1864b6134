"""Rank processes of a test, without the commands that start ranks otherwise.

They are forked from a process that has imported torch and the trainer, which takes about four seconds of processor time
in each process that is started from nothing.
"""

import atexit
import functools
import os
import time
import traceback
from multiprocessing import connection, get_context


def run_ranks(work, world, *args, seconds=240):
    """Return what ``work(rank, *args)`` returns in each of ``world`` processes, in their order. Fail if one raises, or
    if they take longer than ``seconds``."""
    starter = _starter()
    starter.send((work, world, args, seconds, dict(os.environ), os.getcwd()))
    failure, answers = starter.recv()
    assert failure is None, failure
    return answers


@functools.cache
def _starter():
    """The connection to the process that forks ranks. That process ends when the connection closes."""
    context = get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_serve, args=(there,)).start()
    there.close()
    atexit.register(here.close)
    return here


def _serve(requests):
    import torch._dynamo  # noqa: F401 - the first optimiser imports it

    import flip.training.trainer  # noqa: F401

    while True:
        try:
            work, world, args, seconds, environment, folder = requests.recv()
        except EOFError:
            return
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        requests.send(_fork_ranks(work, world, args, seconds))


def _fork_ranks(work, world, args, seconds):
    """Return (None, answers of all ranks), or (the first failure, ())."""
    end = time.monotonic() + seconds
    processes = []
    waiting = {}
    answers = {}
    try:
        for rank in range(world):
            reader, writer = get_context("fork").Pipe(duplex=False)
            processes.append(get_context("fork").Process(target=_rank_main, args=(writer, work, rank, args)))
            processes[-1].start()
            writer.close()  # the rank has the only one, so that its death ends the wait
            waiting[reader] = rank
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                return f"ranks {sorted(waiting.values())} did not answer in {seconds} s", ()
            for reader in ready:
                rank = waiting.pop(reader)
                failure, answers[rank] = _answer(reader)
                if failure is not None:
                    return f"rank {rank}: {failure}", ()
        for process in processes:
            process.join(60)
        return None, [answers[rank] for rank in range(world)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(reader):
    try:
        return reader.recv()
    except EOFError:
        return "ended without an answer", None


def _rank_main(answers, work, rank, args):
    try:
        result = work(rank, *args)
    except BaseException:  # also SystemExit: the other ranks would wait
        answers.send((traceback.format_exc(), None))
    else:
        answers.send((None, result))
