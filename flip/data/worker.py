"""The work of one loader process: its lanes' part of every local batch, from bytes on disk to arrays.

Imports no torch: a worker that needs none starts in a blink and stays small.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flip.config import schema
from flip.data import augment as augmenting
from flip.data import decode, masking
from flip.data.chunk_reader import Cache, ChunkReader, Sample
from flip.data.decode import Pixels, Undecodable
from flip.data.manifest import tar
from flip.data.masking import Kept
from flip.data.mixture import Source
from flip.data.prefetch import Prefetch
from flip.data.storage.client import IOStats
from flip.data.storage.obstore_storage import ObstoreStorage
from flip.data.storage.retry import Outage, RetryPolicy
from flip.runs.errors import ConfigError, DataError
from flip.tokenizer import Tokenizer

TEXT_LIMIT = 4 << 20
"""Bytes of a member that holds captions: of a text the first ones are read, a larger JSON member is refused."""
_OFTEN = 16
"""Samples of a lane after which its reads ahead are looked at: after each one it would cost more than the order."""


@dataclass(frozen=True)
class Spec:
    """What a process must know to make batches; travels to workers as it is."""

    data: schema.Data
    augment: schema.Augment
    image: schema.ImageTower
    text: schema.TextTower
    seed: int
    witness: bool = False

    @property
    def affine(self) -> bool:
        """Whether views are an affine map of the crop."""
        return bool(self.augment.rotate or self.augment.translate or self.augment.zoom)

    @property
    def patches(self) -> int:
        """P."""
        return (self.image.size // self.image.patch) ** 2


class Part(NamedTuple):
    """Arrays of n samples, as in ``loader.Batch``."""

    patches: NDArray[np.uint8]
    keep: NDArray[np.int16]
    tokens: NDArray[np.int32]
    places: NDArray[np.int16]
    ids: NDArray[np.int64]
    witness: NDArray[np.int64]

    def rows(self, rows: slice) -> Part:
        """A view of some samples."""
        fields: Iterator[Any] = (field[rows] for field in self)
        return Part(*fields)

    @staticmethod
    def shapes(spec: Spec, samples: int, kept: Kept) -> list[tuple[tuple[int, ...], str]]:
        """Shape and type of each field."""
        row = spec.image.patch**2 * 3
        return [
            ((samples, kept.patches, row), "u1"),
            ((samples, kept.patches), "i2"),
            ((samples, kept.tokens), "i4"),
            ((samples, kept.tokens), "i2"),
            ((samples,), "i8"),
            ((samples,), "i8"),
        ]


class Replaced(NamedTuple):
    """A sample that stood in for another: what the log says of the bad one."""

    id: int
    shard: str
    ordinal: int
    reason: str


class Streams:
    """Parts of the lanes ``lanes`` (of all L) from S = ``start`` on; ``fill`` makes the next one.

    The lanes may lie in several data sets: there is a stream for each, and one reader for all. ``report``: takes the
    reader's outages.
    """

    def __init__(
        self, spec: Spec, sources: Sequence[Source], lanes: range, start: int, batch: int, kept: Kept,
        report: Callable[[Outage], None] | None = None,
    ) -> None:  # fmt: skip
        data = spec.data
        patience = RetryPolicy(deadline=data.deadline, timeout=data.timeout, hedge=data.hedge)
        cache = Cache(data.cache, data.cache_bytes) if data.cache else None
        remote = ObstoreStorage(data.timeout) if data.client == "obstore" else None
        self.reader = ChunkReader(retry_policy=patience, remote=remote, cache=cache, report=report)
        position, count = start // spec.data.lanes, batch // spec.data.lanes
        self._streams = list[tuple[Stream, slice]]()
        for source in sources:
            part = source.part(lanes)
            if part:
                first = (source.lanes.start + part.start - lanes.start) * count
                stream = Stream(spec, source, part, position, count, kept, self.reader)
                self._streams.append((stream, slice(first, first + len(part) * count)))

    @property
    def counters(self) -> IOStats:
        """Of its reader, from the beginning, and what is held now."""
        return dataclasses.replace(self.reader.counters, held=sum(stream.held for stream, _ in self._streams))

    def fill(self, out: Part) -> tuple[int, list[Replaced]]:
        """Write the next part; returns how many samples were replaced, and those to be logged (each bad one once).

        Samples that a manifest excepts are replaced and logged too, but not counted: they were known.
        Raises DataError (a damaged shard, a block without a good sample) or StorageError.
        """
        replaced, notes = 0, list[Replaced]()
        for stream, rows in self._streams:
            more, told = stream.fill(out.rows(rows))
            replaced, notes = replaced + more, notes + told
        return replaced, notes

    def close(self) -> None:
        """No read goes on."""
        for stream, _ in self._streams:
            stream.close()


class Stream:
    """Lanes of one data set, numbered inside it, from ``position`` of each on; ``count`` samples of each make a part.

    Of each lane the raw bytes of its present block are held, and of the next one a share that grows as the present one
    drains (``flip.data.prefetch``).
    """

    def __init__(
        self, spec: Spec, source: Source, lanes: range, position: int, count: int, kept: Kept, reader: ChunkReader
    ) -> None:
        self.spec, self.manifest, self.lanes, self.kept = spec, source.manifest, lanes, kept
        self.first_id, self.order = source.first_id, source.order(spec.seed, spec.data.block)
        self.position, self.count, self.reader = position, count, reader
        self.tokenizer = Tokenizer.of(spec.data.tokenizer, spec.text)
        self.bad: dict[int, str] = dict(self.manifest.exceptions)
        self._told: set[int] = set()
        self._ahead: Prefetch | None = None

    def fill(self, out: Part) -> tuple[int, list[Replaced]]:
        """As ``Streams.fill``."""
        ids, visits = (field.ravel() for field in self.order.part(self.lanes, self.position, self.count))
        ahead = self._ahead = self._ahead or self._prefetch()
        draws = _Draws(self, visits, ids)
        out.ids[:], out.keep[:], seen = draws.ids, draws.keep, visits.copy()
        captions, replaced, notes = list[str](), 0, list[Replaced]()
        for a in range(len(self.lanes)):
            for k, places in _blocks(self.position, self.count, self.order.span):
                block = _Block(self, ahead, a, k)
                for n in places:
                    i = row = len(captions)
                    m, image, lines = self._good(block, n, notes)
                    drawn = draws
                    if m != n:
                        replaced += int(ids[i]) not in self.manifest.exceptions
                        row, drawn = 0, _Draws(self, block.visits[m : m + 1], block.ids[m : m + 1])
                        out.ids[i], out.keep[i], seen[i] = drawn.ids[0], drawn.keep[0], drawn.visits[0]
                    self._cut(image, drawn, row, out.patches[i])
                    captions.append(lines[int(drawn.caption[row] * len(lines))])
                    if self.spec.witness:
                        out.witness[i] = np.frombuffer(hashlib.sha256(image.tobytes()).digest()[:8], "<i8")[0]
                    if n % _OFTEN == 0 or n == places[-1]:
                        ahead.passed(a, k, n)
        tokens = self.tokenizer(captions)
        out.places[:] = masking.places(self.spec.seed, seen, out.ids, tokens, self.kept)
        out.tokens[:] = np.take_along_axis(tokens, out.places.astype(np.int64), axis=1)
        self.position += self.count
        ahead.paced(self.count)
        return replaced, notes

    def _cut(self, image: Pixels, drawn: _Draws, row: int, out: NDArray[np.uint8]) -> None:
        """Write the kept patches of a view."""
        spec = self.spec
        view = augmenting.view(image, spec.image.size, spec.augment, drawn.view, row, spec.data.resize)
        decode.patches(view, spec.image.patch, drawn.keep[row], out)

    def _prefetch(self) -> Prefetch:
        """Begun with the first part, so that what is not used reads nothing."""
        read = partial(self.reader.fetch, self.manifest)
        return Prefetch(self.order, self.lanes, self.position, read, self._useless, self._bytes)

    def _good(self, block: _Block, n: int, notes: list[Replaced]) -> tuple[int, Pixels, list[str]]:
        """Place n of a block, or the next place (cyclic) that can be decoded: (place, pixels, captions)."""
        ids = block.ids
        for m in chain(range(n, len(ids)), range(n)):
            id = int(ids[m])
            if id not in self.bad:
                sample = block.sample(id)
                try:
                    data = self.spec.data
                    return m, image_of(sample, data.decoder, data.to_rgb), captions_of(sample, data.captions)
                except Undecodable as error:
                    self.bad[id] = str(error)
            if id not in self._told:
                self._told.add(id)
                notes.append(Replaced(id, *self.manifest.locate(id), self.bad[id]))
        shard, ordinal = self.manifest.locate(int(ids[n]))
        raise DataError(
            f"none of the {len(ids)} samples of block {block.k} of lane {self.lanes[block.a]} can be decoded",
            f"{shard}, sample {ordinal}",
            self.bad[int(ids[n])],
            f"Look for what is bad: python tools/shards.py verify {self.manifest.folder}",
        )

    def close(self) -> None:
        """No read goes on."""
        if self._ahead is not None:
            self._ahead.close()

    @property
    def held(self) -> int:
        """Bytes of raw samples, those that are asked for included."""
        return self._ahead.bytes if self._ahead else 0

    def _bytes(self, j: int) -> int:
        return sum(stop - start for _, start, stop, _ in self.manifest.chunk_places(j))

    def _useless(self, j: int) -> bool:
        return all(id in self.bad for id in self.manifest.chunk_ids(j))


class _Block:
    """Block k of lane number a: the ids and visits of its places, (Q*R,) each, and their samples."""

    def __init__(self, stream: Stream, ahead: Prefetch, a: int, k: int) -> None:
        self.a, self.k, self._ahead, self._chunk = a, k, ahead, stream.manifest.chunk
        self.ids, self.visits = (field[a] for field in stream.order.held(stream.lanes, k))
        self._chunks: dict[int, list[Sample]] = {}

    def sample(self, id: int) -> Sample:
        """Waits for its chunk."""
        j, place = divmod(id, self._chunk)
        if j not in self._chunks:
            self._chunks[j] = self._ahead.chunk(self.a, self.k, j).samples
        return self._chunks[j][place]


def _blocks(position: int, count: int, span: int) -> Iterator[tuple[int, range]]:
    """The blocks that positions ``position`` .. + ``count`` - 1 of a lane lie in, and the places there."""
    stop = position + count
    for k in range(position // span, -(-stop // span)):
        yield k, range(max(position - k * span, 0), min(stop - k * span, span))


class _Draws:
    """All that is drawn for samples by their visits and ids."""

    def __init__(self, stream: Stream, visits: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
        seed = stream.spec.seed
        self.visits, self.ids = visits, ids + stream.first_id
        ids = self.ids
        self.view = augmenting.Draws.of(seed, visits, ids)
        self.keep = masking.keep(seed, visits, ids, stream.spec.patches, stream.kept.patches)
        self.caption = masking.draw(seed, visits, ids, masking.CAPTION, 0)


def image_of(sample: Sample, decoder: str, conversion: str = "flatten") -> Pixels:
    """RGB pixels of a sample's image member. Raises Undecodable."""
    return decode.decode(encoded_image(sample), decoder, conversion)


def encoded_image(sample: Sample) -> memoryview:
    """A sample's image member as it is stored. Raises Undecodable if there is none."""
    for extension in tar.EXTENSIONS:
        if extension in sample:
            return sample[extension]
    raise Undecodable(f"no image among its members {sorted(sample)}")


def captions_of(sample: Sample, members: Sequence[str]) -> list[str]:
    """The captions of a sample, in the order of ``members`` (``data.captions``).

    ``txt``: each line of that member is a caption. ``json:FIELD``: a string, or a list of strings, at the top level of
    that JSON member. Members and fields that a sample lacks are skipped; without any text there is one empty caption.
    Raises Undecodable where none of them is there, or a JSON member cannot be used.
    """
    found = [texts for name in members if (texts := _texts(sample, name)) is not None]
    if not found:
        raise Undecodable(f"no caption {list(members)} among its members {sorted(sample)}")
    return [text for texts in found for text in texts if text] or [""]


def json_fields(sample: Sample) -> list[str]:
    """The fields of JSON members that could be captions, as ``data.captions`` names them; likely names first."""
    found = list[str]()
    for member in filter(_is_json, sample):
        with contextlib.suppress(Undecodable):
            found += [f"{member}:{field}" for field, value in _parsed(sample, member).items() if _strings(value)]
    return sorted(found, key=lambda name: not any(word in name.lower() for word in ("caption", "text")))


def refuse_whole_json(members: Sequence[str], key: str, fields: Iterable[str] = ()) -> None:
    """ConfigError where one of ``members`` is a JSON member without a field: its source text is not a caption.

    ``key``: the option or field that names them. ``fields``: those that the data have (``json_fields``), for the
    remedy; they are read only then.
    """
    for name in members:
        member, _, field = name.partition(":")
        if _is_json(member) and not field:
            known = list(dict.fromkeys(fields))
            remedy = f"Name the field that holds captions, as {known[0] if known else f'{member}:caption'}."
            remedy += f" Fields with text in the data: {', '.join(known)}." if known else ""
            raise ConfigError(f"{key}: {member} is a whole JSON file, not a caption", value=name, remedy=remedy)


def _texts(sample: Sample, name: str) -> list[str] | None:
    """The texts that one entry of ``data.captions`` names; None where the sample has no such member or field."""
    member, _, field = name.partition(":")
    if not (field and _is_json(member)):
        # Lines end with a line feed alone: ``str.splitlines`` would also cut at U+2028 and others.
        if name not in sample:
            return None
        lines = bytes(sample[name][:TEXT_LIMIT]).decode("utf-8", "replace").split("\n")
        return [line.strip() for line in lines]
    value = _parsed(sample, member).get(field) if member in sample else None
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not _strings(texts):
        raise Undecodable(f"{field!r} in its {member} is neither text nor a list of texts")
    return [" ".join(text.split()) for text in texts]


def _is_json(member: str) -> bool:
    return member.rpartition(".")[2] == "json"


def _strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _parsed(sample: Sample, member: str) -> dict[str, Any]:
    """The top level of a JSON member, empty where it is not an object. Raises Undecodable."""
    if len(sample[member]) > TEXT_LIMIT:
        raise Undecodable(f"its {member} has {len(sample[member]):,} bytes, at most {TEXT_LIMIT:,} are read")
    try:
        found = json.loads(bytes(sample[member]).decode("utf-8", "replace"))
    except (ValueError, RecursionError) as error:
        raise Undecodable(f"its {member} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def label_of(sample: Sample, member: str = "cls") -> int:
    """The number of a sample's class. Raises Undecodable."""
    try:
        label = int(bytes(sample[member]))
        if 0 <= label < 1 << 31:
            return label
    except KeyError:
        raise Undecodable(f"no label {member!r} among its members {sorted(sample)}") from None
    except ValueError:
        pass
    raise Undecodable(f"the label {bytes(sample[member])[:40]!r} is not a whole number from 0 on")
