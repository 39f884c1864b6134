"""`shards index`: scans tar shards, or parquet files with images, and writes their manifest."""

import argparse
import fnmatch
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import braceexpand

from flip.common.host import cores
from flip.common.image_formats import is_image_name
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest import build, filters
from flip.data.manifest.build import DamagedShards, as_path, part_folder
from flip.data.manifest.census import Completeness, Incomplete
from flip.data.manifest.manifest import Manifest, refuse_existing
from flip.data.manifest.row_texts import Columns
from flip.data.parquet.page_table import LINE
from flip.data.storage.base import ObjectStat, is_remote
from flip.runs.addresses import lists
from flip.runs.errors import ConfigError, PermissionDenied, StorageError
from jobs.common.terminal import ProgressBar
from tools.shards_commands import parquet_folders
from tools.shards_commands.manifest import manifest_facts
from tools.shards_commands.output import CommandResult, claim, names, print_details, writing

_WILDCARD = re.compile(r"[*?[]")
_UNREADABLE = "Make it readable, or name the shards without wildcards."


def index(options: argparse.Namespace) -> CommandResult:
    """Scan shards and write their manifest; with ``--part``, only scan one part of them for a later command."""
    _refuse_images(options.shards)
    columns = _columns(options)
    complete = Completeness([LINE] if columns else names(options.captions, "--captions"), options.min_complete)
    if options.part:
        part, parts = share(options.part, os.environ)
    else:
        part = 1
        parts = 1
    chosen = filters.parse(options.filter, options.caption_length, options.uids)
    out = Path(options.out).absolute()
    old = None
    if options.add:
        old = Manifest.load(options.add)
    if old and old.pages:
        raise ConfigError("--add extends manifests of tars", options.add, remedy="Index all parquet files anew.")
    build.refuse_filters(old, chosen)  # now, not after hours of reading
    with writing(out):
        (refuse_existing if options.part else claim)(out)  # parallel tasks of an array must not delete the folder
    named, known = expand(options.shards)
    if columns:
        named, known = parquet_folders.expand_folders(named, known)
    keys = build.sorted_keys(named, old.keys if old else ())
    keys = keys[(part - 1) * len(keys) // parts : part * len(keys) // parts]
    start_time = time.monotonic()
    workers = options.workers or cores()
    try:
        with writing(out):
            with ProgressBar("indexing", "B") as bar:
                scanned = build.scan_shards(keys, out, bar, workers, known, options.skip_damaged, chosen, columns)
            if options.part:
                report = {"part": f"{part}/{parts}", "folder": str(part_folder(out)), "shards": len(scanned.shards)}
            else:
                with ProgressBar("putting together") as bar:
                    manifest = build.merge(scanned, out, options.chunk, old, bar, chosen, complete, columns=columns)
                report = manifest_facts(manifest) | complete.report()
    except DamagedShards as error:
        print_details(options, {"damaged": build.skipped_shards(error.errors)})
        raise
    except Incomplete as error:
        print_details(options, {"error": error.paragraph()} | error.report)
        raise
    return CommandResult(report | _work(scanned, time.monotonic() - start_time) | without_stats(keys, known))


def _refuse_images(shards: Sequence[str]) -> None:
    """Raise ConfigError if images are named in place of tar files."""
    images = [name for name in shards if is_image_name(name)]
    if images:
        folder = os.path.dirname(images[0]) or "."
        remedy = f"Make shards of images, which indexes them too: flip shards make {shlex.quote(folder)} --out FOLDER"
        raise ConfigError("an image, not a tar file", images[0], remedy=remedy)


def _columns(options: argparse.Namespace) -> Columns | None:
    """The columns of parquet files; None for tars. Raises ConfigError."""
    if not options.image:
        for name in ("caption", "columns"):
            if getattr(options, name):
                raise ConfigError(
                    f"--{name} is for parquet files", remedy="Name their column of images: --image COLUMN"
                )
        return None
    if not options.caption:
        raise ConfigError("no column of captions", "--image", options.image, "Name it: --caption COLUMN")
    if options.add:
        raise ConfigError("--add is for tars", "--add", options.add, "Index all parquet files anew.")
    if options.uids:
        remedy = "Filter by a column: --filter 'COLUMN OP VALUE'"
        raise ConfigError("--uids reads the json members of tars", "--uids", options.uids, remedy)
    others = None
    if options.columns is not None:
        others = tuple(names(options.columns, "--columns"))
    return Columns(options.image, tuple(names(options.caption, "--caption")), others)


def _work(scanned: build.ScanResults, seconds: float) -> dict[str, Any]:
    """What was read, for the report: shards, speed, and the shards that are left out."""
    report: dict[str, Any] = {
        "shards_scanned": len(scanned.shards) - scanned.reused,
        "shards_scanned_before": scanned.reused,
        "megabytes_per_second": round(scanned.read / 1e6 / seconds, 1),
        "seconds": round(seconds, 1),
    }
    if scanned.damaged:
        report["left_out"] = build.skipped_shards(scanned.damaged)
    return report


def share(text: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """I and N of ``I/N``, or of the Slurm array task for ``slurm``. Raises ConfigError unless 1 <= I <= N."""
    if text == "slurm":
        try:
            task, first, count = (int(environment[f"SLURM_ARRAY_TASK_{x}"]) for x in ("ID", "MIN", "COUNT"))
        except KeyError as error:
            remedy = "Submit it with sbatch --array=0-63, or give --part I/N."
            raise ConfigError(f"not in a job array: {error.args[0]} is not set", "--part", text, remedy) from None
        text = f"{task - first + 1}/{count}"
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError("not a share", "--part", text, "Write 1/64 .. 64/64; an array is numbered without gaps.")
    return int(match[1]), int(match[2])


def expand(patterns: Sequence[str]) -> tuple[list[str], dict[str, ObjectStat]]:
    """Expand braces ({00000..00041}, {a,b}) and wildcards. A pattern without a match is returned as it is.

    Also returns all objects that were listed on the way. Raises ConfigError if braces are unbalanced, and what
    ``local_matches`` raises.
    """
    keys = list[str]()
    known = dict[str, ObjectStat]()
    for pattern in patterns:
        try:
            expanded = list(map(as_path, braceexpand.braceexpand(pattern)))
        except braceexpand.UnbalancedBracesError as error:  # type: ignore[attr-defined]
            raise ConfigError("unbalanced braces", value=pattern, remedy="Write {00000..00041} or {a,b}.") from error
        for name in expanded:
            if is_remote(name):
                listed = objects(name)
                known |= listed
                depth = name.count("/")
                matches = [key for key in listed if fnmatch.fnmatchcase(key, name) and key.count("/") == depth]
            else:
                matches = sorted(local_matches(name))
            keys += matches or [name]
    return keys, known


def local_matches(pattern: str) -> list[str]:
    """Paths that match a pattern, as glob.glob finds them; one without wildcards is returned as it is.

    Raises PermissionDenied or StorageError for a folder that cannot be read: glob.glob leaves out what is in it.
    """
    if not _WILDCARD.search(pattern):
        return [pattern]
    parent, name = os.path.split(pattern)
    paths = list[str]()
    for folder in local_matches(parent):
        try:
            if not _WILDCARD.search(name):
                os.lstat(os.path.join(folder, name))
                paths.append(os.path.join(folder, name))
                continue
            # the root of a file system has lost+found, which only root may read
            entries = [entry for entry in fnmatch.filter(os.listdir(folder or "."), name) if entry != "lost+found"]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            raise PermissionDenied("the folder may not be read", folder, remedy=_UNREADABLE) from error
        except OSError as error:
            raise StorageError(f"the folder cannot be read: {error.strerror}", folder, remedy=_UNREADABLE) from error
        paths += [os.path.join(folder, entry) for entry in entries if name[0] == "." or entry[0] != "."]
    return paths


def objects(pattern: str) -> dict[str, ObjectStat]:
    """List the objects below the fixed prefix of a pattern; none if it has no wildcard.

    The storage of a pattern with ``*`` must have listings; ? belongs to the addresses of web servers.
    """
    prefix = _WILDCARD.split(pattern)[0]
    if not lists(pattern) and "*" not in pattern:
        return {}
    if prefix == pattern:
        return {}
    return ChunkReader(deadline=60.0).list(prefix)


def without_stats(keys: Sequence[str], known: Mapping[str, ObjectStat]) -> dict[str, int]:
    """Number of shards without the _stats.json that img2dataset writes last; empty if none or all have one.

    A hint only: the end marker of the tar decides whether a shard is complete.
    """
    existing = set(known)
    for folder in {os.path.dirname(key) for key in keys if not is_remote(key)}:
        with suppress(OSError):
            existing.update(os.path.join(folder, name) for name in os.listdir(folder))
    lacking = [f"{key.removesuffix('.tar')}_stats.json" not in existing for key in keys]
    if any(lacking) and not all(lacking):
        return {"shards_without_stats_json": sum(lacking)}
    return {}
