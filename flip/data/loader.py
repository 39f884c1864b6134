"""Batches for the trainer: the file of this room that it calls (evaluation calls ``images``)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from flip.concurrency import prepare_forkserver
from flip.config import schema
from flip.config.derived import Share, shares
from flip.costs import SLOTS
from flip.data import masking, mixture
from flip.data.manifest.manifest import Manifest
from flip.data.masking import Kept
from flip.data.memory import Memory, memory, part_bytes
from flip.data.mixture import Source
from flip.data.storage.client import IOStats
from flip.data.storage.retry import OutageBoard
from flip.data.worker import Part, Replaced, Spec, Streams
from flip.data.worker_pool import Pool
from flip.runs.errors import ConfigError, DataError

__all__ = ["Batch", "Loader", "prepare_forkserver"]

log = logging.getLogger("flip.data")

_JUDGED = 1000
"""Samples over which the share of replaced ones is judged at least: one bad picture among the first ten is no 10 %."""


class Batch(NamedTuple):
    """A local batch of b samples, in lane order."""

    patches: torch.Tensor
    """(b, K, p*p*3) uint8: the visible patches, row, column, channel inside each."""
    keep: torch.Tensor
    """(b, K) int16: their positions."""
    tokens: torch.Tensor
    """(b, T) int32, T of a stage with a text mask smaller than the length of captions."""
    ids: torch.Tensor
    """(b,) int64: sample ids; of a replaced sample the id that stands in for it."""
    replaced: int
    """Bad samples found while reading; those that the manifest excepts are replaced too, but not counted."""
    witness: torch.Tensor | None
    """(b,) int64, for tests: the first 8 bytes of the SHA-256 of the decoded pixels before the crop."""
    places: torch.Tensor | None = None
    """(b, T) int16: positions of the tokens; None: all of a caption, 0 .. T-1."""


class Loader:
    """One rank's share of every global batch: lanes rL/W .. (r+1)L/W - 1.

    The configuration is a resolved one (no ``auto``). Raises ConfigError where its numbers do not fit each other or the
    manifest, DataError or PermissionDenied where the manifest cannot be read. ``pinned``: batches lie in page-locked
    memory, from which a GPU copies while the host goes on.
    """

    def __init__(
        self,
        data: schema.Data,
        augment: schema.Augment,
        image: schema.ImageTower,
        text: schema.TextTower,
        seed: int,
        rank: int = 0,
        world: int = 1,
        witness: bool = False,
        pinned: bool = False,
    ) -> None:
        self.spec = Spec(data, augment, image, text, seed, witness)
        self.sources = mixture.sources(data)
        _check(data, self.sources, world)
        self.samples: int = sum(one.manifest.samples for one in self.sources)
        """N, of all data sets."""
        self.digest: str = mixture.digest(self.sources)
        self.lanes = range(rank * data.lanes // world, (rank + 1) * data.lanes // world)
        self._pinned = pinned
        self._pool: Pool | None = None
        self._source: Pool | Streams | None = None
        self._counted = IOStats()
        self.outages = OutageBoard()
        """Of this rank's storage, while batches are waited for."""

    def batches(
        self, start: int, batch: int, mask: str, text_mask: str = "0", text_masking: str = "random"
    ) -> Iterator[Batch]:
        """Local batches without end: those of the global batches of size B = ``batch`` from S = ``start`` on.

        Workers start at once, before the first batch is asked for, and end with the iterator, the next call, or
        ``close``. The iterator raises DataError or StorageError, in the main process whoever met it.
        """
        self.close()
        lanes = self.spec.data.lanes
        if start % lanes or batch % lanes:
            what = f"S = {start} and B = {batch} must be multiples of the number of lanes"
            raise ConfigError(what, "data.lanes", lanes)
        tokens = masking.kept(self.spec.text.length, text_mask)
        kept = Kept(masking.kept(self.spec.patches, mask), tokens, text_masking == "prioritised")
        self._counted, self._source = self.counters(), None
        if self.spec.data.workers:
            self._pool = Pool(self.spec, self.lanes, start, batch, kept, self.spec.data.workers, self.outages.add)
        if self.lanes.start == 0:  # one line for all ranks
            log.info("%s", self._memory(batch, kept))
        self._source = self._pool or Streams(self.spec, self.sources, self.lanes, start, batch, kept, self.outages.add)
        return self._iterate(self._source, len(self.lanes) * (batch // lanes), kept)

    def counters(self) -> IOStats:
        """What this rank's readers did for all ``batches`` until now; cap and held are those of the present ones."""
        if self._source is None:
            return self._counted
        return dataclasses.replace(self._counted, cap=0, held=0) + self._source.counters

    def _memory(self, batch: int, kept: Kept) -> Memory:
        data = self.spec.data
        shapes = Part.shapes(self.spec, len(self.lanes) * (batch // data.lanes), kept)
        parts = SLOTS * part_bytes(shapes) if data.workers else 0
        return memory(self.sources, self.lanes, data.block, data.workers, parts)

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self.outages.clear()

    def _iterate(self, source: Pool | Streams, samples: int, kept: Kept) -> Iterator[Batch]:
        seen = replaced = 0
        try:
            while True:
                fields = [  # new ones for each batch: one that a device still copies from stays as it is
                    torch.empty(shape, dtype=getattr(torch, np.dtype(kind).name), pin_memory=self._pinned)
                    for shape, kind in Part.shapes(self.spec, samples, kept)
                ]
                more, notes = source.fill(Part(*(field.numpy() for field in fields)))
                seen, replaced = seen + samples, replaced + more
                for note in notes:
                    log.warning("%s, sample %d replaced: %s", note.shard, note.ordinal, note.reason)
                self._judge(seen, replaced, notes)
                patches, keep, tokens, places, ids, witness = fields
                shortened = places if kept.tokens < self.spec.text.length else None
                yield Batch(patches, keep, tokens, ids, more, witness if self.spec.witness else None, shortened)
        finally:
            source.close()

    def _judge(self, seen: int, replaced: int, notes: list[Replaced]) -> None:
        limit = self.spec.data.max_replaced
        if replaced > limit * max(seen, _JUDGED):
            last = f"; the last one is sample {notes[-1].ordinal} of {notes[-1].shard}" if notes else ""
            raise DataError(
                f"{replaced} of {seen} samples had to be replaced, more than data.max_replaced allows{last}",
                ", ".join(str(one.manifest.folder) for one in self.sources),
                limit,
                "Look at the shards that the log names, or raise data.max_replaced.",
            )


def _check(data: schema.Data, sources: Sequence[Source], world: int) -> None:
    for share, source in zip(shares(data), sources, strict=True):
        _check_set(share, source.manifest)
    if data.lanes < 1 or data.lanes % world:
        raise ConfigError(f"the number of lanes must be a multiple of the {world} ranks", "data.lanes", data.lanes)
    if not 0 <= data.workers <= data.lanes // world:
        what = f"a rank has {data.lanes // world} lanes, and every worker needs one"
        raise ConfigError(what, "data.workers", data.workers, "Set fewer workers.")


def _check_set(share: Share, manifest: Manifest) -> None:
    if share.chunk != manifest.chunk:
        raise ConfigError(
            f"the manifest {manifest.folder} was indexed with chunks of {manifest.chunk} samples",
            f"data.sets.{share.name}.chunk" if share.name else "data.chunk",
            share.chunk,
            "Set it to that, or index the shards anew with --chunk.",
        )
    if manifest.samples < manifest.chunk:
        what = f"{manifest.samples} samples are less than one chunk of {manifest.chunk}"
        raise ConfigError(what, str(manifest.folder), remedy="Index the shards anew with a smaller --chunk.")
