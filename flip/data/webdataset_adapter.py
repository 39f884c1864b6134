"""Samples in the order of training for webdataset pipelines (docs/reading.md, Your own pipeline).

Yields what webdataset's readers yield: dictionaries of ``__key__``, ``__url__``, and the bytes of each member by its
extension.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.data.chunk_reader import ChunkReader
from flip.data.decode import next_decodable
from flip.data.manifest.manifest import Manifest
from flip.data.order import SampleOrder
from flip.data.prefetch import Prefetch, chunk_bytes
from flip.runs.errors import ConfigError, DataError


class Samples:
    """One rank's samples of the global batches of size B = ``batch`` from S = ``start`` on, batch after batch, endless.

    Use it as the first stage of a ``wds.DataPipeline``, in one process: it reads ahead in threads of its own. ``lanes``
    is L, which divides B and S; W = ``world`` divides L. The n-th sample of a rank is a function of manifest, seed, B,
    L and S. ``__key__`` is the sample id, ``__url__`` the shard. Samples that the manifest excludes are replaced by the
    next usable sample of their block, as in training; undecodable ones are not.

    Raises ConfigError if the numbers do not fit each other, or in one of several worker processes of a DataLoader,
    which would all yield the same samples; DataError if the manifest excludes all samples of a block; DataError and
    StorageError as ``ChunkReader.fetch``.
    """

    def __init__(
        self, manifest: os.PathLike[str] | str, batch: int, lanes: int, seed: int = 0, start: int = 0, rank: int = 0,
        world: int = 1, block: int = 4,
    ) -> None:  # fmt: skip
        self.manifest = Manifest.load(manifest)
        if min(batch, lanes, world, block) < 1 or start < 0 or not 0 <= rank < world:
            what = "batch, lanes, world and block must be at least 1, start at least 0, and rank in 0 .. world - 1"
            values = f"{batch}, {lanes}, {world}, {block}; {start}; {rank}"
            raise ConfigError(what, "Samples", values)
        if batch % lanes or start % lanes or lanes % world:
            what = f"L must divide B = {batch} and S = {start}, and W = {world} must divide L"
            raise ConfigError(what, "lanes", lanes, "Choose L among the divisors of B, a multiple of W.")
        self.order = SampleOrder(seed, self.manifest.samples, self.manifest.chunk, block, lanes)
        self.lanes = range(rank * lanes // world, (rank + 1) * lanes // world)
        self.start = start // lanes
        self.count = batch // lanes

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
                        ids = order.cached_block(self.lanes, k)[0][lane]
                        id = self._usable(ids, n)
                        members = prefetcher.chunk(lane, k, id // manifest.chunk).samples[id % manifest.chunk]
                        url = manifest.locate(id)[0]
                        yield {"__key__": str(id), "__url__": url} | {n: bytes(data) for n, data in members.items()}
                        prefetcher.advance(lane, k, n)
                position += self.count
                prefetcher.update_rate(self.count)
        finally:
            prefetcher.close()

    def _usable(self, ids: NDArray[np.int64], n: int) -> int:
        """The first id of a block from place n on that the manifest does not exclude."""
        usable = next_decodable(ids, n, self.manifest.exceptions, lambda id: None)
        if usable is None:
            shard, ordinal = self.manifest.locate(int(ids[n]))
            what = f"the manifest excludes all {len(ids)} samples of this block"
            again = f"flip shards drop {shlex.quote(str(self.manifest.folder))} --out NEW_FOLDER"
            remedy = f"Remove them: {again}"
            raise DataError(what, f"{shard}, sample {ordinal}", remedy=remedy)
        return int(ids[usable[0]])


def _refuse_workers() -> None:
    torch = sys.modules.get("torch.utils.data")  # loaded in each worker of a DataLoader
    worker = torch and torch.get_worker_info()
    if worker and worker.num_workers > 1:
        what = "each worker of the DataLoader would yield all samples of the rank"
        remedy = "Use num_workers=0 or 1: more processes for decoding need flip.data.loader."
        raise ConfigError(what, "DataLoader(num_workers=...)", worker.num_workers, remedy)
