"""What to do after a failed attempt, by class of failure, and how many requests may be under way at once.

Exponential back-off with full jitter, under a deadline in minutes: a fleet must ride out an outage of its storage, and
must not come back all at once when it ends.
"""

from __future__ import annotations

import enum
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from flip.data.storage.base import Fault
from flip.runs.errors import DataError, FlipError, PermissionDenied, StorageError

if TYPE_CHECKING:
    from flip.data.storage.outage import Outages


class Words(NamedTuple):
    """How errors speak of what was tried."""

    doing: str = "reading"
    verb: str = "read"
    thing: str = "the shard"
    remedy: str = "Restore it, or index the others again."


class Do(enum.Enum):
    AGAIN = "wait, then try again"
    SLOWER = "the same, and with fewer requests at once"
    ANEW = "the same, over fresh connections with fresh credentials"
    DENIED = "anew if access was granted before, else once more at most"
    FEW = "the same a few times, then give up"
    NEVER = "it cannot pass"


TABLE = {
    "slowdown": Do.SLOWER,  # 503, 429, SlowDown
    "server": Do.AGAIN,  # 500, 502, 504, an answer that cannot be read
    "connection": Do.AGAIN,  # refused, reset, broken off
    "stall": Do.AGAIN,  # nothing came for too long
    "short": Do.AGAIN,  # other bytes than asked for, though announced as complete
    "checksum": Do.ANEW,  # the reader's CRC32
    "expired": Do.ANEW,  # credentials
    "denied": Do.DENIED,  # 401, 403, no credentials
    "refused": Do.FEW,  # other 4xx: some servers' answer to a range beyond the end, or to a wrong region
    "missing": Do.NEVER,  # 404
    "changed": Do.NEVER,  # another ETag, or shorter than what was read before
    "io": Do.AGAIN,  # a local file system's errors
}
"""Class of fault -> what to do."""


_FEW = 4


@dataclass(frozen=True)
class Patience:
    """How long to bear with storage, and how hard to press it."""

    deadline: float = 600.0
    """Seconds of outage that a read rides out."""
    timeout: float = 15.0
    """Seconds without a byte after which a request has failed."""
    first: float = 0.1
    """Upper bound of the first pause, seconds; doubles from failure to failure."""
    longest: float = 30.0
    """Upper bound of every pause."""
    hedge: float = 0.0
    """Seconds without an answer after which a range is asked for a second time (``flip.data.storage.hedge``); 0:
    never."""
    requests: int = 16
    """Requests under way at once at most, per reader."""


@dataclass(frozen=True)
class Clock:
    """Time and chance, so that tests need wait for neither."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = random.uniform


@dataclass
class Attempts:
    """The attempts of one read. ``granted``: asks whether storage ever let this process read; ``outages``: is told of
    each failure."""

    patience: Patience
    granted: Callable[[], bool]
    clock: Clock = field(default_factory=Clock)
    words: Words = Words()
    outages: Outages | None = None

    def __post_init__(self) -> None:
        self._begin, self._wait = self.clock.now(), self.patience.first
        self._denied = self._refused = 0

    def failed(self, key: str, fault: Fault) -> Do:
        """Sleep until the next attempt is due; returns what it needs. Raises FlipError where there is to be none."""
        do = TABLE[fault.kind]
        if do is Do.NEVER:
            raise _never(key, fault, self.words) from fault
        if self.outages:
            self.outages.failed(self._begin, fault)
        denied = do is Do.DENIED and not self.granted()
        if do is Do.DENIED:
            self._denied += 1
            if self._denied > 1 and denied:
                raise _denied(key, fault, self.words) from fault
            do = Do.ANEW
        if do is Do.FEW:
            self._refused += 1
            if self._refused == _FEW:
                raise (_never if self.granted() else _denied)(key, fault, self.words) from fault
        pause = self.clock.uniform(0, self._wait)
        if self.clock.now() + pause > self._begin + self.patience.deadline:
            if denied:  # waiting was no remedy, nor would it be later
                raise _denied(key, fault, self.words) from fault
            what = f"{self.words.doing} failed for {self.patience.deadline:g} s, at last with: {fault}"
            raise StorageError(what, key, remedy="The run may be started again later.") from fault
        (self.outages or self.clock).sleep(pause)
        self._wait = min(2 * self._wait, self.patience.longest)
        return do


def _never(key: str, fault: Fault, words: Words) -> FlipError:
    if fault.kind == "missing":
        return DataError(f"{words.thing} is missing ({fault})", key, remedy=words.remedy)
    if words.doing != "reading":
        return DataError(f"{words.doing} {words.thing} was refused: {fault}", key, remedy=words.remedy)
    return DataError(
        f"the shard is not the one that was indexed: {fault}", key, remedy="Restore it, or index the shards again."
    )


def _denied(key: str, fault: Fault, words: Words) -> FlipError:
    return PermissionDenied(
        f"the storage does not let us {words.verb}: {fault}",
        key,
        remedy="Check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, ~/.aws), AWS_ENDPOINT_URL, and the bucket's "
        "policy. Storage answers the same for a key that is missing where listing is not allowed.",
    )


class Gate:
    """Lets ``cap`` requests through at once: halved when storage asks for less, one more per window of successes.

    The answers to requests that had left before the last halving say nothing about the new cap, and do not halve it.
    """

    def __init__(self, most: int) -> None:
        self.cap, self._most = most, most
        self._busy = self._good = self._halvings = 0
        self._changed = threading.Condition()

    def enter(self) -> int:
        """Wait for leave to send a request; returns the ticket to leave with."""
        with self._changed:
            while self._busy >= self.cap:
                self._changed.wait()
            self._busy += 1
            return self._halvings

    def spare(self) -> int | None:
        """The ticket of one more request, at once; None while storage has asked for less, or where all are out."""
        with self._changed:
            if self.cap < self._most or self._busy >= self.cap:
                return None
            self._busy += 1
            return self._halvings

    def leave(self, ticket: int, kind: str | None = "") -> None:
        """``kind``: the class of the fault, ``""`` after a success, None of a request that was given up."""
        with self._changed:
            self._busy -= 1
            if kind and TABLE[kind] is Do.SLOWER:
                self._good = 0
                if ticket == self._halvings:
                    self.cap, self._halvings = max(1, self.cap // 2), self._halvings + 1
            elif kind == "" and self.cap < self._most:
                self._good += 1
                if self._good >= self.cap:
                    self.cap, self._good = self.cap + 1, 0
            self._changed.notify_all()
