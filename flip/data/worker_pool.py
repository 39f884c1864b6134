"""Loader processes: each writes its lanes' part of a batch into shared memory, which the main process uses in place.

Workers are children of multiprocessing's fork server, not forks of the trainer, whose threads, CUDA context and storage
clients do not survive a fork. They ignore the signals that stop a run, have no state to save, and exit when the main
process exits.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import multiprocessing
import os
import signal
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing import connection, util
from multiprocessing.context import ForkServerProcess
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flip.common.shutdown import SIGNALS
from flip.concurrency import (
    leave_with_parent,
    prepare_forkserver,
    received_error,
    unexpected_error,
    without_main_module,
)
from flip.data.decode_counts import DecodeCounts
from flip.data.masking import MaskSpec
from flip.data.sources import load_sources
from flip.data.storage.client import IOStats
from flip.data.storage.retry import Outage
from flip.data.worker import BatchBuffers, BatchProducer, Filled, ReplacedSample, WorkerConfig
from flip.model_costs import IN_HAND, SLOTS
from flip.runs.credentials import scrub_stderr
from flip.runs.errors import FlipError

_ALIGN = 64
Shapes: TypeAlias = "list[tuple[tuple[int, ...], str]]"
"""Shape and dtype of each array of a batch."""


class WorkerPool:
    """``workers`` processes that share ``lanes``; the same batches as one ``BatchProducer`` over all of them.

    ``report`` receives their storage outages, with the number of the process, while batches are waited for.

    A batch is one slot of shared memory: each worker writes its rows there, and the caller gets the slot itself, not a
    copy. When the caller has dropped all arrays of a batch, its slot is filled again.
    """

    def __init__(
        self, config: WorkerConfig, lanes: range, start: int, batch: int, masks: MaskSpec, workers: int,
        report: Callable[[Outage, int], None],
    ) -> None:  # fmt: skip
        self._report = report
        prepare_forkserver()
        context = multiprocessing.get_context("forkserver")
        per_lane = batch // config.data.lanes
        shapes = BatchBuffers.shapes(config, len(lanes) * per_lane, masks)
        self._slots = SharedSlots(shapes, partial(context.RawArray, ctypes.c_ubyte))
        self._requested = deque[int]()
        """Slots that the workers fill or have filled, in the order in which they fill them."""
        self._pipes: list[connection.Connection] = []
        self._processes: list[ForkServerProcess] = []
        self._counters = [IOStats() for _ in range(workers)]
        self._decoded = [DecodeCounts() for _ in range(workers)]
        self._finish = util.Finalize(self, _end, args=(self._processes, self._pipes), exitpriority=10)
        for w in range(workers):
            own = lanes[w * len(lanes) // workers : (w + 1) * len(lanes) // workers]
            rows = slice((own.start - lanes.start) * per_lane, (own.stop - lanes.start) * per_lane)
            pipe, worker_pipe = context.Pipe()
            args = (config, own, start, batch, masks, self._slots, rows, worker_pipe)
            process = context.Process(target=_work, args=args, daemon=True, name=f"loader-{w}")
            with without_main_module():
                process.start()
            worker_pipe.close()  # so that the exit of the worker closes the pipe
            self._processes.append(process)
            self._pipes.append(pipe)
        self._request(range(SharedSlots.COUNT))

    @property
    def counters(self) -> IOStats:
        """Counts of all workers' readers, up to the batches taken."""
        return sum(self._counters, IOStats())

    @property
    def decoded(self) -> DecodeCounts:
        """How the images of the batches taken were decoded, by all workers."""
        return sum(self._decoded, DecodeCounts())

    def take(self) -> tuple[BatchBuffers, Filled]:
        """As ``BatchProducer.take``. Raises the error of a worker, and RuntimeError if a worker died."""
        self._request(self._slots.dropped())
        slot = self._requested.popleft()
        replaced = 0
        notes = list[ReplacedSample]()
        texts = list[str]()
        for w, (pipe, process) in enumerate(zip(self._pipes, self._processes, strict=True)):
            try:
                while "outage" in (message := json.loads(pipe.recv_bytes())):
                    self._report(Outage(**message["outage"]), w)
            except (EOFError, ConnectionError) as error:
                process.join(timeout=5)
                raise RuntimeError(f"{process.name} ended by itself, exit code {process.exitcode}") from error
            if "cause" in message:
                raise _error(message)
            if "unexpected" in message:
                raise received_error(message, process.name)
            self._counters[w] = IOStats(**message["counters"])
            self._decoded[w] = DecodeCounts.from_record(message["decoded"])
            replaced += message["replaced"]
            notes += [ReplacedSample(*note) for note in message["notes"]]
            texts += message["texts"]
        return self._slots.lend(slot), Filled(replaced, notes, texts)

    def _request(self, slots: Iterable[int]) -> None:
        """Let all workers fill these slots, after those requested before."""
        for slot in slots:
            self._requested.append(slot)
            for pipe in self._pipes:
                with contextlib.suppress(ConnectionError):  # it has exited: the reason follows its last batches
                    pipe.send_bytes(bytes([slot]))

    def close(self) -> None:
        """End the workers and free their slots. Workers also end when the interpreter exits.

        The shared memory has no name, so that nothing of it is left however a process ends.
        """
        self._finish()
        self._slots.close()


class SharedSlots:
    """Shared memory of ``COUNT`` batches, each with arrays of these shapes and dtypes.

    ``allocate`` returns a ctypes array of so many bytes, which the copies of this object in workers share.
    """

    COUNT = SLOTS + IN_HAND

    def __init__(self, shapes: Shapes, allocate: Callable[[int], Any]) -> None:
        self._fields = list[tuple[int, int, tuple[int, ...], np.dtype[Any]]]()
        """First byte in a slot, number of bytes, shape and dtype of each array."""
        end = 0
        for shape, kind in shapes:
            dtype = np.dtype(kind)
            size = math.prod(shape) * dtype.itemsize
            self._fields.append((end, size, shape, dtype))
            end += -(-size // _ALIGN) * _ALIGN
        self._slot_bytes = end
        self._memory = allocate(self.COUNT * end)
        self._lent = 0
        self._dropped = deque[int]()

    def buffers(self, slot: int, rows: slice) -> BatchBuffers:
        """Rows of the arrays of a slot."""
        return BatchBuffers(*(array[rows] for array in self._arrays(self._bytes_of(slot))))  # type: ignore[call-arg]

    def lend(self, slot: int) -> BatchBuffers:
        """The arrays of a slot. Once nothing refers to them any more, ``dropped`` returns the slot.

        Copies if ``IN_HAND`` slots are lent already, so that workers go on if the caller keeps many batches.
        """
        memory = self._bytes_of(slot)
        weakref.finalize(memory, self._dropped.append, slot).atexit = False
        self._lent += 1
        arrays = self._arrays(memory)
        if self._lent > IN_HAND:
            arrays = (array.copy() for array in arrays)
        return BatchBuffers(*arrays)  # type: ignore[call-arg]

    def dropped(self) -> Iterator[int]:
        """Lent slots to which nothing refers any more, each once."""
        while self._dropped:
            self._lent -= 1
            yield self._dropped.popleft()

    def close(self) -> None:
        """Free the memory, or have it freed with the last lent array."""
        self._memory = b""

    def _bytes_of(self, slot: int) -> NDArray[np.uint8]:
        """A new array over the bytes of a slot. Arrays that are made from it keep it alive."""
        return np.frombuffer(self._memory, np.uint8, self._slot_bytes, slot * self._slot_bytes)

    def _arrays(self, memory: NDArray[np.uint8]) -> Iterator[NDArray[Any]]:
        for start, size, shape, dtype in self._fields:
            yield memory[start : start + size].view(dtype).reshape(shape)


def _end(processes: list[ForkServerProcess], pipes: list[connection.Connection]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(timeout=5.0)  # one that waits for a file system that hangs cannot be killed
    for pipe in pipes:
        pipe.close()


def _work(
    config: WorkerConfig, lanes: range, start: int, batch: int, masks: MaskSpec, slots: SharedSlots, rows: slice,
    pipe: connection.Connection,
) -> None:  # fmt: skip
    for name in (*SIGNALS, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    scrub_stderr()
    threading.Thread(target=leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if config.data.resize == "torchvision" and not config.affine:
        import torch

        torch.set_num_threads(1)
    buffers = [slots.buffers(slot, rows) for slot in range(SharedSlots.COUNT)]
    producer = None
    sending = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with sending:
            pipe.send_bytes(json.dumps(message, default=str).encode())

    def report(outage: Outage) -> None:  # called by threads that read
        with contextlib.suppress(ConnectionError):
            send({"outage": outage._asdict()})

    try:
        sources = load_sources(config.data, lanes, check=False)
        producer = BatchProducer(config, sources, lanes, start, batch, masks, report)
        gc.collect()
        gc.freeze()  # objects of modules live to the end: the collector would traverse them again and again
        while True:
            (slot,) = pipe.recv_bytes()
            filled = producer.fill(buffers[slot])
            # The counts are totals since the start, so that only the newest message matters.
            counters = dataclasses.asdict(producer.counters)
            decoded = producer.decoded.record()
            send(filled._asdict() | {"counters": counters, "decoded": decoded})
    except FlipError as error:
        reason = {"cause": error.cause, "what": error.what, "where": error.where, "remedy": error.remedy}
        send(reason | {"value": error.value})
    except (EOFError, ConnectionError):
        return  # the main process has closed its end
    except Exception as error:  # the outermost frame: any error must reach the main process
        send(unexpected_error(error))
        raise  # prints the traceback
    finally:
        if producer is not None:
            producer.close()


def _error(message: dict[str, Any]) -> FlipError:
    kinds: dict[str, type[FlipError]] = {kind.cause: kind for kind in FlipError.__subclasses__()}
    kind = kinds.get(message["cause"], FlipError)
    return kind(message["what"], message["where"], message["value"], message["remedy"])
