"""The header of a file of weights (``data.weights``), and the numbers of the weighted order that follow from it.

The file is safetensors with two tensors: ``sums`` (U64: the sum of the weights before each full chunk, and T at the
end) and ``weights`` (U32: a number per sample of the manifest). Its metadata ``flip`` is the JSON text of
``WeightFacts``. docs/weights.md defines the letters. Planning reads the header alone.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from flip.files.creation import open_regular
from flip.runs.errors import ConfigError, DataError, PermissionDenied, read_error

UNIT = 1 << 16
"""Units of one expected view."""
MAX_VIEWS = (1 << 16) - 1
"""Most expected views of a sample in an epoch."""
HEADER_LIMIT = 1 << 20
REMEDY = "Make it with: flip shards weights MANIFEST --out FILE"
KEY = "flip"
NUMBER = 1
"""Version of the file."""


@dataclass(frozen=True)
class WeightFacts:
    """What planning must know of a file of weights."""

    version: int
    manifest: str
    """Digest of the manifest whose samples have these weights."""
    samples: int
    """N."""
    chunk: int
    """R."""
    total: int
    """T, the sum over full chunks, in units."""
    heaviest: int
    """The largest W_j, the sum of a chunk's weights."""
    peak: int
    """The weight of the sample with the largest share of its chunk ..."""
    peak_chunk: int
    """... and the sum of that chunk's weights."""
    largest: float
    """Largest expected views of a sample."""
    smallest: float
    """Smallest expected views above 0."""
    positive: int
    """Samples of full chunks with a weight above 0."""
    effective: float
    """Effective samples, (sum w)^2 / sum w^2."""
    capped: int
    """Samples whose weight the cap has lowered."""
    source: str
    """What the weights are, in words."""
    digest: str
    """SHA-256 of the tensor ``weights``."""

    @cached_property
    def places(self) -> int:
        """r, samples that a visit takes of its chunk."""
        return max(1, min(self.chunk, self.total // (UNIT * max(1, self.samples // self.chunk))))

    @cached_property
    def sections(self) -> int:
        """G: one more than a chunk has visits in an epoch."""
        return -(-self.heaviest // (UNIT * self.places)) + 1

    @cached_property
    def turns(self) -> int:
        """Z, visits in a quarter of a section."""
        return self.total // (UNIT * self.places * self.sections * 4)

    @property
    def visits(self) -> int:
        """M, visits of an epoch."""
        return 4 * self.turns * self.sections

    @property
    def epoch(self) -> int:
        """Views of an epoch, M r."""
        return self.visits * self.places

    @property
    def repeats(self) -> int:
        """Most views of a sample in one visit of its chunk."""
        return -(-self.places * self.peak // self.peak_chunk)

    def described(self, views: int) -> str:
        """What a run of S = ``views`` sees, in words."""
        times = views / self.epoch
        used = self.samples // self.chunk * self.chunk
        text = f"{self.positive:,} of {used:,} samples, as many as {self.effective:,.0f} of equal weight;"
        text += f" {self.epoch:,} views an epoch, {times:.3g} epochs; views of the rarest sample: {self.smallest:.3g}"
        text += f" an epoch, {self.smallest * times:.3g} in the run; of the most frequent: {self.largest:.3g},"
        text += f" {self.largest * times:.3g}"
        if self.places < self.chunk:
            text += f"; {self.chunk} samples are read for {self.places} views"
        return text

    def why_unfit(self, lanes: int, block: int, batch: int) -> str:
        """Why two views of a sample could share a batch of B = ``batch``; empty: they never do."""
        count = batch // lanes
        size = block * self.places
        if self.turns < 1:
            least = 4 * self.sections * self.places
            return f"an epoch has {self.total / UNIT:,.0f} views, at least {least:,} are needed"
        if self.repeats > 1 and size // self.repeats - 1 < count:
            return (
                f"a sample has {self.repeats} of the {size} places of a block, and a batch takes {count} in a row:"
                " two of its views would share a batch"
            )
        apart = self.turns // lanes // block
        needed = 1 + -(-(count - 1) // size)
        if apart < needed:
            return (
                f"visits of a chunk are {self.turns} visits apart, {needed * lanes * block} are needed by"
                f" {lanes} lanes with blocks of {block}: two views of a sample could share a batch"
            )
        return ""


def read_facts(path: str) -> WeightFacts:
    """The facts in the header of a file of weights. Raises DataError, PermissionDenied, or the error of
    ``read_error``."""
    return read_header(path)[0]


def read_header(path: str) -> tuple[WeightFacts, int, dict[str, Any]]:
    """The facts, the position of the first tensor, and the header. Raises as ``read_facts``."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= HEADER_LIMIT:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(file.read(length))
            bytes_after = os.fstat(file.fileno()).st_size - 8 - length
        facts = _facts(header)
        ends = [header[name]["data_offsets"][1] for name in ("weights", "sums")]
        if max(ends) != bytes_after:
            raise ValueError(f"{bytes_after:,} bytes of tensors, the header states {max(ends):,}")
        return facts, 8 + length, header
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DataError("data.weights: there is no file of weights", path, remedy=REMEDY) from None
    except PermissionError:
        raise PermissionDenied("data.weights: may not be read", path, remedy="Grant read access to it.") from None
    except OSError as error:
        raise read_error(error, "data.weights: cannot be read", path) from error
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DataError(f"data.weights: no file of weights: {error!r}", path, remedy=REMEDY) from error


def check_facts(facts: WeightFacts, path: str, samples: int, chunk: int, digest: str = "") -> None:
    """Raise ConfigError unless the weights are those of a data set. ``digest``: of its manifest, if it is known."""
    own = (facts.samples, facts.chunk, facts.manifest)
    if own != (samples, chunk, digest or facts.manifest):
        what = "data.weights: they belong to another manifest than data.manifest"
        raise ConfigError(what, path, facts.manifest[:12], "Make them again: flip shards weights MANIFEST --out FILE")


def refuse_unfit(facts: WeightFacts, path: str, lanes: int, block: int, batch: int) -> None:
    """Raise ConfigError if two views of a sample could share a batch."""
    if not lanes or batch % lanes:
        return  # validation says so
    if why := facts.why_unfit(lanes, block, batch):
        remedy = "Lower the weights (shards weights --cap), leave samples of weight 0 out of the index, or use another "
        remedy += "number of lanes or a smaller batch; for visits that are too close, also a smaller data.block."
        raise ConfigError(f"data.weights: {why}", path, f"data.lanes {lanes}", remedy)


def _facts(header: dict[str, Any]) -> WeightFacts:
    """Raises ValueError, KeyError, TypeError."""
    record = json.loads(header["__metadata__"][KEY])
    kinds = {field.name: {"int": int, "str": str, "float": float}[str(field.type)] for field in fields(WeightFacts)}
    values = {name: record[name] for name in kinds}
    for name, kind in kinds.items():
        if kind is float and type(values[name]) is int:
            values[name] = float(values[name])
        if type(values[name]) is not kind or (kind is not str and not 0 <= values[name] < 1 << 63):
            raise ValueError(f"{name}: {values[name]!r}")
    facts = WeightFacts(**values)
    if facts.version != NUMBER:
        raise ValueError(f"version {facts.version}, this release reads {NUMBER}")
    chunks = facts.samples // max(1, facts.chunk)
    wanted = {"weights": ("U32", [facts.samples]), "sums": ("U64", [chunks + 1])}
    for name, (kind_name, shape) in wanted.items():
        if (header[name]["dtype"], header[name]["shape"]) != (kind_name, shape):
            raise ValueError(f"{name}: {header[name]['dtype']} {header[name]['shape']}")
    if min(chunks, facts.total, facts.heaviest, facts.peak, facts.peak_chunk) < 1:
        raise ValueError("no weight is above 0")
    if facts.visits >= 1 << 31 or facts.chunk * facts.heaviest >= 1 << 63:
        raise ValueError("beyond the limits of 64-bit numbers")
    return facts
