"""Checks of what a training reads: data sets, captions, fields, the tokenizer, evaluation sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flip import loss_kinds
from flip.config.derived import DatasetLanes, dataset_lanes, stage_spans
from flip.config.resolve import DatasetFacts, manifest_record
from flip.config.schema import Config, TextTower
from flip.data import order
from flip.data.chunk_reader import ChunkReader
from flip.data.decode import DecodeError
from flip.data.manifest import labels
from flip.data.manifest.labels import LabelCounts
from flip.data.manifest.manifest import MARK, Manifest
from flip.data.sample_members import captions_of, fields_of, image_of, json_fields, label_of, refuse_json_members
from flip.data.storage.base import is_remote
from flip.data.weighted_order import check_content
from flip.evaluation.datasets import prompts
from flip.evaluation.datasets.catalog import PROBE_REMEDY, probe_defect
from flip.runs.checkpoint_folder import checkpoints
from flip.runs.checks import OK, UNKNOWN, Check
from flip.runs.errors import ConfigError, DataError
from flip.runs.rundir import RunDir
from jobs.common.cli import command
from jobs.common.text import count

# evenly spread shards whose sizes are compared; an object takes a request each
MAX_SHARDS = 2000
MAX_OBJECTS = 64
FIRST_SAMPLES = 8  # of a training set that are decoded


def check_captions(config: Config, data: Sequence[DatasetFacts]) -> None:
    """ConfigError if the run would train on the source text of JSON members."""
    shares = zip(dataset_lanes(config.data), data, strict=True)
    folders = [share.manifest for share, facts in shares if not facts.nominal]
    names = (name for folder in folders for name in _fields(folder))
    refuse_json_members(config.data.captions, "data.captions", names)


def check_fields(config: Config) -> None:
    """ConfigError if the loss of the run would ignore ``data.fields``."""
    objective = config.model.objective
    if config.data.fields and not loss_kinds.declared(objective).uses_fields:
        remedy = "Leave it out, or name a class with uses_fields = True as model.objective (docs/fields.md)."
        raise ConfigError(f"data.fields: objective {objective} ignores them", value=config.data.fields, remedy=remedy)


def check_blocks(config: Config, data: Sequence[DatasetFacts], run: RunDir, anew: bool) -> None:
    """DataError if the run would reach a block of which the manifest excludes every sample: training stops there."""
    end = stage_spans(config)[-1].end
    for number, (share, facts) in enumerate(zip(dataset_lanes(config.data), data, strict=True)):
        if facts.nominal or (blank := _blank(config, number, share, 0, end)) is None:
            continue
        done = [] if anew else checkpoints(run)
        if done and (blank := _blank(config, number, share, done[-1].samples_seen, end)) is None:
            continue
        lane, place = blank
        samples = config.data.block * share.chunk
        what = f"all {samples} samples of the block of lane {lane} from S = {place} are excluded"
        drop = command("shards", "drop", share.manifest, "--out", "NEW_FOLDER")
        remedy = f"Write a manifest without the excluded samples: {drop}."
        remedy += " Name it in data.manifest, or raise data.block."
        raise DataError(f"{what}, so that training would stop there", share.manifest, remedy=remedy)


def _blank(config: Config, number: int, share: DatasetLanes, start: int, end: int) -> tuple[int, int] | None:
    """(lane of the run, S) of the start of the first block without a usable sample; None if there is none."""
    if config.data.weights:  # excluded samples have the weight 0
        return None
    chunks = _blank_chunks(share.manifest)
    lanes = config.data.lanes
    source = order.SampleOrder.of_set(
        number, config.seed, share.dataset_size, share.chunk, config.data.block, len(share.lanes)
    )
    first = source.block_within(chunks, start // lanes, -(-end // lanes))
    return first and (share.lanes[first[0]], first[1] * source.block_samples * lanes)


@lru_cache(maxsize=64)
def _blank_chunks(folder: str) -> NDArray[np.int64]:
    """Full chunks of which a manifest excludes every sample."""
    manifest = Manifest.load(folder, check=False)
    ids = np.fromiter(manifest.exceptions, dtype=np.int64, count=len(manifest.exceptions))
    chunks, counts = np.unique(ids // manifest.chunk, return_counts=True)
    return chunks[(counts == manifest.chunk) & (chunks < manifest.samples // manifest.chunk)]


def check_data_set(config: Config, share: DatasetLanes, facts: DatasetFacts) -> Check:
    name = f"data set {share.name}".rstrip()
    if facts.nominal:
        return Check(
            UNKNOWN, f"the {count(facts.dataset_size)} samples are nominal: there is no manifest yet", name=name
        )
    detail = check_shards(share.manifest)
    _first_samples(share.manifest, tuple(config.data.captions), tuple(config.data.fields))
    if facts.weights:
        check_content(config.data.weights)
        detail += f"; weights: {facts.weights.described(stage_spans(config)[-1].end)}"
    return Check(OK, detail, name=name)


@lru_cache(maxsize=64)
def check_shards(folder: str) -> str:
    """Load a manifest and compare the shards' sizes. Raises DataError, PermissionDenied, StorageError."""
    manifest = Manifest.load(folder)
    reader = ChunkReader(deadline=10.0)
    shards = len(manifest.keys)
    if shards and not is_remote(manifest.keys[0]):
        most = MAX_SHARDS
    else:
        most = MAX_OBJECTS
    for i in range(0, shards, max(1, shards // most)):
        key = manifest.keys[i]
        expected = int(manifest.shards[i, 1])
        actual = reader.stat(key).size
        if actual != expected:
            remedy = "It is not the file that was indexed: restore it, or index the shards again."
            raise DataError(f"the shard has {actual} bytes, indexed were {expected}", key, remedy=remedy)
    return f"{manifest.samples:,} samples in {shards:,} shards, {folder}"


def check_tokenizer(config: Config, nominal: bool) -> Check:
    from flip.data.text_masking import TEXT_MASKINGS
    from flip.data.token_table import TokenTable

    path = config.data.tokenizer
    if nominal and not (path and Path(path).exists()):
        return Check(UNKNOWN, f"{path or 'none is named'}: not on this machine")
    pieces = _tokenizer_size(path, config.model.text.causal)
    rows = config.model.text.vocabulary
    if pieces > rows:
        what = f"the tokenizer has {pieces} pieces, the model {rows} rows"
        raise ConfigError(what, path, remedy=f"Set model.text.vocabulary to {pieces}, or take a smaller tokenizer.")
    for stage in config.stages:
        if stage.text_masking in TEXT_MASKINGS:  # a user's class is not executed here
            TEXT_MASKINGS[stage.text_masking].of(config.data)  # raises if the token table does not serve it
        if stage.classification:
            TokenTable.read(config.data.token_table, config.data.tokenizer).rarities()
    return Check(OK, f"{pieces:,} pieces, {path}")


@lru_cache(maxsize=16)
def _tokenizer_size(path: str, causal: bool) -> int:
    from flip.tokenizer import Tokenizer

    return Tokenizer.of(path, TextTower(causal=causal)).size


def check_evaluation_sets(config: Config, nominal: bool) -> list[Check]:
    checks = []
    for item in config.evaluate.sets:
        name = f"evaluation set {item.name}"
        if nominal and not (Path(item.manifest) / "manifest.json").exists():
            checks.append(Check(UNKNOWN, f"{item.manifest}: not on this machine", name=name))
            continue
        shards = check_shards(item.manifest)
        if item.task == "zeroshot":
            classes = len(prompts.read_prompts(item.classes).names)
            checks.append(Check(OK, f"{shards}; {check_labels(item.manifest, item.classes, classes)}", name=name))
        elif item.task == "probe":
            checks.append(Check(OK, f"{shards}; fitted on {check_shards(item.train)}", name=name))
        else:
            _first_samples(item.manifest, ("txt",))
            checks.append(Check(OK, f"{shards}; images and captions", name=name))
    return checks


def probe_warnings(config: Config) -> list[str]:
    """Linear probes whose scores would mean nothing, of data sets on this machine."""
    probes = [item for item in config.evaluate.sets if item.task == "probe"]
    here = [item for item in probes if all((Path(path) / MARK).exists() for path in (item.manifest, item.train))]
    defects = {item.name: probe_defect(item.manifest, item.train) for item in here}
    return [f"evaluate.sets.{name}: {defect}. {PROBE_REMEDY}" for name, defect in defects.items() if defect]


def training_data_warnings(config: Config) -> list[str]:
    """Evaluation sets that are the training data: their scores say nothing about other images."""
    trained = {_digest(share.manifest) for share in dataset_lanes(config.data)} - {""}
    scored = [item.name for item in config.evaluate.sets if _digest(item.manifest) in trained]
    remedy = "Score other images: `flip shards make --split 0.2` sets some apart"
    return [f"evaluate.sets.{name}: is the data set that the run trains on. {remedy}" for name in scored]


@lru_cache(maxsize=64)
def _digest(folder: str) -> str:
    """The digest of a manifest on this machine; empty if there is none."""
    return str((manifest_record(folder) or {}).get("digest", ""))


@lru_cache(maxsize=64)
def _first_samples(folder: str, captions: tuple[str, ...], numbers: tuple[str, ...] = ()) -> None:
    """DataError if none of the first samples is usable; training replaces single bad ones."""
    bad: list[tuple[int, DecodeError]] = []
    manifest = Manifest.load(folder)
    for id, sample in islice(ChunkReader(deadline=10.0).samples(manifest), FIRST_SAMPLES):
        try:
            image_of(sample, "pillow")
            captions_of(sample, list(captions))
            fields_of(sample, numbers)
            return
        except DecodeError as error:
            bad.append((id, error))
    if bad:
        shard, ordinal = manifest.locate(bad[0][0])
        what = f"none of the first {len(bad)} samples can be trained on; the first: {bad[0][1]}"
        fields = ", ".join(dict.fromkeys(_fields(folder)))
        remedy = f"Name what holds captions in data.captions{f'; JSON fields with text: {fields}' if fields else ''}."
        if numbers:
            remedy += " Name fields with numbers in data.fields."
        raise DataError(what, f"{shard}, sample {ordinal}", remedy=remedy)


def _fields(folder: str) -> Iterator[str]:
    """Fields of JSON members of the first samples that ``data.captions`` could name."""
    for _, sample in islice(ChunkReader(deadline=10.0).samples(Manifest.load(folder)), FIRST_SAMPLES):
        yield from json_fields(sample)


@lru_cache(maxsize=64)
def check_labels(folder: str, path: str, classes: int) -> str:
    """How the labels of a set fit its class names, by the counts of its manifest, without reading the set.

    DataError if they do not, or if the first sample is not an image with a label: evaluation replaces no samples.
    """
    manifest = Manifest.load(folder)
    if defect := labels.defect_of(manifest, classes):
        raise DataError(f"{defect} ({path})", folder, remedy=labels.REMEDY)
    _first_label(manifest, path, classes)
    counts = LabelCounts.of_manifest(manifest)
    if counts.known:
        return f"{len(counts.counts)} of {classes} classes"
    return f"{classes} classes; the manifest has no counts of labels: the job compares them before its first step"


def _first_label(manifest: Manifest, path: str, classes: int) -> None:
    for id, sample in islice(ChunkReader(deadline=10.0).samples(manifest), 1):
        shard, ordinal = manifest.locate(id)
        try:
            image_of(sample, "pillow")
            label = label_of(sample)
        except DecodeError as error:
            raise DataError(str(error), f"{shard}, sample {ordinal}", remedy="Is this an evaluation set?") from error
        if not 0 <= label < classes:
            what = f"the label has no class name: {path} has {classes}"
            raise DataError(what, f"{shard}, sample {ordinal}", label, "Name the classes of this data set.")
