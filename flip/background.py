"""One piece of work beside the caller's own, and its error where it is waited for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future


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
