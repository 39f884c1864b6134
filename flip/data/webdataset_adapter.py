"""Samples in the order of ``flip.batches`` for webdataset pipelines (docs/batches.md, A pipeline of webdataset).

Yields what webdataset's readers yield: dictionaries of ``__key__``, ``__url__``, and the bytes of each member by its
extension; and ``__epoch__``.
"""

import os
import shlex
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.concurrency import data_loader_workers
from flip.config.derived import rank_lanes
from flip.config.loop_config import loop_config
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.manifest import Manifest
from flip.data.order import SampleOrder
from flip.data.prefetch import Prefetch, chunk_bytes
from flip.data.sample_members import next_decodable
from flip.runs.errors import ConfigError, DataError


class Samples:
    """One rank's samples of the global batches of ``flip.batches`` with the same arguments, batch after batch, endless.

    Use it as the first stage of a ``wds.DataPipeline``, in one process: it reads ahead in threads of its own.
    ``__key__`` is the sample id, ``__url__`` the shard, ``__epoch__`` how often the stream had passed over the data
    before: a crop that is drawn by key and epoch is another one in each epoch, and the same after a restart. Samples
    that the manifest excludes are replaced by the next usable sample of their block, as in training; undecodable ones
    are not.

    Raises ConfigError if the numbers do not fit each other, or in one of several worker processes of a DataLoader,
    which would all yield the same samples; DataError if the manifest excludes all samples of a block; DataError and
    StorageError as ``ChunkReader.fetch``.
    """

    def __init__(
        self, manifest: os.PathLike[str] | str, *, batch: int, start: int = 0, seed: int = 0, rank: int = 0,
        world: int = 1, lanes: int | None = None, block: int | None = None,
    ) -> None:  # fmt: skip
        data = loop_config(manifest, batch, start, rank, world, lanes, block, {"seed": seed}).data
        self.manifest = Manifest.load(data.manifest)
        self.order = SampleOrder(seed, self.manifest.samples, self.manifest.chunk, data.block, data.lanes)
        self.lanes = rank_lanes(data.lanes, rank, world)
        self.start = start // data.lanes
        self.count = batch // data.lanes

    def __call__(self) -> Iterator[dict[str, Any]]:
        """webdataset calls a first stage that is not a torch dataset."""
        return iter(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        _refuse_workers()
        manifest = self.manifest
        order = self.order
        position = self.start
        read = partial(ChunkReader().fetch, manifest)
        size = partial(chunk_bytes, manifest)
        prefetcher = Prefetch(order, self.lanes, position, read, lambda j: False, size)
        try:
            while True:
                order.positions(self.lanes, position, self.count)
                for lane in range(len(self.lanes)):
                    for at in range(position, position + self.count):
                        k, n = divmod(at, order.block_samples)
                        ids, epochs = (field[lane] for field in order.cached_block(self.lanes, k))
                        place = self._usable(ids, n)
                        id = int(ids[place])
                        members = prefetcher.chunk(lane, k, id // manifest.chunk).samples[id % manifest.chunk]
                        url = manifest.locate(id)[0]
                        keys = {"__key__": str(id), "__url__": url, "__epoch__": int(epochs[place])}
                        yield keys | {name: bytes(content) for name, content in members.items()}
                        prefetcher.advance(lane, k, n)
                position += self.count
                prefetcher.update_rate(self.count)
        finally:
            prefetcher.close()

    def _usable(self, ids: NDArray[np.int64], n: int) -> int:
        """The first place of a block, from place n on, whose sample the manifest does not exclude."""
        places = self.order.replacements(ids, n, self.count)
        usable = next_decodable(ids, places, self.manifest.exceptions, lambda id: None)
        if usable is None:
            shard, ordinal = self.manifest.locate(int(ids[n]))
            what = f"the manifest excludes all {len(ids)} samples of this block"
            again = f"flip shards drop {shlex.quote(str(self.manifest.folder))} --out NEW_FOLDER"
            remedy = f"Remove them: {again}"
            raise DataError(what, f"{shard}, sample {ordinal}", remedy=remedy)
        return usable[0]


def _refuse_workers() -> None:
    if data_loader_workers() > 1:
        what = "each worker of the DataLoader would yield all samples of the rank"
        remedy = "Use num_workers=0 or 1: more processes for decoding need flip.batches."
        raise ConfigError(what, "DataLoader(num_workers=...)", data_loader_workers(), remedy)
