"""Loader processes: each fills slots of shared memory with its lanes' part of a batch; the main process joins them.

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
from collections.abc import Callable
from multiprocessing import connection, util
from multiprocessing.context import ForkServerProcess
from typing import Any

import numpy as np

from flip.concurrency import leave_with_parent, prepare_forkserver
from flip.costs import SLOTS
from flip.data.masking import MaskSpec
from flip.data.order import load_sources
from flip.data.storage.client import IOStats
from flip.data.storage.retry import Outage
from flip.data.worker import BatchBuffers, BatchProducer, ReplacedSample, WorkerConfig
from flip.distributed.shutdown import SIGNALS
from flip.runs.credentials import scrub_stderr
from flip.runs.errors import FlipError

_ALIGN = 64


class WorkerPool:
    """``workers`` processes that share ``lanes``; the same batches as one ``BatchProducer`` over all of them.

    ``report`` receives their storage outages, with the number of the process, while batches are waited for.
    """

    def __init__(
        self, config: WorkerConfig, lanes: range, start: int, batch: int, masks: MaskSpec, workers: int,
        report: Callable[[Outage, int], None],
    ) -> None:  # fmt: skip
        self._report = report
        prepare_forkserver()
        context = multiprocessing.get_context("forkserver")
        per_lane = batch // config.data.lanes
        self._slot = 0
        self._rows: list[slice] = []
        self._buffers: list[list[BatchBuffers]] = []
        self._pipes: list[connection.Connection] = []
        self._processes: list[ForkServerProcess] = []
        self._counters = [IOStats() for _ in range(workers)]
        self._finish = util.Finalize(self, _end, args=(self._processes, self._pipes), exitpriority=10)
        for w in range(workers):
            own = lanes[w * len(lanes) // workers : (w + 1) * len(lanes) // workers]
            shapes = BatchBuffers.shapes(config, len(own) * per_lane, masks)
            memory = context.RawArray(ctypes.c_ubyte, SLOTS * slot_bytes(shapes))
            pipe, worker_pipe = context.Pipe()
            args = (config, own, start, batch, masks, memory, worker_pipe)
            process = context.Process(target=_work, args=args, daemon=True, name=f"loader-{w}")
            process.start()
            worker_pipe.close()  # so that the exit of the worker closes the pipe
            self._processes.append(process)
            self._pipes.append(pipe)
            self._buffers.append(_views(memory, shapes))
            self._rows.append(slice((own.start - lanes.start) * per_lane, (own.stop - lanes.start) * per_lane))

    @property
    def counters(self) -> IOStats:
        """Counts of all workers' readers, up to the batches taken."""
        return sum(self._counters, IOStats())

    def fill(self, out: BatchBuffers) -> tuple[int, list[ReplacedSample]]:
        """As ``BatchProducer.fill``. Raises a worker's FlipError, and RuntimeError if a worker died."""
        replaced = 0
        notes = list[ReplacedSample]()
        workers = zip(self._pipes, self._buffers, self._rows, self._processes, strict=True)
        for w, (pipe, buffers, rows, process) in enumerate(workers):
            try:
                while "outage" in (message := json.loads(pipe.recv_bytes())):
                    self._report(Outage(**message["outage"]), w)
                if "cause" in message:
                    raise _error(message)
                for name in BatchBuffers._fields:
                    getattr(out, name)[rows] = getattr(buffers[self._slot], name)
            except (EOFError, ConnectionError) as error:
                process.join(timeout=5)
                raise RuntimeError(f"{process.name} ended by itself, exit code {process.exitcode}") from error
            with contextlib.suppress(ConnectionError):  # it has exited: the reason follows its last batches in the pipe
                pipe.send_bytes(b"free")
            self._counters[w] = IOStats(**message["counters"])
            replaced += message["replaced"]
            notes += [ReplacedSample(*note) for note in message["notes"]]
        self._slot = (self._slot + 1) % SLOTS
        return replaced, notes

    def close(self) -> None:
        """End the workers and free their slots. Workers also end when the interpreter exits.

        The shared memory has no name, so that nothing of it is left however a process ends.
        """
        self._finish()
        self._buffers = []


def _end(processes: list[ForkServerProcess], pipes: list[connection.Connection]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join(timeout=5.0)  # one that waits for a file system that hangs cannot be killed
    for pipe in pipes:
        pipe.close()


def _work(
    config: WorkerConfig, lanes: range, start: int, batch: int, masks: MaskSpec, memory: Any,
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
    buffers = _views(memory, BatchBuffers.shapes(config, len(lanes) * (batch // config.data.lanes), masks))
    free = SLOTS
    slot = 0
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
            replaced, notes = producer.fill(buffers[slot])
            # IOStats are totals since the start, so that only the newest message matters.
            send({"replaced": replaced, "notes": notes, "counters": dataclasses.asdict(producer.counters)})
            slot = (slot + 1) % SLOTS
            free -= 1
            while not free or pipe.poll():
                pipe.recv_bytes()
                free += 1
    except FlipError as error:
        reason = {"cause": error.cause, "what": error.what, "where": error.where, "remedy": error.remedy}
        send(reason | {"value": error.value})
    except (EOFError, ConnectionError):
        return  # the main process has closed its end
    finally:
        if producer is not None:
            producer.close()


def _error(message: dict[str, Any]) -> FlipError:
    kinds: dict[str, type[FlipError]] = {kind.cause: kind for kind in FlipError.__subclasses__()}
    kind = kinds.get(message["cause"], FlipError)
    return kind(message["what"], message["where"], message["value"], message["remedy"])


def slot_bytes(shapes: list[tuple[tuple[int, ...], str]]) -> int:
    """Bytes of a slot for arrays of these shapes and dtypes, each aligned."""
    return sum(-(-math.prod(shape) * np.dtype(kind).itemsize // _ALIGN) * _ALIGN for shape, kind in shapes)


def _views(memory: Any, shapes: list[tuple[tuple[int, ...], str]]) -> list[BatchBuffers]:
    """The slots of shared memory as arrays."""
    slots = []
    offset = 0
    for _ in range(SLOTS):
        fields = []
        for shape, kind in shapes:
            fields.append(np.frombuffer(memory, kind, math.prod(shape), offset).reshape(shape))
            offset += slot_bytes([(shape, kind)])
        slots.append(BatchBuffers(*fields))
    return slots
