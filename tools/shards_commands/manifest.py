"""`shards info`, `exclude` and `drop`: describe a manifest, exclude samples from it, rebuild it without them."""

import argparse
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flip.common.host import cores, this_host
from flip.config.derived import buffer_bytes
from flip.config.resolve import DatasetFacts, default_lanes
from flip.config.schema import Config, Stage
from flip.data.manifest.build import DamagedShards, merge, scan_shards
from flip.data.manifest.build_parquet import PARQUET
from flip.data.manifest.filters import Filters
from flip.data.manifest.labels import LabelCounts
from flip.data.manifest.manifest import Manifest, refuse_existing, with_rows, write
from flip.runs.errors import ConfigError, DataError
from jobs.common.terminal import ProgressBar
from tools.shards_commands.output import CommandResult, claim, copy_classes, parquet_captions, writing

MOST_READ = 2
"""Bytes read per byte used above which a report names what reads less."""
LARGEST_CHUNK = 4096
"""R above which a report does not propose to raise it."""


def info(options: argparse.Namespace) -> CommandResult:
    """Describe a manifest, and the memory that training on it needs for shuffling."""
    manifest = Manifest.load(options.manifest)
    counts = manifest.shards[: manifest.shard_count, 0]
    report = manifest_facts(manifest) | {
        "samples_per_shard": {"min": int(counts.min()), "median": float(np.median(counts)), "max": int(counts.max())},
        "shuffling_on_one_node_like_this": shuffling(manifest, options.batch),
        "exceptions_by_reason": dict(Counter(map(kind, manifest.exceptions.values())).most_common()),
    }
    if not manifest.exceptions:
        del report["exceptions_by_reason"]
    return CommandResult(report)


def shuffling(manifest: Manifest, batch: int) -> dict[str, int]:
    """Lanes and buffer of a run with this batch size on one node like this machine, by default."""
    here = this_host()
    config = Config(stages=[Stage(batch=batch)])
    known = DatasetFacts(manifest.samples, manifest.chunk, manifest.mean_bytes, nominal=False)
    lanes = default_lanes(config, [known], here.memory // 4)
    block = config.data.block
    return {
        "B": batch,
        "L": lanes,
        "Q": block,
        "R": manifest.chunk,
        "buffer_bytes": buffer_bytes(lanes, block, manifest.chunk, manifest.mean_bytes),
        "of_memory_bytes": here.memory,
    }


def exclude(options: argparse.Namespace) -> CommandResult:
    """Write a new manifest of the same shards that excludes further samples."""
    old = Manifest.load(options.manifest)
    exceptions = dict[int, str]()
    for part in options.ids.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match:
            ids = range(int(match[1]), int(match[2] or match[1]) + 1)
        else:
            ids = range(0)
        if not ids or ids.stop > old.samples:
            raise ConfigError(f"not sample ids below {old.samples}", "--ids", part, "Write them as 7,512-767.")
        exceptions.update(dict.fromkeys(ids, options.reason))
    return CommandResult(manifest_facts(excepting(old, exceptions, options.out)))


def drop(options: argparse.Namespace) -> CommandResult:
    """Write a new manifest without the excluded samples. The shards stay as they are and are scanned again."""
    old = Manifest.load(options.manifest)
    out = Path(options.out).absolute()
    remedy = "Training leaves excluded samples out; or index the files again with --filter."
    refuse_parquet(old, "drop scans tars, and these are parquet files", remedy)
    if not old.exceptions:
        raise ConfigError("the manifest excludes no samples: nothing to drop", str(old.folder))
    claim(out)
    chosen = Filters(manifest=str(old.folder))
    chunk = min(old.chunk, old.samples - len(old.exceptions))
    with writing(out), ProgressBar("indexing", "B") as bar:
        try:
            scanned = scan_shards(list(old.keys), out, bar, options.workers or cores(), filters=chosen)
        except DamagedShards as error:
            remedy = "drop reads whole shards: restore them, or index the others (flip shards index --skip-damaged)."
            raise DataError(error.what, error.where, remedy=remedy) from error
        for shard, size, etag in zip(scanned.shards, old.shards[:, 1].tolist(), old.etags, strict=True):
            what = ""
            if shard.stat.size != size:
                what = f"the shard has {shard.stat.size} bytes, indexed were {size}"
            elif etag and shard.stat.etag and etag != shard.stat.etag:
                what = f"the ETag of the shard is {shard.stat.etag}, indexed was {etag}"
            if what:
                raise DataError(what, shard.key, remedy="Restore it, or index the shards again.")
        copy_classes(old, out)
        return CommandResult(manifest_facts(merge(scanned, out, chunk, filters=chosen)))


def excepting(old: Manifest, exceptions: Mapping[int, str], out: str) -> Manifest:
    """Write a new manifest of the same shards that excludes ``exceptions`` as well."""
    # counts of labels include samples that are excluded now
    settings = {name: value for name, value in old.settings.items() if name != "labels"}
    with writing(out):
        refuse_existing(Path(out))
        copy_classes(old, Path(out))
        return write(
            out, with_rows(old, Path(out).absolute()), old.checksums, {**old.exceptions, **exceptions}, settings
        )


def manifest_facts(manifest: Manifest) -> dict[str, Any]:
    report = {
        "manifest": str(manifest.folder),
        "digest": manifest.digest,
        "shards": manifest.shard_count,
        "samples": manifest.samples,
        "bytes": int(manifest.shards[: manifest.shard_count, 1].sum()),
        "mean_bytes": round(manifest.mean_bytes),
        "chunk": manifest.chunk,
        "chunks_per_pass": manifest.samples // manifest.chunk,
        "left_out_by_training": manifest.tail,
        "exceptions": len(manifest.exceptions),
    }
    if "filters" in manifest.settings:
        names = ("seen", "filters", "dropped", "uids")
        report |= {name: manifest.settings[name] for name in names if name in manifest.settings}
        report["samples_read_per_sample"] = round(manifest.total_samples_in_tars / manifest.samples, 2)
    if manifest.pages:
        report["parquet"] = parquet_facts(manifest)
    labels = LabelCounts.of_manifest(manifest)
    if labels.counts:
        report["labels"] = {"different": len(labels.counts), "largest": max(labels.counts)}
    return report


def parquet_facts(manifest: Manifest) -> dict[str, Any]:
    """What a manifest of parquet files reads, and the setting for its captions."""
    facts = manifest.settings[PARQUET]
    report = {
        "image": facts["image"],
        "data.captions": parquet_captions(manifest),
        "bytes_read_per_byte_used": facts["read_per_used"],
    }
    if facts["read_per_used"] <= MOST_READ:
        return report
    wanted = facts.get("chunk_that_does")
    make = (
        f"flip shards make FILES --image {shlex.quote(facts['image'])} --caption {shlex.quote(facts['captions'][0])}"
        " --out FOLDER"
    )
    if wanted and manifest.chunk < wanted <= min(LARGEST_CHUNK, manifest.samples):
        report["to_read_less"] = f"index with --chunk {wanted}, or write tars: {make}"
    else:
        report["to_read_less"] = f"write tars: {make}"
    return report


def refuse_parquet(manifest: Manifest, what: str, remedy: str) -> None:
    """Raise ConfigError for a manifest of parquet files."""
    if manifest.pages:
        raise ConfigError(what, str(manifest.folder), remedy=remedy)


def position(manifest: Manifest, id: int) -> dict[str, Any]:
    """Where a sample lies, for a report: id, shard and ordinal."""
    shard, ordinal = manifest.locate(id)
    return {"id": id, "shard": shard, "ordinal": ordinal}


def kind(reason: str) -> str:
    """The reason without its numbers: bad samples are counted by kind of reason."""
    return re.sub(r"\b(0x[0-9a-f]+|\d+)\b", "N", reason)
