"""Writes a file of weights for the samples of a manifest (``flip.config.weights`` describes it)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.config.weights import HEADER_LIMIT, KEY, MAX_VIEWS, NUMBER, UNIT, WeightFacts
from flip.data.manifest.manifest import Manifest
from flip.files.creation import OUTPUT_MODE, atomic_write
from flip.runs.errors import ConfigError

PIECE = 1 << 20
"""Samples whose weights are computed at once."""
_HEADER = 4096
"""Bytes before the tensors; the text is padded with spaces."""


def soft_cap(views: NDArray[np.float64], cap: float) -> NDArray[np.float64]:
    """``views``; above c = ``cap`` (0: none) c (2 - c / views), which grows more and more slowly, and never to 2 c."""
    if not cap:
        return views
    return np.where(views > cap, cap * (2 - cap / np.maximum(views, cap)), views)


def pieces(values: NDArray[Any], size: int) -> Iterable[NDArray[Any]]:
    """The array in pieces of ``size``."""
    return (values[start : start + size] for start in range(0, len(values), size))


def piece_size(chunk: int) -> int:
    """About PIECE samples, in full chunks."""
    return max(1, PIECE // chunk) * chunk


def write_weights(
    path: str | os.PathLike[str], manifest: Manifest, values: Iterable[NDArray[Any]], cap: float, source: str
) -> WeightFacts:
    """Write the weights of a manifest's samples. ``values``: expected views, in pieces of ``piece_size`` samples.

    Samples that the manifest excludes get 0. Raises ConfigError if a number is negative or not finite, if all are 0, or
    if there are more or fewer than samples; OSError.
    """
    with atomic_write(path, OUTPUT_MODE) as file:
        file.seek(_HEADER + 8 * (manifest.samples // manifest.chunk + 1))
        count = _Count(manifest, cap, source)
        for piece in values:
            file.write(count.add(piece).astype("<u4").tobytes())
        facts = count.facts()
        file.seek(_HEADER)
        file.write(count.sums().astype("<u8").tobytes())
        file.seek(0)
        file.write(_header(facts))
    return facts


def _header(facts: WeightFacts) -> bytes:
    sums = 8 * (facts.samples // facts.chunk + 1)
    header = {
        "__metadata__": {KEY: json.dumps(asdict(facts))},
        "sums": {"dtype": "U64", "shape": [sums // 8], "data_offsets": [0, sums]},
        "weights": {"dtype": "U32", "shape": [facts.samples], "data_offsets": [sums, sums + 4 * facts.samples]},
    }
    text = json.dumps(header).encode().ljust(_HEADER - 8)
    if len(text) > min(_HEADER - 8, HEADER_LIMIT):
        raise ConfigError("the names of the weights are too long", "--out", facts.source[:100], "Use shorter names.")
    return len(text).to_bytes(8, "little") + text


class _Count:
    """Turns expected views into units, and counts."""

    def __init__(self, manifest: Manifest, cap: float, source: str) -> None:
        self._manifest = manifest
        self._cap = cap
        self._source = source
        self._done = 0
        self._totals = list[NDArray[np.uint64]]()
        self._hash = hashlib.sha256()
        self._bad = np.array(sorted(manifest.exceptions), dtype=np.int64)
        self._used = manifest.samples // manifest.chunk * manifest.chunk
        self._peak = (0, 1)
        self._positive = 0
        self._capped = 0
        self._squares = 0.0
        self._largest = 0
        self._smallest = 0

    def add(self, values: NDArray[Any]) -> NDArray[np.uint32]:
        """The units of the next samples."""
        first = self._done
        views = self._checked(values)
        self._done += len(views)
        if self._done > self._manifest.samples:
            raise self._other_count("more")
        units = np.floor(soft_cap(views, self._cap) * UNIT + 0.5).astype(np.uint32)
        bad = self._bad[np.searchsorted(self._bad, first) : np.searchsorted(self._bad, self._done)]
        units[bad - first] = 0
        self._hash.update(units.astype("<u4").tobytes())
        self._count(units[: max(0, self._used - first)], views)
        return units

    def facts(self) -> WeightFacts:
        """After the last sample."""
        manifest = self._manifest
        if self._done < manifest.samples:
            raise self._other_count("fewer")
        total = int(self.sums()[-1])
        if not total:
            remedy = "At least one sample that training uses needs a weight above 0."
            raise ConfigError("all weights are 0", self._source, remedy=remedy)
        facts = WeightFacts(
            version=NUMBER, manifest=manifest.digest, samples=manifest.samples, chunk=manifest.chunk, total=total,
            heaviest=int(np.concatenate(self._totals).max()), peak=self._peak[0], peak_chunk=self._peak[1],
            largest=self._largest / UNIT, smallest=self._smallest / UNIT, positive=self._positive,
            effective=round(total**2 / self._squares, 1), capped=self._capped, source=self._source,
            digest=self._hash.hexdigest(),
        )  # fmt: skip
        if facts.visits >= 1 << 31 or facts.chunk * facts.heaviest >= 1 << 63:
            remedy = "Lower the weights, or index the shards with larger chunks (--chunk)."
            raise ConfigError("the weights are too large for 64-bit numbers", self._source, total // UNIT, remedy)
        return facts

    def sums(self) -> NDArray[np.uint64]:
        """Sums before each full chunk, and T."""
        return np.concatenate([np.zeros(1, np.uint64), np.cumsum(np.concatenate(self._totals))])

    def _checked(self, values: NDArray[Any]) -> NDArray[np.float64]:
        if values.dtype.kind not in "fiu":
            what = f"they are no numbers, but {values.dtype}"
            raise ConfigError(what, self._source, remedy="Give expected views per epoch.")
        views = values.astype(np.float64)
        wrong = np.flatnonzero(~(np.isfinite(views) & (views >= 0) & (soft_cap(views, self._cap) <= MAX_VIEWS)))
        if wrong.size:
            place = int(wrong[0])
            what = f"the weight of sample {self._done + place} is no number from 0 to {MAX_VIEWS:,}"
            raise ConfigError(what, self._source, float(views[place]), "Give expected views per epoch.")
        return views

    def _count(self, units: NDArray[np.uint32], views: NDArray[np.float64]) -> None:
        if len(units) < self._manifest.chunk:
            return
        chunk = self._manifest.chunk
        rows = units[: len(units) // chunk * chunk].reshape(-1, chunk).astype(np.uint64)
        totals = rows.sum(axis=1)
        self._totals.append(totals)
        peaks = rows.max(axis=1)
        shares = np.divide(peaks, totals, out=np.zeros(len(totals)), where=totals > 0)
        most = int(shares.argmax())
        if int(peaks[most]) * self._peak[1] > self._peak[0] * int(totals[most]):
            self._peak = (int(peaks[most]), int(totals[most]))
        positive = units[units > 0]
        self._positive += len(positive)
        self._capped += int((views > self._cap).sum()) if self._cap else 0
        self._squares += float((positive.astype(np.float64) ** 2).sum())
        if len(positive):
            self._largest = max(self._largest, int(positive.max()))
            self._smallest = min(self._smallest or int(positive.min()), int(positive.min()))

    def _other_count(self, which: str) -> ConfigError:
        what = f"{which} numbers than the {self._manifest.samples:,} samples of the manifest"
        remedy = "Give a number per sample, in the order of the sample ids."
        return ConfigError(what, self._source, self._done, remedy)
