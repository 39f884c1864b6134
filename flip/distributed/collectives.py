"""Collectives of small values and of shared work, over a process group of all ranks that takes CPU tensors, and the
means of a step's statistics.

Values travel as JSON instead of pickles, so that nothing that another rank sends can execute: None, bool, int, float,
str, lists, and dicts with string keys. Floats keep all their bits. Every rank gets the decoded value, the sender too.
``group`` None: there are no other ranks.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, distributed

from flip.runs import errors
from flip.runs.checkpoint_folder import CorruptCheckpoint
from flip.runs.errors import FlipError

_T = TypeVar("_T")

ERRORS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, FlipError)}
"""Errors that travel between ranks, by name."""

DAMAGED = "damaged"


class RankFailure(NamedTuple):
    """An error of one rank, as all ranks know it: its cause (``flip.runs.errors``, or ``DAMAGED``) and its text."""

    cause: str
    text: str

    @property
    def is_transient(self) -> bool:
        """Whether a second attempt may succeed."""
        return self.cause in ("storage", DAMAGED)

    @property
    def error_class(self) -> type[FlipError]:
        """The error that all ranks raise."""
        kinds = (errors.ConfigError, errors.DataError, errors.PermissionDenied)
        return next((kind for kind in kinds if kind.cause == self.cause), errors.StorageError)

    @classmethod
    def of(cls, error: Exception) -> RankFailure:
        if isinstance(error, FlipError):
            return cls(error.cause, str(error).rstrip("."))
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return cls("storage", f"no space left on the device ({error.filename or 'checkpoint folder'})")
        return cls(DAMAGED if isinstance(error, CorruptCheckpoint) else "storage", str(error))


def broadcast_json(value: Any, group: Any) -> Any:
    """Return rank 0's value on all ranks. ``value`` is ignored on the others. Collective."""
    if group is None or group.size() == 1:
        return _decoded(_encoded(value))
    if group.rank() == 0:
        data = _encoded(value)
    else:
        data = torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(data)])
    distributed.broadcast(length, src=0, group=group)
    if group.rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    distributed.broadcast(data, src=0, group=group)
    return _decoded(data)


def all_gather_json(value: Any, group: Any) -> list[Any]:
    """Return the values of all ranks, by rank, on all ranks. Collective."""
    data = _encoded(value)
    if group is None or group.size() == 1:
        return [_decoded(data)]
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    distributed.all_gather(lengths, torch.tensor([len(data)]), group=group)
    padded = torch.zeros(max(map(int, lengths)), dtype=torch.uint8)
    padded[: len(data)] = data
    parts = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(parts, padded, group=group)
    return [_decoded(part[: int(length)]) for part, length in zip(parts, lengths, strict=True)]


def run_on_first(function: Callable[[], _T], group: Any) -> _T:
    """Call ``function`` on rank 0 alone and return its value on all ranks. Collective.

    Raises:
        FlipError: rank 0 raised it; all ranks raise it.
        PeerLost: rank 0 raised any other exception, which it raises itself; the other ranks raise PeerLost.
    """
    if group is not None and group.rank() != 0:
        answer = broadcast_json(None, group)
        if "error" in answer:
            name, fields = answer["error"]
            raise ERRORS[name](**fields)
        return cast(_T, answer["value"])
    try:
        value = function()
    except Exception as error:  # the other ranks wait for an answer
        broadcast_json({"error": _named(error)}, group)
        raise
    return cast(_T, broadcast_json({"value": value}, group)["value"])


def run_on_all(function: Callable[[], object], group: Any) -> RankFailure | None:
    """Call ``function`` on all ranks. Returns the failure of the lowest rank that failed, on all ranks. Collective.

    OSError, FlipError and CorruptCheckpoint are failures; any other exception is raised on its rank alone.
    """
    failure = None
    try:
        function()
    except (OSError, FlipError, CorruptCheckpoint) as error:
        failure = RankFailure.of(error)
    return next((RankFailure(*value) for value in all_gather_json(failure, group) if value is not None), None)


def mean_over_ranks(statistics: Tensor, size: int, requests: Tensor | None = None) -> Tensor:
    """The means (n,) over all ``size`` ranks of their ``statistics`` (n,), in the process group of the device.

    The same all-reduce replaces ``requests`` (m,) by their sums over ranks. Collective.
    """
    if size == 1:
        return statistics
    values = statistics / size
    if requests is not None:
        values = torch.cat([values, requests])
    distributed.all_reduce(values)
    if requests is not None:
        requests.copy_(values[len(statistics) :])
    return values[: len(statistics)]


def _named(error: Exception) -> tuple[str, dict[str, Any]]:
    """The name of an error's class and the arguments to create it on another rank."""
    if not isinstance(error, FlipError):
        return "PeerLost", {"what": f"rank 0 failed: {type(error).__name__}: {error}"}
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERRORS)
    # The value may not be JSON: its repr becomes part of the text.
    shown = ""
    if error.value is not None:
        shown = f" (found: {error.value!r})"
    return name, {"what": f"{error.what}{shown}", "where": error.where, "remedy": error.remedy}


def _encoded(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value, separators=(",", ":")).encode()), dtype=torch.uint8)


def _decoded(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())


@dataclass(frozen=True)
class RankGroup:
    """Ranks that share the batches of an evaluation. All methods but ``shard`` are collective.

    ``group``: a process group of all ranks that takes CPU tensors; None: a single rank.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def shard(self, batches: int, rank: int | None = None) -> range:
        """The batches of this rank (or of ``rank``): a contiguous range; sizes differ by at most one between ranks."""
        rank = self.rank if rank is None else rank
        return range(rank * batches // self.size, (rank + 1) * batches // self.size)

    def gather(self, part: Tensor, rows: list[int]) -> Tensor | None:
        """Concatenate the tensors of all ranks on rank 0; None on the others. ``rows``: number of rows by rank."""
        if self.size == 1:
            return part
        padded = torch.zeros(max(rows), *part.shape[1:], dtype=part.dtype)
        padded[: len(part)] = part
        parts = None
        if self.is_rank0:
            parts = [torch.empty_like(padded) for _ in rows]
        distributed.gather(padded, parts, dst=0, group=self.group)
        if parts is not None:
            return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])
        return None

    def on_rank0(self, function: Callable[[], _T]) -> _T:
        """Return the JSON value that ``function`` computes on rank 0; a FlipError is raised on all ranks."""
        return run_on_first(function, self.group)


SINGLE_RANK = RankGroup()
