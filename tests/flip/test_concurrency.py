"""Tests map_in_processes: answers, errors and early ends of workers.

test_verify.py tests what workers inherit.
"""

import errno
import multiprocessing
import os
import time
from functools import partial

import pytest

from flip import concurrency
from flip.runs.errors import ConfigError, DataError, FlipError


def adding(number):
    return lambda task: number + task


def refusing(kind):
    if kind == "at once":
        raise DataError("no such thing", "here", 7, "Look elsewhere.")
    return partial(_refuse, kind)


def _refuse(kind, task):
    if task == 3:
        if kind == "no memory":
            raise MemoryError("4 GB")
        if kind == "no space":
            raise OSError(errno.ENOSPC, "No space left on device")
        if kind == "fault":
            error = KeyError(6)
            error.add_note("1.tar, sample 5")
            raise error
        if kind == "dies":
            os._exit(3)
        raise ConfigError("not this one", value=task)
    return task


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_map_in_processes_answers_every_task_once(workers):
    assert sorted(concurrency.map_in_processes(adding, (10,), range(20), workers, "adder")) == list(range(10, 30))
    assert list(concurrency.map_in_processes(adding, (10,), [], workers, "adder")) == []
    assert not [process for process in multiprocessing.active_children() if process.name.startswith("adder-")]


@pytest.mark.parametrize("workers", [0, 2])
def test_map_in_processes_raises_worker_error_unchanged(workers):
    with pytest.raises(DataError) as error:
        list(concurrency.map_in_processes(refusing, ("at once",), range(9), workers, "refuser"))
    assert (error.value.where, error.value.value, error.value.remedy) == ("here", 7, "Look elsewhere.")
    with pytest.raises(ConfigError, match="not this one"):
        list(concurrency.map_in_processes(refusing, ("later",), range(9), workers, "refuser"))


def test_map_in_processes_raises_error_of_worker_that_ended_before_its_task():
    def tasks():
        end = time.monotonic() + 60
        while any(process.name.startswith("refuser-") for process in multiprocessing.active_children()):
            assert time.monotonic() < end
            time.sleep(0.01)
        yield 1

    with pytest.raises(DataError, match="no such thing"):
        list(concurrency.map_in_processes(refusing, ("at once",), tasks(), 1, "refuser"))


def test_map_in_processes_sends_task_only_after_earlier_result():
    """Two processes that send each other more than a pipe holds would wait for ever."""
    sent = []
    answers = concurrency.map_in_processes(adding, (1,), (sent.append(task) or task for task in range(9)), 2, "adder")
    for received, _ in enumerate(answers, 1):
        assert len(sent) <= received + 2


def test_map_in_processes_detects_worker_that_dies():
    with pytest.raises(FlipError, match="ended by itself.*fewer workers") as error:
        list(concurrency.map_in_processes(refusing, ("dies",), range(9), 2, "refuser"))
    assert error.value.code == 70


def test_map_in_processes_names_unexpected_error_and_its_place():
    with pytest.raises(RuntimeError, match="refuser-. ended: KeyError: 6; 1.tar, sample 5"):
        list(concurrency.map_in_processes(refusing, ("fault",), range(9), 2, "refuser"))
    with pytest.raises(MemoryError, match="4 GB"):
        list(concurrency.map_in_processes(refusing, ("no memory",), range(9), 2, "refuser"))
    with pytest.raises(OSError, match="No space left") as error:
        list(concurrency.map_in_processes(refusing, ("no space",), range(9), 2, "refuser"))
    assert error.value.errno == errno.ENOSPC


def test_map_in_processes_ends_workers_when_closed():
    answers = concurrency.map_in_processes(adding, (1,), range(1000), 2, "adder")
    assert next(answers) in range(1, 5)
    answers.close()
    assert not [process for process in multiprocessing.active_children() if process.name.startswith("adder-")]
