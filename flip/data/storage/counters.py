"""What a reader did, in numbers that add up over workers and ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from flip.data.storage.retry import TABLE


@dataclass
class Counters:
    requests: int = 0
    bytes: int = 0
    """Received, those of attempts that failed included, not those of requests that were given up."""
    seconds: float = 0.0
    """Spent in requests; pauses between them are not in it."""
    hedged: int = 0
    """Second requests for a range whose answer was late; they are in ``requests`` too."""
    hedges_won: int = 0
    """Those that were answered first."""
    resumed: int = 0
    """Bytes that a failed attempt had brought and that were not asked for again."""
    cap: int = 0
    """Requests that may be under way at once, now."""
    held: int = 0
    """Bytes of chunks that are held or asked for, now."""
    cache_hits: int = 0
    """Chunks that the node's cache had (``flip.data.chunk_reader``)."""
    cache_misses: int = 0
    cache_failures: int = 0
    """Its files that were damaged, could not be read, or could not be written."""
    retries: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TABLE, 0))
    """Failed attempts by class, those that ended the read included."""

    def __add__(self, other: Counters) -> Counters:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _PLAIN}
        retries = {kind: count + other.retries[kind] for kind, count in self.retries.items()}
        return Counters(**sums, retries=retries)

    def flat(self) -> dict[str, float]:
        """Name -> number: the same names in the same order everywhere, so that ranks can add them as one vector."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return plain | {f"retries_{kind}": count for kind, count in self.retries.items()}

    @staticmethod
    def total(parts: Iterable[Counters]) -> Counters:
        return sum(parts, Counters())


_PLAIN = [each.name for each in fields(Counters) if each.name != "retries"]
