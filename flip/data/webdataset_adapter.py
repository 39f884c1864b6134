"""Samples in our order for people's own webdataset stages (docs/shards.md, Your own pipeline).

What comes out is what webdataset's readers make of a shard: dictionaries of ``__key__``, ``__url__``, and a member's
bytes by its extension. Position and order are ours; what later stages do to them is not known here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.manifest import Manifest
from flip.data.order import Order
from flip.data.prefetch import Prefetch
from flip.runs.errors import ConfigError


class Samples:
    """One rank's samples of the global batches of size B = ``batch`` from S = ``start`` on, batch after batch, endless.

    ``lanes``: L, which divides B and S, and W = ``world`` divides. Stands at the head of a ``wds.DataPipeline``: the
    n-th sample of a rank is a function of manifest, seed, B, L and S. ``__key__`` is the sample id, ``__url__`` the
    shard. What the manifest excepts is replaced by the next good sample of its block, as in training; what a stage
    cannot decode is that stage's matter. Iterate it in one process: it reads ahead in threads of its own.

    Raises ConfigError where the numbers do not fit each other, or in one of several worker processes of a DataLoader,
    which would all yield the same samples; DataError and StorageError as ``ChunkReader.fetch``.
    """

    def __init__(
        self, manifest: os.PathLike[str] | str, batch: int, lanes: int, seed: int = 0, start: int = 0, rank: int = 0,
        world: int = 1, block: int = 4,
    ) -> None:  # fmt: skip
        self.manifest = Manifest.load(manifest)
        if min(batch, lanes) < 1 or batch % lanes or start % lanes or lanes % world:
            what = f"L must divide B = {batch} and S = {start}, and W = {world} must divide L"
            raise ConfigError(what, "lanes", lanes, "Choose L among the divisors of B, a multiple of W.")
        self.order = Order(seed, self.manifest.samples, self.manifest.chunk, block, lanes)
        self.lanes = range(rank * lanes // world, (rank + 1) * lanes // world)
        self.start, self.count = start // lanes, batch // lanes

    def __call__(self) -> Iterator[dict[str, Any]]:
        """As webdataset begins its first stage where that is no dataset of torch."""
        return iter(self)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        _refuse_workers()
        manifest, order, size = self.manifest, self.order, self.manifest.chunk
        read, position = partial(ChunkReader().fetch, manifest), self.start
        ahead = Prefetch(order, self.lanes, position, read, self._useless, self._bytes)
        try:
            while True:
                order.part(self.lanes, position, self.count)
                for a in range(len(self.lanes)):
                    for at in range(position, position + self.count):
                        k, n = divmod(at, order.span)
                        id = self._good(order.held(self.lanes, k)[0][a].tolist(), n)
                        members = ahead.chunk(a, k, id // size).samples[id % size]
                        url = manifest.locate(id)[0]
                        yield {"__key__": str(id), "__url__": url} | {n: bytes(data) for n, data in members.items()}
                        ahead.passed(a, k, n)
                position += self.count
                ahead.paced(self.count)
        finally:
            ahead.close()

    def _good(self, ids: list[int], n: int) -> int:
        """The id at place n of a block, or the next one, cyclic, that is not excepted."""
        good = (id for id in ids[n:] + ids[:n] if id not in self.manifest.exceptions)
        return next(good, ids[n])

    def _bytes(self, j: int) -> int:
        return sum(stop - start for _, start, stop, _ in self.manifest.chunk_places(j))

    def _useless(self, j: int) -> bool:
        return False


def _refuse_workers() -> None:
    torch = sys.modules.get("torch.utils.data")  # a worker of a DataLoader has it
    worker = torch and torch.get_worker_info()
    if worker and worker.num_workers > 1:
        what = "each worker of the DataLoader would yield all samples of the rank"
        remedy = "Use num_workers=0 or 1: more processes for decoding need flip.data.loader."
        raise ConfigError(what, "DataLoader(num_workers=...)", worker.num_workers, remedy)
