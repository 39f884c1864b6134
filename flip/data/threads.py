"""Requests to storage in the background, in threads that no exit waits for.

Not concurrent.futures' own: those are waited for when the interpreter ends, however long storage is away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

_Q = TypeVar("_Q")
_A = TypeVar("_A")


class Threads(Generic[_Q, _A]):
    """``work`` in ``count`` threads, first come, first served."""

    def __init__(self, work: Callable[[_Q], _A], count: int) -> None:
        self._work, self._open, self._count = work, True, count
        self._asked: SimpleQueue[tuple[Future[_A], _Q] | None] = SimpleQueue()
        for number in range(count):
            threading.Thread(target=self._serve, name=f"read-{number}", daemon=True).start()

    def submit(self, question: _Q) -> Future[_A]:
        future: Future[_A] = Future()
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
