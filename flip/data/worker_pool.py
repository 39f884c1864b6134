"""Loader processes: each fills slots of shared memory with its lanes' parts, the main process joins them in lane order.

Workers are children of multiprocessing's fork server, never forks of the trainer (threads, CUDA and storage clients do
not survive one). They ignore the signals that stop a run, hold nothing worth saving, and go when the main process goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
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

from flip.concurrency import leave_with_parent
from flip.costs import SLOTS
from flip.data.masking import Kept
from flip.data.mixture import sources
from flip.data.storage.client import IOStats
from flip.data.storage.retry import Outage
from flip.data.worker import Part, Replaced, Spec, Streams
from flip.distributed.shutdown import SIGNALS
from flip.runs.errors import FlipError

_ALIGN = 64


class Pool:
    """``workers`` processes that share ``lanes``; the same parts as one ``Streams`` over all of them.

    ``report`` takes their outages of storage, each with the number of the process, when parts are waited for.
    """

    def __init__(
        self, spec: Spec, lanes: range, start: int, batch: int, kept: Kept, workers: int,
        report: Callable[[Outage, int], None],
    ) -> None:  # fmt: skip
        self._report = report
        context = multiprocessing.get_context("forkserver")
        each = batch // spec.data.lanes
        self._slot = 0
        self._rows: list[slice] = []
        self._parts: list[list[Part]] = []
        self._pipes: list[connection.Connection] = []
        self._processes: list[ForkServerProcess] = []
        self._counters = [IOStats() for _ in range(workers)]
        self._finish = util.Finalize(self, _end, args=(self._processes, self._pipes), exitpriority=10)
        for w in range(workers):
            share = lanes[w * len(lanes) // workers : (w + 1) * len(lanes) // workers]
            shapes = Part.shapes(spec, len(share) * each, kept)
            buffer = context.RawArray(ctypes.c_ubyte, SLOTS * _stride(shapes))
            ours, theirs = context.Pipe()
            work = (spec, share, start, batch, kept, buffer, theirs)
            process = context.Process(target=_work, args=work, daemon=True, name=f"loader-{w}")
            process.start()
            theirs.close()  # so that the end of the worker is the end of the pipe
            self._processes.append(process)
            self._pipes.append(ours)
            self._parts.append(_views(buffer, shapes))
            self._rows.append(slice((share.start - lanes.start) * each, (share.stop - lanes.start) * each))

    @property
    def counters(self) -> IOStats:
        """Of all workers' readers, up to the parts that were taken."""
        return IOStats.total(self._counters)

    def fill(self, out: Part) -> tuple[int, list[Replaced]]:
        """As ``Streams.fill``; a worker's FlipError is raised here, a worker that died is a RuntimeError."""
        replaced, notes = 0, list[Replaced]()
        workers = zip(self._pipes, self._parts, self._rows, self._processes, strict=True)
        for w, (pipe, parts, rows, process) in enumerate(workers):
            try:
                while "outage" in (message := json.loads(pipe.recv_bytes())):
                    self._report(Outage(**message["outage"]), w)
                if "cause" in message:
                    raise _error(message)
                for name in Part._fields:
                    getattr(out, name)[rows] = getattr(parts[self._slot], name)
            except (EOFError, ConnectionError) as error:
                process.join(timeout=5)
                raise RuntimeError(f"{process.name} ended by itself, exit code {process.exitcode}") from error
            with contextlib.suppress(ConnectionError):  # it has ended: why stands in the pipe, behind its last parts
                pipe.send_bytes(b"free")
            self._counters[w] = IOStats(**message["counters"])
            replaced += message["replaced"]
            notes += [Replaced(*note) for note in message["notes"]]
        self._slot = (self._slot + 1) % SLOTS
        return replaced, notes

    def close(self) -> None:
        """End the workers and free their slots; at the exit of the interpreter they end by themselves.

        The slots have no name: however a process ends, nothing of them is left.
        """
        self._finish()
        self._parts = []


def _end(processes: list[ForkServerProcess], pipes: list[connection.Connection]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    for pipe in pipes:
        pipe.close()


def _work(
    spec: Spec, lanes: range, start: int, batch: int, kept: Kept, buffer: Any, pipe: connection.Connection
) -> None:
    for name in (*SIGNALS, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if spec.data.resize == "torchvision" and not spec.affine:
        import torch

        torch.set_num_threads(1)
    shapes = Part.shapes(spec, len(lanes) * (batch // spec.data.lanes), kept)
    parts, free, slot = _views(buffer, shapes), SLOTS, 0
    stream, one_by_one = None, threading.Lock()

    def send(message: dict[str, Any]) -> None:
        with one_by_one:
            pipe.send_bytes(json.dumps(message, default=str).encode())

    def report(outage: Outage) -> None:  # by a thread that reads
        with contextlib.suppress(ConnectionError):
            send({"outage": outage._asdict()})

    try:
        stream = Streams(spec, sources(spec.data, lanes, check=False), lanes, start, batch, kept, report)
        while True:
            replaced, notes = stream.fill(parts[slot])
            # Counts from the beginning, not since the last part: the newest message tells all.
            facts = {"replaced": replaced, "notes": notes, "counters": dataclasses.asdict(stream.counters)}
            send(facts)
            slot, free = (slot + 1) % SLOTS, free - 1
            while not free or pipe.poll():
                pipe.recv_bytes()
                free += 1
    except FlipError as error:
        end = {"cause": error.cause, "what": error.what, "where": error.where, "remedy": error.remedy}
        send(end | {"value": error.value})
    except (EOFError, ConnectionError):
        return  # the main process has closed its end: it wants no more
    finally:
        if stream is not None:
            stream.close()


def _error(message: dict[str, Any]) -> FlipError:
    kinds: dict[str, type[FlipError]] = {kind.cause: kind for kind in FlipError.__subclasses__()}
    kind = kinds.get(message["cause"], FlipError)
    return kind(message["what"], message["where"], message["value"], message["remedy"])


def _stride(shapes: list[tuple[tuple[int, ...], str]]) -> int:
    return sum(-(-math.prod(shape) * np.dtype(kind).itemsize // _ALIGN) * _ALIGN for shape, kind in shapes)


def _views(buffer: Any, shapes: list[tuple[tuple[int, ...], str]]) -> list[Part]:
    """The slots of a shared buffer as arrays."""
    parts, at = [], 0
    for _ in range(SLOTS):
        fields = []
        for shape, kind in shapes:
            fields.append(np.frombuffer(buffer, kind, math.prod(shape), at).reshape(shape))
            at += _stride([(shape, kind)])
        parts.append(Part(*fields))
    return parts
