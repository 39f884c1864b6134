"""The work of one loader process: its lanes' part of every local batch, from shards to arrays. Imports no torch."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.config import derived, schema
from flip.data import augment as augmenting
from flip.data import decode, masking, sample_members
from flip.data.chunk_reader import ChunkCache, ChunkReader, Sample
from flip.data.decode import Pixels
from flip.data.decode_counts import REPLACEMENT, DecodeCounts
from flip.data.kernel import VisiblePatches, why_unused
from flip.data.masking import MaskSpec
from flip.data.prefetch import HANG_SECONDS, Prefetch, chunk_bytes
from flip.data.sources import DatasetSource
from flip.data.storage.client import IOStats
from flip.data.storage.obstore_storage import ObstoreStorage
from flip.data.storage.retry import Outage, RetryPolicy
from flip.runs.errors import DataError
from flip.tokenizer import Tokenizer

_ADVANCE_INTERVAL = 16
"""Samples of a lane between two updates of its prefetcher: an update per sample would cost more than the order."""


@dataclass(frozen=True)
class WorkerConfig:
    """Configuration of batch production; sent to workers as it is."""

    data: schema.Data
    augment: schema.Augment
    image: schema.ImageTower
    text: schema.TextTower
    """With a length of 0, captions stay texts, and no tokenizer is read."""
    seed: int

    @classmethod
    def of(cls, config: schema.Config) -> WorkerConfig:
        """What loader processes need to know of a resolved configuration, or of a stage's."""
        return cls(config.data, config.augment, config.model.image, config.model.text, config.seed)

    @property
    def affine(self) -> bool:
        """Whether views are an affine map of the crop."""
        return bool(self.augment.rotate or self.augment.translate or self.augment.zoom)

    @property
    def patches(self) -> int:
        """P."""
        return derived.patches(self.image)


class BatchBuffers(NamedTuple):
    """Arrays of n samples, as in ``loader.Batch``."""

    patches: NDArray[np.uint8]
    keep_indices: NDArray[np.int16]
    tokens: NDArray[np.int32]
    position_ids: NDArray[np.int16]
    ids: NDArray[np.int64]
    epochs: NDArray[np.int64]
    targets: NDArray[np.int32]
    fields: NDArray[np.float64]

    @staticmethod
    def shapes(config: WorkerConfig, samples: int, masks: MaskSpec) -> list[tuple[tuple[int, ...], str]]:
        """Shape and dtype of each field."""
        return [
            ((samples, masks.patches, 3 * config.image.patch**2), "u1"),
            ((samples, masks.patches), "i2"),
            ((samples, masks.tokens), "i4"),
            ((samples, masks.tokens), "i2"),
            ((samples,), "i8"),
            ((samples,), "i8"),
            ((samples, masks.targets), "i4"),
            ((samples, len(config.data.fields)), "f8"),
        ]


class ReplacedSample(NamedTuple):
    """An undecodable sample, for the log."""

    id: int
    shard: str
    ordinal: int
    reason: str


class Filled(NamedTuple):
    """What is no array of a batch that was written."""

    replaced: int
    """Undecodable samples that were replaced. Samples that a manifest excludes are replaced too, but not counted."""
    notes: list[ReplacedSample]
    """Replaced samples to be logged, excluded ones too: each bad sample once."""
    texts: list[str]
    """The caption of each sample; empty if captions become tokens."""


class BatchProducer:
    """Batches of the lanes ``lanes`` (of all L) from S = ``start`` on.

    The lanes may belong to several data sets: each has a stream, all share one reader. ``report`` receives storage
    outages.
    """

    def __init__(
        self, config: WorkerConfig, sources: Sequence[DatasetSource], lanes: range, start: int, batch: int,
        masks: MaskSpec, report: Callable[[Outage], None] | None = None,
    ) -> None:  # fmt: skip
        data = config.data
        self._shapes = BatchBuffers.shapes(config, len(lanes) * (batch // data.lanes), masks)
        retry_policy = RetryPolicy.of(data, hedge=data.hedge, absent_is_outage=True)
        cache = None
        if data.cache:
            cache = ChunkCache(data.cache, data.cache_bytes)
        remote = None
        if data.client == "obstore":
            remote = ObstoreStorage(data.timeout)
        self.reader = ChunkReader(retry_policy=retry_policy, remote=remote, cache=cache, report=report)
        position = start // data.lanes
        count = batch // data.lanes
        self._streams = list[tuple[DatasetStream, slice]]()
        for source in sources:
            own = source.own_lanes(lanes)
            if own:
                first = (source.lanes.start + own.start - lanes.start) * count
                stream = DatasetStream(config, source, own, position, count, masks, self.reader)
                self._streams.append((stream, slice(first, first + len(own) * count)))

    @property
    def counters(self) -> IOStats:
        """Counts of the reader since the start, and the bytes held now."""
        return dataclasses.replace(self.reader.counters, held=sum(stream.bytes_held for stream, _ in self._streams))

    @property
    def decoded(self) -> DecodeCounts:
        """How the images since the start were decoded."""
        return sum((stream.decoded for stream, _ in self._streams), DecodeCounts())

    def take(self) -> tuple[BatchBuffers, Filled]:
        """The next batch in new arrays, then what ``fill`` returns."""
        arrays: list[Any] = [np.empty(shape, kind) for shape, kind in self._shapes]
        out = BatchBuffers(*arrays)
        return out, self.fill(out)

    def fill(self, out: BatchBuffers) -> Filled:
        """Write the next batch. Raises DataError (a damaged shard, a block without a decodable sample) or
        StorageError."""
        replaced = 0
        notes = list[ReplacedSample]()
        texts = list[str]()
        for stream, rows in self._streams:
            own_rows: list[Any] = [field[rows] for field in out]
            filled = stream.fill(BatchBuffers(*own_rows))
            replaced += filled.replaced
            notes += filled.notes
            texts += filled.texts
        return Filled(replaced, notes, texts)

    def close(self) -> None:
        """Stop reading ahead."""
        for stream, _ in self._streams:
            stream.close()


class DatasetStream:
    """Lanes of one data set, numbered inside it, from ``position`` of each on; a batch takes ``count`` samples of each.

    Holds the raw bytes of the lanes' current blocks, and a share of the next ones that grows as the current ones drain
    (``flip.data.prefetch``).
    """

    def __init__(
        self, config: WorkerConfig, source: DatasetSource, lanes: range, position: int, count: int, masks: MaskSpec,
        reader: ChunkReader,
    ) -> None:  # fmt: skip
        self.config = config
        self.manifest = source.manifest
        self.lanes = lanes
        self.masks = masks
        self.first_id = source.first_id
        self.order = source.order(config.seed, config.data.block)
        self.position = position
        self.count = count
        self.reader = reader
        self.tokenizer = None
        if config.text.length:
            self.tokenizer = Tokenizer.of(config.data.tokenizer, config.text)
        if masks.targets:  # all of a caption, without what every caption has
            self.target_tokenizer = Tokenizer(config.data.tokenizer, masks.targets, False, config.text.repair)
        self._no_kernel = why_unused(config.data, config.augment, config.image)
        self.kernel = None
        if not self._no_kernel:
            self.kernel = VisiblePatches(config.data, config.augment, config.image)
        # Of shards that `flip shards recode` has written: all images were decoded, so that the kernel may skip.
        self._verified = self.manifest.restart_markers_verified
        self.bad: dict[int, str] = dict(self.manifest.exceptions)
        self._logged: set[int] = set()
        self.decoded = DecodeCounts()
        self._prefetcher: Prefetch | None = None

    def fill(self, out: BatchBuffers) -> Filled:
        """As ``BatchProducer.fill``."""
        ids, epochs = (field.ravel() for field in self.order.positions(self.lanes, self.position, self.count))
        if self._prefetcher is None:  # created with the first batch: an unused stream reads nothing
            read = partial(self.reader.fetch, self.manifest)
            size = partial(chunk_bytes, self.manifest)
            patience = self.reader.retry_policy.deadline + HANG_SECONDS
            self._prefetcher = Prefetch(self.order, self.lanes, self.position, read, self._skip_chunk, size, patience)
        prefetcher = self._prefetcher
        draws = _Draws(self, epochs, ids)
        out.ids[:] = draws.ids
        out.keep_indices[:] = draws.keep_indices
        out.epochs[:] = epochs
        captions = list[str]()
        notes = list[ReplacedSample]()
        replaced = 0
        for lane in range(len(self.lanes)):
            for k, places in _blocks(self.position, self.count, self.order.block_samples):
                block_ids, block_epochs = (field[lane] for field in self.order.cached_block(self.lanes, k))
                for n in places:
                    i = row = len(captions)
                    write_visible = partial(self._write_visible, draws, row, out.patches[i])
                    m, (image, texts, numbers) = self._next_decodable(lane, k, block_ids, n, notes, write_visible)
                    drawn = draws
                    if m != n:
                        replaced += int(ids[i]) not in self.manifest.exceptions
                        row = 0
                        epoch = self.order.replacement_epoch(block_epochs, n, m)
                        drawn = _Draws(self, np.array([epoch]), block_ids[m : m + 1])
                        out.ids[i] = drawn.ids[0]
                        out.keep_indices[i] = drawn.keep_indices[0]
                        out.epochs[i] = drawn.epochs[0]
                    if image is not None:
                        with decode.noting_place(partial(decode.place_of, self.manifest, int(block_ids[m]))):
                            self._write_patches(image, drawn, row, out.patches[i])
                    out.fields[i] = numbers
                    weights = self.config.data.caption_weights
                    first, second = (draws_of[row] for draws_of in drawn.caption)
                    captions.append(sample_members.choose_caption(texts, weights, first, second))
                    if n % _ADVANCE_INTERVAL == 0 or n == places[-1]:
                        prefetcher.advance(lane, k, n)
        self.position += self.count
        prefetcher.update_rate(self.count)
        if self.tokenizer is None:
            return Filled(replaced, notes, captions)
        self._write_tokens(self.tokenizer(captions), out)
        if self.masks.targets:
            self._write_targets(captions, out.targets)
        return Filled(replaced, notes, [])

    def _write_tokens(self, tokens: NDArray[np.int32], out: BatchBuffers) -> None:
        """Write the visible ones of the tokens (n, T), and their positions."""
        out.position_ids[:] = masking.visible_tokens(self.config.seed, out.epochs, out.ids, tokens, self.masks)
        out.tokens[:] = np.take_along_axis(tokens, out.position_ids.astype(np.int64), axis=1)

    def _write_targets(self, captions: Sequence[str], out: NDArray[np.int32]) -> None:
        """Write the distinct tokens of each caption, ascending, and -1 after them."""
        out[:] = -1
        for row, ids in zip(out, self.target_tokenizer(captions), strict=True):
            distinct = np.unique(self.target_tokenizer.own_tokens(ids))
            row[: len(distinct)] = distinct

    def _write_visible(self, draws: _Draws, row: int, out: NDArray[np.uint8], sample: Sample) -> str:
        """Write the visible patches of a sample without decoding all of it. Returns why it must be decoded; empty: it
        is written."""
        if self.kernel is None:
            return self._no_kernel
        content = sample_members.encoded_image(sample)
        if self.kernel.write(content, draws.view, row, draws.keep_indices[row], out, self._verified):
            return ""
        if self.kernel.error:
            self.decoded.fallbacks[self.kernel.error] += 1
        return self.kernel.refusal

    def _count(self, reason: str) -> None:
        """Count an image that the kernel (reason: empty) or a decoder has decoded."""
        if reason:
            self.decoded.whole[reason] += 1
        else:
            self.decoded.by_kernel += 1

    def _write_patches(self, image: Pixels, drawn: _Draws, row: int, out: NDArray[np.uint8]) -> None:
        config = self.config
        view = augmenting.view(image, config.image.size, config.augment, drawn.view, row, config.data.resize)
        decode.patches(view, config.image.patch, drawn.keep_indices[row], out)

    def _next_decodable(
        self, lane: int, k: int, ids: NDArray[np.int64], n: int, notes: list[ReplacedSample],
        write_visible: Callable[[Sample], str],
    ) -> tuple[int, tuple[Pixels | None, sample_members.CaptionGroups, list[float]]]:  # fmt: skip
        """(m, (pixels, captions, ``data.fields``)) of the first decodable place m of block k that may take place n.

        ``write_visible``: tried for the sample of place n itself; the pixels are None if it has written the patches,
        and returned no reason.
        """
        data = self.config.data
        chunk = self.manifest.chunk
        first = int(ids[n])
        prefetcher = self._prefetcher
        assert prefetcher is not None

        def load(id: int) -> tuple[Pixels | None, sample_members.CaptionGroups, list[float]]:
            with decode.noting_place(partial(decode.place_of, self.manifest, id)):
                sample = prefetcher.chunk(lane, k, id // chunk).samples[id % chunk]
                image = None
                reason = REPLACEMENT
                if id == first:
                    reason = write_visible(sample)
                if reason:
                    image = sample_members.image_of(
                        sample, data.decoder, data.to_rgb, data.exif, self.decoded.fallbacks
                    )
                captions = sample_members.caption_groups(sample, data.captions, data.caption_weights)
                numbers = sample_members.fields_of(sample, data.fields)
            self._count(reason)
            return image, captions, numbers

        decodable = sample_members.next_decodable(ids, self.order.replacements(ids, n, self.count), self.bad, load)
        if decodable is None:
            shard, ordinal = self.manifest.locate(int(ids[n]))
            raise DataError(
                f"none of the {len(ids)} samples of block {k} of lane {self.lanes[lane]} can be decoded",
                f"{shard}, sample {ordinal}",
                self.bad[int(ids[n])],
                f"Look for what is bad: flip shards verify {shlex.quote(str(self.manifest.folder))}",
            )
        for m in self.order.replacements(ids, n, self.count):
            if m == decodable[0]:
                break
            id = int(ids[m])
            if id not in self._logged:
                self._logged.add(id)
                notes.append(ReplacedSample(id, *self.manifest.locate(id), self.bad[id]))
        return decodable

    def _skip_chunk(self, j: int) -> bool:
        return all(id in self.bad for id in self.manifest.chunk_ids(j))

    def close(self) -> None:
        """Stop reading ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    @property
    def bytes_held(self) -> int:
        """Bytes of raw samples, requested ones included."""
        if self._prefetcher:
            return self._prefetcher.bytes
        return 0


def _blocks(position: int, count: int, block_samples: int) -> Iterator[tuple[int, range]]:
    """(k, places) of the blocks that contain positions ``position`` .. + ``count`` - 1 of a lane."""
    stop = position + count
    for k in range(position // block_samples, -(-stop // block_samples)):
        yield k, range(max(position - k * block_samples, 0), min(stop - k * block_samples, block_samples))


class _Draws:
    """All random draws of samples, by their epochs and ids."""

    def __init__(self, stream: DatasetStream, epochs: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        seed = stream.config.seed
        self.epochs = epochs
        self.ids = ids + stream.first_id
        self.view = augmenting.draw(stream.config.augment, seed, epochs, self.ids)
        masks = stream.masks
        self.keep_indices = masking.visible_patches(
            seed, epochs, self.ids, stream.config.patches, masks.patches, masks.patch_masking
        )
        self.caption = [masking.draw(seed, epochs, self.ids, masking.CAPTION, i) for i in (0, 1)]
