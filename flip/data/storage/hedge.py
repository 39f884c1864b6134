"""A request that brings no answer is sent a second time, and the first good answer counts.

One connection, one server of many may be slow where the others are not. How late is late follows what was seen, and
``SHARE`` bounds what it adds to the load: a storage that is slow as a whole is not asked twice for everything.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

SHARE = 0.05
"""Second requests at most, as a share of all requests; the first one is free."""
LONG = 5
"""Times the usual delay: what the first requests of all are waited for, as the client is still being made; and what any
late request is waited for once more before it gets a second one that the share does not allow.
"""
_RECENT = 200
"""Answers that are looked at."""

_T = TypeVar("_T")


class Hedge:
    """``after``: seconds without an answer before which no request is late; 0: none ever is. Threads may share one."""

    def __init__(self, after: float) -> None:
        self._after, self._lock = after, threading.Lock()
        self._recent: deque[float] = deque(maxlen=_RECENT)

    def took(self, seconds: float) -> None:
        """An answer came so long after its first request."""
        with self._lock:
            self._recent.append(seconds)

    @property
    def delay(self) -> float:
        """Seconds after which a request is late: ``after``, and no less than all but ``SHARE`` of the last ones took.

        They are of about one size: a chunk's.
        """
        with self._lock:
            recent = sorted(self._recent)
        return max(self._after, recent[int((1 - SHARE) * len(recent))]) if recent else self._after

    def late(self, answer: Future[_T], long: bool = False) -> bool:
        """Wait for an answer for as long as it may take (``long``: ``LONG`` times as long); whether it is late."""
        if not self._after or answer.done():
            return False
        return not wait([answer], self.delay * (LONG if long else 1)).done


def first_good(answers: Sequence[Future[_T]]) -> Future[_T]:
    """Wait for the first that ends without an error; the first one where none does."""
    pending = set(answers)
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for answer in done:
            if answer.exception() is None:
                return answer
    return answers[0]
