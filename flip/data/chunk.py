"""A chunk as it came from storage, and its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from flip.data.manifest import tar
from flip.data.manifest.manifest import Manifest
from flip.runs.errors import DataError

Sample = dict[str, memoryview]
"""Member (extension) -> its bytes, a view of the chunk's buffer."""


@dataclass
class Chunk:
    """Chunk j of a manifest: its bytes, with the right CRC, a piece for each of ``manifest.chunk_places(j)``."""

    manifest: Manifest
    j: int
    pieces: Sequence[bytes | memoryview]

    @cached_property
    def samples(self) -> list[Sample]:
        """Found when they are first asked for, by the thread that asks: one that reads in the background would only
        take the interpreter from it. Raises DataError where the bytes are not the tar that was indexed.
        """
        manifest, j = self.manifest, self.j
        found: list[Sample] = []
        for piece, (shard, start, _, count) in zip(self.pieces, manifest.chunk_places(j), strict=True):
            held, picks = manifest.picks(shard, manifest.chunk_ids(j).start + len(found), count)
            view = memoryview(piece)
            try:
                walked = tar.indexed(view, held)
            except tar.Broken as error:
                raise rot(manifest, j, f"{error} after {start} of {manifest.keys[shard]}") from error
            members = (walked[i].members.items() for i in picks)
            found += [{name: view[at : at + size] for name, (at, size) in one} for one in members]
        return found


def rot(manifest: Manifest, j: int, what: str) -> DataError:
    """Bytes that storage will not give back as they were indexed."""
    ids = manifest.chunk_ids(j)
    first, last = ids.start, ids.stop - 1
    where = ", ".join(f"{key} bytes {start}-{stop}" for key, start, stop, _ in manifest.chunk_reads(j))
    return DataError(
        f"chunk {j} (samples {first} to {last}) is damaged: {what}",
        where,
        remedy="Restore the shard, or leave the samples out: "
        f"python tools/shards.py except {manifest.folder} --ids {first}-{last} --out NEW_FOLDER",
    )
