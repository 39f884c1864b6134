"""`shards inspect`: one sample of a manifest, or all samples of a training step of a run.

`sample` reads one sample by its id. `batch` yields the global batch of a step, with the same replacement of undecodable
samples as training. `inspect` is the command.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flip.config import merge, schema
from flip.config.derived import Span, shares, spans
from flip.data import decode, masking
from flip.data.chunk_reader import ChunkReader, Sample
from flip.data.decode import Undecodable
from flip.data.manifest import tar
from flip.data.manifest.manifest import Manifest
from flip.data.mixture import Source, sources
from flip.data.worker import captions_of, image_of
from flip.runs.errors import DATA, ConfigError, DataError
from flip.runs.rundir import RunDir, read_record
from jobs.common.cluster_profile import roots
from jobs.common.text import plain
from jobs.runs import select
from tools.shards_commands.output import Bar, Outcome, captions, lines, writing


@dataclass(frozen=True)
class Found:
    """One sample. ``image``: its image member, if any; ``damage``: why its bytes cannot be read, if so."""

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
    """Format, width, height and mode from the header; ``undecodable``: why training cannot use it."""
    captions: list[str]
    json: Any
    damage: str | None


def sample(manifest: Manifest, id: int, captions: Sequence[str] = ("txt",), reader: ChunkReader | None = None) -> Found:
    """Read sample ``id`` of a manifest. Raises ConfigError if the id does not exist, StorageError."""
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
    """The parsed json member, with None for NaN and infinities, which are not valid JSON; else its text."""
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


class Taken(NamedTuple):
    """One position of a global batch, and the sample used there."""

    lane: int
    visit: int
    id: int
    shard: str
    ordinal: int
    stands_for: int | None
    """The id that the order names, if this sample replaces it."""
    caption: str | None
    """The drawn caption; None if samples are not read."""


def batch(
    config: schema.Config, sources: Sequence[Source], start: int, size: int, read: bool = True,
    reader: ChunkReader | None = None,
) -> Iterator[Taken]:  # fmt: skip
    """Yield the global batch of ``size`` samples that starts at S = ``start``, lane by lane.

    With ``read``, samples are decoded, and undecodable samples are replaced as in training. Without it, only samples
    that the manifests exclude are replaced. Raises DataError, StorageError, or ConfigError if a manifest does not match
    the configuration.
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
    """Chunks of the current blocks of one lane, each read once."""

    def __init__(self, config: schema.Config, source: Source, reader: ChunkReader | None, bad: dict[int, str]) -> None:
        self.config, self.manifest, self.first_id = config, source.manifest, source.first_id
        self.reader, self.bad = reader, bad
        self.chunks: dict[int, list[Sample]] = {}

    def good(self, ids: list[int], visits: list[int], n: int) -> tuple[int, str | None]:
        """The first decodable position from n on (cyclic), as in training, and its caption."""
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


def inspect(options: argparse.Namespace) -> Outcome:
    """Show the sample of an id, or the samples of a step of a run."""
    if options.run:
        if options.manifest or options.id is not None or options.save or options.captions:
            raise ConfigError(
                "a manifest, --id, --captions and --save do not go with --run", remedy="Ask for one or the other."
            )
        return _step(options)
    if options.step is not None or options.samples is not None:
        raise ConfigError("--step and --samples are of a run", remedy="Name it: --run RUN_DIR")
    if not options.manifest or options.id is None:
        raise ConfigError("what shall be looked at?", remedy="Give MANIFEST --id N, or --run RUN_DIR --step T.")
    found = sample(Manifest.load(options.manifest), options.id, captions(options))
    saved = _save(found, options.save) if options.save else {}
    report = {name: value for name, value in asdict(found).items() if name != "image"} | saved
    return Outcome(report, DATA if found.damage else 0, _sample_text(report))


def _save(found: Found, path: str) -> dict[str, Any]:
    if found.image is None:
        raise ConfigError("this sample has no image to save", f"sample {found.id}", sorted(found.members))
    with writing(path):
        try:
            with open(path, "xb") as file:
                file.write(found.image[1])
        except FileExistsError:
            raise ConfigError("the file is there already", path, remedy="Name another one for --save.") from None
    return {"saved": path}


def _sample_text(report: dict[str, Any]) -> str:
    shown = {name: value for name, value in report.items() if value not in (None, {}, []) or name == "excepted"}
    return "\n".join(lines(shown | {name: str(report[name]) for name in ("id", "ordinal", "chunk")}))


def _run(typed: str) -> RunDir:
    """Resolve a run by its folder, or as SWEEP/RUN below FLIP_RUNS."""
    return RunDir(typed) if Path(typed).is_dir() else select.select_one(typed, roots())


def _same_data(run: RunDir, sources: Sequence[Source], start: int) -> None:
    """Check that the manifests are those of the run.

    Raises DataError if a manifest was rebuilt after the submission (its ids name other samples), and ConfigError if the
    run used other data at S = ``start``.
    """
    try:
        stored = read_record(run.identity) or {}
        data, before = stored["config"]["data"], stored.get("before", [])
        submitted = [one["manifest"] for one in data.get("sets") or [data]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # none, or damaged: it tells nothing
    for one in before:
        if start < one["samples"]:
            what = f"until S = {one['samples']} the run had other data"
            was = "; ".join(f"{change['key']} {change.get('was')}" for change in one.get("changes", ()))
            raise ConfigError(what, str(run.identity), was, "Look into that manifest: inspect MANIFEST --id N.")
    for was, source in zip(map(str, submitted), sources, strict=False):
        if was.startswith("digest:") and was != f"digest:{source.manifest.digest}":
            remedy = "Bring the run's manifest back to where its config.yaml says."
            what = "not the manifest that the run was submitted with"
            raise DataError(what, str(source.manifest.folder), source.manifest.digest, remedy)


def _step(options: argparse.Namespace) -> Outcome:
    run = _run(options.run)
    if not run.config.is_file():
        raise ConfigError("no run here: config.yaml is missing", str(run.path), remedy="Give the folder of a run.")
    config = merge.read(run.config)
    span, start = _place(spans(config), options.step, options.samples)
    sets = sources(config.data)
    _same_data(run, sets, start)
    taken = list[Taken]()
    with Bar("reading", "") as bar:
        for one in batch(config, sets, start, span.stage.batch, options.read):
            taken.append(one)
            bar(len(taken), span.stage.batch)
    report = {
        "run": str(run.path),
        "manifest": ", ".join(str(one.manifest.folder) for one in sets),
        "stage": span.stage.name,
        "step": (start - span.start) // span.stage.batch + _steps_before(spans(config), span) + 1,
        "samples_before": start,
        "samples_after": start + span.stage.batch,
        "read": options.read,
        "replaced": sum(one.stands_for is not None for one in taken),
    }
    text = "\n".join([*lines(report), "", *(_row(one) for one in taken)])
    return Outcome(report | {"batch": [one._asdict() for one in taken]}, 0, text)


def _row(one: Taken) -> str:
    place = f"lane {one.lane}  id {one.id}  visit {one.visit}  {plain(Path(one.shard).name)}, sample {one.ordinal}"
    instead = f"  (for id {one.stands_for})" if one.stands_for is not None else ""
    return f"{place}{instead}" + (f"  {plain(one.caption)}" if one.caption is not None else "")


def _steps_before(all_spans: list[Span], span: Span) -> int:
    return sum(one.steps for one in all_spans if one.end <= span.start)


def _place(all_spans: list[Span], step: int | None, samples: int | None) -> tuple[Span, int]:
    """The stage of a step, and S before the step. ``samples``: S after the step, or any S that the step passes."""
    if step is None and samples is None:
        raise ConfigError("which step?", remedy="Give --step T or --samples S, as in metrics/*.jsonl.")
    for span in all_spans:
        before = _steps_before(all_spans, span)
        if step is not None and before < step <= before + span.steps:
            return span, span.start + (step - before - 1) * span.stage.batch
        if samples is not None and span.start < samples <= span.end:
            return span, span.start + (samples - span.start - 1) // span.stage.batch * span.stage.batch
    last = all_spans[-1]
    name, value, top = (
        ("--step", step, _steps_before(all_spans, last) + last.steps)
        if step is not None
        else ("--samples", samples, last.end)
    )
    raise ConfigError(f"the run's are 1 .. {top}", name, value)
