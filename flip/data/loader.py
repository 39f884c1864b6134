"""Batches for the trainer."""

import dataclasses
import logging
import math
import sys
from collections.abc import Generator
from typing import NamedTuple

import torch

from flip.config.derived import check_position, dataset_lanes, rank_lanes, visible_patch_count, visible_token_count
from flip.config.weights import refuse_unfit
from flip.data.decode_counts import DecodeCounts
from flip.data.masking import MaskSpec
from flip.data.patch_masking import patch_masking as patch_masking_of
from flip.data.sources import datasets_digest, load_sources, order_number
from flip.data.storage.client import IOStats
from flip.data.storage.retry import OutageBoard
from flip.data.text_masking import text_masking as masking_class
from flip.data.worker import BatchProducer, ReplacedSample, WorkerConfig
from flip.data.worker_pool import WorkerPool
from flip.runs.errors import ConfigError, DataError

log = logging.getLogger("flip.data")

_FIRST_IMAGES = 1000
"""Images of a rank after which the log says how they were decoded; again at the end of the stage."""

_MIN_SAMPLES_CHECKED = 1000
"""Samples over which the share of replaced ones is computed at least: one bad sample among the first ten is no 10 %."""


class Batch(NamedTuple):
    """A local batch of b samples, in lane order."""

    patches: torch.Tensor
    """(b, K, p*p*3) uint8: the visible patches; inside a patch row, column, channel."""
    keep_indices: torch.Tensor
    """(b, K) int16: their indices."""
    tokens: torch.Tensor
    """(b, T) int32; T is smaller than the length of captions in a stage with a text mask."""
    ids: torch.Tensor
    """(b,) int64: sample ids; of a replaced sample the id of its replacement."""
    epochs: torch.Tensor
    """(b,) int64: how often the stream had passed over the data before. With the seed, id and epoch determine crop,
    mask and caption of a sample."""
    replaced: int
    """Samples found undecodable while reading. Samples that the manifest excludes are replaced too, but not counted."""
    samples_seen: int
    """S after this batch, of all ranks: where the next one starts."""
    position_ids: torch.Tensor | None = None
    """(b, T) int16: position ids of the tokens; None: 0 .. T-1."""
    targets: torch.Tensor | None = None
    """(b, 77) int32: the distinct tokens of each caption, then -1; None: the stage classifies none."""
    texts: list[str] | None = None
    """The b captions, if there is no tokenizer."""
    fields: torch.Tensor | None = None
    """(b, F) float64: the numbers of ``data.fields``, a column for each; None: none are named."""

    def images(self) -> torch.Tensor:
        """(b, 3, size, size) uint8: whole images, RGB. Raises ConfigError if patches are hidden."""
        samples, count, values = self.patches.shape
        side = math.isqrt(count)
        patch = math.isqrt(values // 3)
        if side * side != count or bool((self.keep_indices[:, -1] != count - 1).any()):
            what = f"a mask hides patches of these images, which have {count} left"
            raise ConfigError(what, "Batch.images()", remedy='Use mask="0", or patches and keep_indices.')
        grid = self.patches.reshape(samples, side, side, patch, patch, 3)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(samples, 3, side * patch, side * patch)


class Loader:
    """One rank's share of every global batch: lanes rL/W .. (r+1)L/W - 1.

    Takes a resolved configuration (no ``auto``). Raises ConfigError if its numbers fit neither each other nor the
    manifest, DataError or PermissionDenied if the manifest cannot be read. ``pinned``: batches lie in page-locked
    memory, so that copies to a GPU are asynchronous.
    """

    def __init__(self, config: WorkerConfig, rank: int = 0, world_size: int = 1, pinned: bool = False) -> None:
        data = config.data
        self.config = config
        self.sources = load_sources(data)
        self._check_chunks()
        self.digest: str = datasets_digest(self.sources)
        self.order_number = order_number(data)
        """The version of the order of samples."""
        self.lanes = rank_lanes(data.lanes, rank, world_size)
        if not 0 <= data.workers <= len(self.lanes):
            what = f"a rank has {len(self.lanes)} lanes, and every worker needs one"
            raise ConfigError(what, "data.workers", data.workers, "Set fewer workers.")
        self._pinned = pinned
        self._producer: WorkerPool | BatchProducer | None = None
        self._counted = IOStats()
        self._decoded = DecodeCounts()
        self.outages = OutageBoard()
        """Storage outages of this rank while batches are waited for."""

    def batches(
        self, start: int, batch: int, mask: str, text_mask: str = "0", text_masking: str = "random",
        config: WorkerConfig | None = None, targets: int = 0, patch_masking: str = "uniform",
    ) -> Generator[Batch, None, None]:  # fmt: skip
        """Yield local batches without end: those of the global batches of size B = ``batch`` from S = ``start`` on.

        ``config``: with the images, texts and augmentation of this stage; None: as before. ``targets``: positions of
        the tokens to be classified; 0: none.
        Workers start at once, before the first batch is requested, and end with the iterator, the next call, or
        ``close``. The iterator raises DataError or StorageError, also those of workers.
        """
        self.close()
        self.config = config = config or self.config
        check_position(start, batch, config.data.lanes)
        for source in self.sources:
            if source.weights:
                lanes, block = config.data.lanes, config.data.block
                refuse_unfit(source.weights.facts, config.data.weights, lanes, block, batch)
        tokens = visible_token_count(config.text, text_mask)
        masking = masking_class(text_masking).of(config.data)
        visible = visible_patch_count(config.image, mask)
        way = patch_masking_of(patch_masking)
        masks = MaskSpec(visible, tokens, masking, config.text.causal, targets, way)
        self._counted = self.counters()
        self._decoded = self.decoded()
        self._producer = None
        producer: WorkerPool | BatchProducer
        if config.data.workers:
            producer = WorkerPool(config, self.lanes, start, batch, masks, config.data.workers, self.outages.add)
        else:
            producer = BatchProducer(config, self.sources, self.lanes, start, batch, masks, self.outages.add)
        self._producer = producer
        return self._iterate(producer, range(start + batch, sys.maxsize, batch), masks)

    def counters(self) -> IOStats:
        """I/O counts of this rank over all ``batches`` so far; cap and held are the current ones."""
        if self._producer is None:
            return self._counted
        return dataclasses.replace(self._counted, cap=0, held=0) + self._producer.counters

    def decoded(self) -> DecodeCounts:
        """How the images of this rank over all ``batches`` so far were decoded."""
        if self._producer is None:
            return self._decoded
        return self._decoded + self._producer.decoded

    def close(self) -> None:
        """End the workers."""
        if isinstance(self._producer, WorkerPool):
            self._producer.close()
        self.outages.clear()

    def _iterate(
        self, producer: WorkerPool | BatchProducer, ends: range, masks: MaskSpec
    ) -> Generator[Batch, None, None]:
        """``ends``: S after each batch."""
        where = ", ".join(str(source.manifest.folder) for source in self.sources)
        replaced_samples = _ReplacedSamples(self.config.data.max_replaced, where)
        is_logged = False
        try:
            for end in ends:
                # No variable here holds a batch: its memory is filled again when the caller has dropped it.
                yield self._next(producer, end, masks, replaced_samples)
                if not is_logged and producer.decoded.images >= _FIRST_IMAGES:
                    is_logged = True
                    log.info("visible-patch kernel, first images: %s", producer.decoded.summary())
        finally:
            producer.close()
            log.info("visible-patch kernel: %s", producer.decoded.summary())

    def _next(
        self, producer: WorkerPool | BatchProducer, end: int, masks: MaskSpec, replaced_samples: "_ReplacedSamples"
    ) -> Batch:
        buffers, filled = producer.take()
        replaced_samples.add(len(buffers.ids), filled.replaced, filled.notes)
        tensors = [torch.from_numpy(field) for field in buffers]
        if self._pinned:
            tensors = [tensor.pin_memory() for tensor in tensors]  # new memory: a device may still copy from the last
        patches, keep_indices, tokens, position_ids, ids, epochs, targets, fields = tensors
        batch = Batch(patches, keep_indices, tokens, ids, epochs, filled.replaced, end)
        if masks.tokens < self.config.text.length:
            batch = batch._replace(position_ids=position_ids)
        if masks.targets:
            batch = batch._replace(targets=targets)
        if self.config.data.fields:
            batch = batch._replace(fields=fields)
        if not self.config.text.length:
            batch = batch._replace(texts=filled.texts)
        return batch

    def _check_chunks(self) -> None:
        for share, source in zip(dataset_lanes(self.config.data), self.sources, strict=True):
            manifest = source.manifest
            if share.chunk != manifest.chunk:
                raise ConfigError(
                    f"the manifest {manifest.folder} was indexed with chunks of {manifest.chunk} samples",
                    f"data.sets.{share.name}.chunk" if share.name else "data.chunk",
                    share.chunk,
                    "Set it to that, or index the shards again with --chunk.",
                )


class _ReplacedSamples:
    """Logs samples that were replaced. Raises DataError if their share of all samples so far is above a limit."""

    def __init__(self, limit: float, where: str) -> None:
        self._limit = limit
        self._where = where
        self._samples = 0
        self._replaced = 0

    def add(self, samples: int, replaced: int, notes: list[ReplacedSample]) -> None:
        self._samples += samples
        self._replaced += replaced
        for note in notes:
            log.warning("%s, sample %d replaced: %s", note.shard, note.ordinal, note.reason)
        if self._replaced <= self._limit * max(self._samples, _MIN_SAMPLES_CHECKED):
            return
        last = ""
        if notes:
            last = f"; the last one is sample {notes[-1].ordinal} of {notes[-1].shard}"
        raise DataError(
            f"{self._replaced} of {self._samples} samples had to be replaced, more than data.max_replaced allows{last}",
            self._where,
            self._limit,
            "Look at the shards that the log names, or raise data.max_replaced.",
        )
