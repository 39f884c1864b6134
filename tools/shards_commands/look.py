"""One sample, or all samples of a step, as training takes them: for whoever asks what is in there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flip.config import schema
from flip.config.sets import shares
from flip.data import decode, masking
from flip.data.chunk_reader import ChunkReader, Sample
from flip.data.decode import Undecodable
from flip.data.manifest import tar
from flip.data.manifest.manifest import Manifest
from flip.data.mixture import Source
from flip.data.worker import captions_of, image_of
from flip.runs.errors import ConfigError, DataError


@dataclass(frozen=True)
class Found:
    """One sample. ``image``: its member, None where there is none; ``damage``: why its bytes are not to be had."""

    id: int
    shard: str
    ordinal: int
    chunk: int
    excepted: str | None
    key: str | None
    members: dict[str, int]
    """Extension -> bytes."""
    image: tuple[str, bytes] | None
    picture: dict[str, Any] | None
    """Format, width, height and mode as the header says; ``undecodable`` where training could not use it."""
    captions: list[str]
    json: Any
    damage: str | None


def sample(manifest: Manifest, id: int, captions: Sequence[str] = ("txt",), reader: ChunkReader | None = None) -> Found:
    """Sample ``id`` of a manifest. Raises ConfigError where there is none of that id, StorageError."""
    if not 0 <= id < manifest.samples:
        raise ConfigError(f"sample ids of this manifest are 0 .. {manifest.samples - 1}", "id", id)
    reader, chunk = reader or ChunkReader(), id // manifest.chunk
    shard, ordinal = manifest.locate(id)
    key, members, damage = None, Sample(), None
    try:
        members = reader.read_chunk(manifest, chunk)[id % manifest.chunk]
        key = _key(manifest, chunk, id % manifest.chunk, reader)
    except DataError as error:
        damage = error.paragraph()
    name = next((extension for extension in tar.EXTENSIONS if extension in members), None)
    image = (name, bytes(members[name])) if name else None
    try:
        lines = captions_of(members, list(captions))
    except Undecodable:
        lines = []
    return Found(
        id, shard, ordinal, chunk, manifest.exceptions.get(id), key,
        {extension: len(data) for extension, data in members.items()},
        image, _picture(image[1]) if image else None, lines, _json(members), damage,
    )  # fmt: skip


def _key(manifest: Manifest, chunk: int, place: int, reader: ChunkReader) -> str:
    id = manifest.chunk_ids(chunk).start
    for shard, start, stop, count in manifest.chunk_places(chunk):
        if place < count:
            held, picks = manifest.picks(shard, id, count)
            return tar.indexed(memoryview(reader.read(manifest.keys[shard], start, stop)), held)[picks[place]].key
        id, place = id + count, place - count
    raise AssertionError("a chunk reads all of its samples")


def _picture(data: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = decode.header(data)._asdict()
    except Undecodable as error:
        return {"undecodable": str(error)}
    try:
        decode.decode(data, "simplejpeg")
    except Undecodable as error:
        found["undecodable"] = str(error)
    return found


def _json(members: Sample) -> Any:
    """Where it holds NaN or an infinity, which Python alone writes and reads, None."""
    if "json" not in members:
        return None
    text = bytes(members["json"]).decode("utf-8", "replace")
    try:
        return json.loads(text, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return text


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


# -- a step of a run --------------------------------------------------------------------------------------------------


class Taken(NamedTuple):
    """A sample of a global batch: what stands at its place."""

    lane: int
    visit: int
    id: int
    shard: str
    ordinal: int
    stands_for: int | None
    """The id that the order names, where this one stands in for it."""
    caption: str | None
    """The caption that was drawn; None where samples are not read."""


def batch(
    config: schema.Config, sources: Sequence[Source], start: int, size: int, read: bool = True,
    reader: ChunkReader | None = None,
) -> Iterator[Taken]:  # fmt: skip
    """The global batch of ``size`` samples from S = ``start`` on, lane by lane, as it comes.

    ``read``: read and decode, so that samples that cannot be decoded are replaced as in training; without it only those
    that the manifests except are. Raises DataError, StorageError, or ConfigError where a manifest is not the one that
    the configuration was made for.
    """
    for share, source in zip(shares(config.data), sources, strict=True):
        found, planned = (source.manifest.samples, source.manifest.chunk), (share.samples, share.chunk)
        if found != planned:
            what = f"the run was planned for N = {planned[0]}, R = {planned[1]}; this manifest has others"
            raise ConfigError(what, str(source.manifest.folder), found, "Is it the run's own?")
    each, first = size // config.data.lanes, start // config.data.lanes
    for source in sources:
        yield from _of_set(config, source, range(first, first + each), (reader or ChunkReader()) if read else None)


def _of_set(config: schema.Config, source: Source, positions: range, reader: ChunkReader | None) -> Iterator[Taken]:
    order, manifest = source.order(config.seed, config.data.block), source.manifest
    bad = dict(manifest.exceptions)
    for lane in range(order.lanes):
        held = _Lane(config, source, reader, bad)
        for position in positions:
            k, n = divmod(position, order.span)
            ids, visits = (field[0] for field in order.held(range(lane, lane + 1), k))
            m, caption = held.good(ids.tolist(), visits.tolist(), n)
            id, stands_for = int(ids[m]), None if m == n else source.first_id + int(ids[n])
            place = source.lanes[lane], int(visits[m]), source.first_id + id
            yield Taken(*place, *manifest.locate(id), stands_for, caption)


class _Lane:
    """The chunks of one lane's present blocks: read once, let go with the lane."""

    def __init__(self, config: schema.Config, source: Source, reader: ChunkReader | None, bad: dict[int, str]) -> None:
        self.config, self.manifest, self.first_id = config, source.manifest, source.first_id
        self.reader, self.bad = reader, bad
        self.chunks: dict[int, list[Sample]] = {}

    def good(self, ids: list[int], visits: list[int], n: int) -> tuple[int, str | None]:
        """As ``Stream``: place n or the next good one, cyclic; and its caption."""
        for m in ((n + step) % len(ids) for step in range(len(ids))):
            if ids[m] in self.bad:
                continue
            if self.reader is None:
                return m, None
            try:
                return m, self._caption(ids[m], visits[m])
            except Undecodable as error:
                self.bad[ids[m]] = str(error)
        shard, ordinal = self.manifest.locate(ids[n])
        raise DataError(f"none of the {len(ids)} samples of its block can be decoded", f"{shard}, sample {ordinal}")

    def _caption(self, id: int, visit: int) -> str:
        assert self.reader is not None
        j = id // self.manifest.chunk
        if j not in self.chunks:
            self.chunks[j] = self.reader.read_chunk(self.manifest, j)
        members, data = self.chunks[j][id % self.manifest.chunk], self.config.data
        image_of(members, data.decoder, data.to_rgb)
        lines = captions_of(members, data.captions)
        return lines[int(masking.draw(self.config.seed, visit, self.first_id + id, masking.CAPTION, 0) * len(lines))]
