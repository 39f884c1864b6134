"""`shards inspect`: one sample of a manifest, or all samples of a training step of a run.

`sample` reads one sample by its id. `batch` yields the global batch of a step, with the same replacement of undecodable
samples as training. `inspect` is the command.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flip.common import image_formats
from flip.config import merge, schema
from flip.config.derived import StageSpan, dataset_lanes, stage_spans
from flip.config.identity import file_digest
from flip.config.weights import UNIT
from flip.data import decode, masking
from flip.data.chunk_reader import ChunkReader, Sample
from flip.data.decode import DecodeError, noting_place, place_of
from flip.data.manifest.manifest import Manifest
from flip.data.sample_members import (
    CAPTION_NOT_UTF8,
    CaptionGroups,
    caption_groups,
    captions_are_utf8,
    captions_of,
    choose_caption,
    file_name,
    image_of,
    next_decodable,
)
from flip.data.sources import DatasetSource, load_sources
from flip.data.weighted_order import VIEWS
from flip.files.creation import create_file
from flip.runs.errors import DATA, ConfigError, DataError
from flip.runs.rundir import RunDir, read_record
from jobs.common.cluster_profile import roots
from jobs.common.terminal import ProgressBar
from jobs.common.text import plain
from jobs.submitted_runs import select
from tools.shards_commands.output import CommandResult, captions, lines, writing


@dataclass(frozen=True)
class InspectedSample:
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
    warning: str | None
    """That its captions are read with replacement characters."""
    file: str | None
    """The picture's name in the source of ``shards make``."""


def sample(manifest: Manifest, id: int, captions: Sequence[str] = ("txt",)) -> InspectedSample:
    """Read sample ``id`` of a manifest. Raises ConfigError if the id does not exist, StorageError."""
    if not 0 <= id < manifest.samples:
        raise ConfigError(f"sample ids of this manifest are 0 .. {manifest.samples - 1}", "id", id)
    reader = ChunkReader()
    chunk = id // manifest.chunk
    shard, ordinal = manifest.locate(id)
    key = None
    members = Sample()
    damage = None
    try:
        read = reader.fetch(manifest, chunk)
        members = read.samples[id % manifest.chunk]
        key = read.keys()[id % manifest.chunk]
    except DataError as error:
        damage = error.paragraph()
    name = next((extension for extension in image_formats.EXTENSIONS if extension in members), None)
    image = None
    if name:
        image = name, bytes(members[name])
    try:
        lines = captions_of(members, list(captions))
    except DecodeError:
        lines = []
    return InspectedSample(
        id, shard, ordinal, chunk, manifest.exceptions.get(id), key,
        {extension: len(data) for extension, data in members.items()},
        image, _picture(image[1]) if image else None, lines, _json(members), damage,
        None if captions_are_utf8(members, captions) else CAPTION_NOT_UTF8, file_name(members) or None,
    )  # fmt: skip


def _picture(data: bytes) -> dict[str, Any]:
    try:
        picture: dict[str, Any] = decode.header(data)
    except DecodeError as error:
        return {"undecodable": str(error)}
    try:
        decode.decode(data, "simplejpeg")
    except DecodeError as error:
        picture["undecodable"] = str(error)
    return picture


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
    if math.isfinite(value):
        return value
    return None


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
    is_utf8: bool = True
    """Whether its captions are read without replacement characters."""
    view: int = 0
    """h, the number of this view of the sample in its epoch; 0 without weights."""
    weight: float | None = None
    """Its expected views in an epoch; None without weights."""


def batch(
    config: schema.Config, sources: Sequence[DatasetSource], start: int, size: int, read: bool = True
) -> Iterator[Taken]:
    """Yield the global batch of ``size`` samples that starts at S = ``start``, lane by lane.

    With ``read``, samples are decoded, and undecodable samples are replaced as in training. Without it, only samples
    that the manifests exclude are replaced. Raises DataError, StorageError, or ConfigError if a manifest does not match
    the configuration.
    """
    for share, source in zip(dataset_lanes(config.data), sources, strict=True):
        actual = source.manifest.samples, source.manifest.chunk
        planned = share.dataset_size, share.chunk
        if actual != planned:
            what = "the run was planned for N = {}, R = {}, but this manifest has N = {}, R = {}".format(
                *planned, *actual
            )
            raise ConfigError(what, str(source.manifest.folder), remedy="Use the manifest of the run.")
    each = size // config.data.lanes
    first = start // config.data.lanes
    for source in sources:
        yield from _of_set(config, source, range(first, first + each), ChunkReader() if read else None)


def _of_set(
    config: schema.Config, source: DatasetSource, positions: range, reader: ChunkReader | None
) -> Iterator[Taken]:
    order = source.order(config.seed, config.data.block)
    manifest = source.manifest
    data = config.data
    bad = dict(manifest.exceptions)
    chunks = dict[int, list[Sample]]()

    def load(id: int) -> tuple[CaptionGroups, bool] | None:
        """The captions of a sample, and whether they are UTF-8. Raises DecodeError if training cannot use it."""
        if reader is None:
            return None
        j, index = divmod(id, manifest.chunk)
        if j not in chunks:
            chunks[j] = reader.read_chunk(manifest, j)
        taken = chunks[j][index]
        with noting_place(partial(place_of, manifest, id)):
            image_of(taken, data.decoder, data.to_rgb, data.exif)
            groups = caption_groups(taken, data.captions, data.caption_weights)
            return groups, captions_are_utf8(taken, data.captions)

    for lane in range(order.lanes):
        chunks.clear()
        for position in positions:
            k, n = divmod(position, order.block_samples)
            ids, epochs = (field[0].tolist() for field in order.cached_block(range(lane, lane + 1), k))
            usable = next_decodable(ids, order.replacements(ids, n, len(positions)), bad, load)
            if usable is None:
                shard, ordinal = manifest.locate(ids[n])
                what = f"none of the {len(ids)} samples of its block can be decoded"
                raise DataError(what, f"{shard}, sample {ordinal}")
            m, loaded = usable
            id = source.first_id + ids[m]
            epoch = order.replacement_epoch(epochs, n, m)
            caption = None
            is_utf8 = True
            if loaded is not None:
                texts, is_utf8 = loaded
                draws = [float(masking.draw(config.seed, epoch, id, masking.CAPTION, i)) for i in (0, 1)]
                caption = choose_caption(texts, data.caption_weights, *draws)
            stands_for = None
            if m != n:
                stands_for = source.first_id + ids[n]
            view, visit = divmod(epoch, VIEWS)
            weight = None
            if source.weights:
                weight = int(source.weights.weights[ids[m]]) / UNIT
            place = (*manifest.locate(ids[m]), stands_for)
            yield Taken(source.lanes[lane], visit, id, *place, caption, is_utf8, view, weight)


def inspect(options: argparse.Namespace) -> CommandResult:
    """Show the sample of an id, or the samples of a step of a run."""
    if options.run:
        if options.manifest or options.id is not None or options.save or options.captions:
            raise ConfigError("a manifest, --id, --captions and --save cannot be combined with --run")
        return _step(options)
    if options.step is not None or options.samples is not None:
        raise ConfigError("--step and --samples need a run", remedy="Name it: --run RUN_DIR")
    if not options.manifest or options.id is None:
        raise ConfigError("no sample given", remedy="Give MANIFEST --id N, or --run RUN_DIR --step T.")
    manifest = Manifest.load(options.manifest)
    inspected = sample(manifest, options.id, captions(options, manifest))
    report = {name: value for name, value in asdict(inspected).items() if name != "image"}
    if options.save:
        _save(inspected, options.save)
        report["saved"] = options.save
    shown = {name: value for name, value in report.items() if value not in (None, {}, []) or name == "excepted"}
    shown |= {name: str(report[name]) for name in ("id", "ordinal", "chunk")}
    return CommandResult(report, DATA if inspected.damage else 0, "\n".join(lines(shown)))


def _save(inspected: InspectedSample, path: str) -> None:
    if inspected.image is None:
        raise ConfigError("this sample has no image to save", f"sample {inspected.id}", sorted(inspected.members))
    with writing(path):
        try:
            with create_file(path) as file:
                file.write(inspected.image[1])
        except FileExistsError:
            raise ConfigError("the file already exists", path, remedy="Name another file for --save.") from None


def _same_data(run: RunDir, sources: Sequence[DatasetSource], start: int) -> None:
    """Check that the manifests are those of the run.

    Raises DataError if a manifest was rebuilt after the submission (its ids name other samples), and ConfigError if the
    run used other data at S = ``start``.
    """
    try:
        stored = read_record(run.identity) or {}
        data = stored["config"]["data"]
        before = stored.get("before", [])
        submitted = [item["manifest"] for item in data.get("sets") or [data]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return  # missing or damaged: nothing to compare with
    for period in before:
        if start < period["samples"]:
            what = f"until S = {period['samples']} the run had other data"
            was = "; ".join(f"{change['key']} {change.get('was')}" for change in period.get("changes", ()))
            raise ConfigError(what, str(run.identity), was, "Inspect that manifest: inspect MANIFEST --id N.")
    weights = str(data.get("weights", ""))
    if weights.startswith("sha256:") and sources[0].weights and file_digest(sources[0].weights.path) != weights:
        what = "not the weights that the run was submitted with"
        raise DataError(what, sources[0].weights.path, remedy="Restore the file at the path in the run's config.yaml.")
    for was, source in zip(map(str, submitted), sources, strict=False):
        if was.startswith("digest:") and was != f"digest:{source.manifest.digest}":
            remedy = "Restore the run's manifest at the path in its config.yaml."
            what = "not the manifest that the run was submitted with"
            raise DataError(what, str(source.manifest.folder), source.manifest.digest, remedy)


def _step(options: argparse.Namespace) -> CommandResult:
    if Path(options.run).is_dir():
        run = RunDir(options.run)
    else:
        run = select.select_single(options.run, roots(options.root))
    if not run.config.is_file():
        raise ConfigError("no run here: config.yaml is missing", str(run.path), remedy="Give the folder of a run.")
    config = merge.read_config(run.config)
    span, step, start = _place(stage_spans(config), options.step, options.samples)
    sets = load_sources(config.data)
    size = span.stage.batch
    _same_data(run, sets, start)
    taken = list[Taken]()
    with ProgressBar("reading") as bar:
        for item in batch(config, sets, start, size, options.read):
            taken.append(item)
            bar(len(taken), size)
    report = {
        "run": str(run.path),
        "manifest": ", ".join(str(source.manifest.folder) for source in sets),
        "stage": span.stage.name,
        "step": step,
        "samples_before": start,
        "samples_after": start + size,
        "read": options.read,
        "replaced": sum(item.stands_for is not None for item in taken),
    }
    if not_utf8 := sum(not item.is_utf8 for item in taken):
        report["warnings"] = {CAPTION_NOT_UTF8: not_utf8}
    text = "\n".join([*lines(report), "", *map(_row, taken)])
    return CommandResult(report | {"batch": [item._asdict() for item in taken]}, 0, text)


def _row(item: Taken) -> str:
    place = f"lane {item.lane}  id {item.id}  visit {item.visit}  {plain(Path(item.shard).name)}, sample {item.ordinal}"
    if item.weight is not None:
        place += f"  view {item.view}  weight {item.weight:.3g}"
    instead = ""
    if item.stands_for is not None:
        instead = f"  (for id {item.stands_for})"
    return f"{place}{instead}" + (f"  {plain(item.caption)}" if item.caption is not None else "")


def _place(all_spans: list[StageSpan], step: int | None, samples: int | None) -> tuple[StageSpan, int, int]:
    """The stage of a step, its number, and S before it. ``samples``: S after the step, or an S that it passes."""
    before = 0
    for span in all_spans:
        size = span.stage.batch
        if samples is not None:
            index = (samples - span.start - 1) // size
        else:
            index = (step or 0) - before - 1
        if 0 <= index < span.steps:
            return span, before + index + 1, span.start + index * size
        before += span.steps
    if step is None and samples is None:
        raise ConfigError("no step given", remedy="Give --step T or --samples S, as in metrics/*.jsonl.")
    if step is None:
        name = "--samples"
        value = samples
        last = all_spans[-1].end
    else:
        name = "--step"
        value = step
        last = before
    raise ConfigError(f"the run's are 1 .. {last}", name, value)
