"""Many shards scanned by many processes; what was scanned before, by whomever, is not scanned again."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from flip import concurrency
from flip.concurrency import Threads
from flip.data.manifest.manifest import MARK, refuse_existing
from flip.data.manifest.scan import REMEDY, Scan, file_stat, scan
from flip.data.manifest.scans import Scans, Shard
from flip.data.storage.base import Stat, is_remote
from flip.data.storage.client import StorageClient
from flip.runs.errors import ConfigError, DataError

if TYPE_CHECKING:
    from flip.data.manifest.filters import Filters

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and a word on the shards; first with what need not be done."""

_THREADS = 16
"""Shards that are asked for their sizes at once."""

_WORTH = 64 << 20
"""Bytes to read for which one process more is worth its start."""

_NAMED = 3

_FILE = re.compile(r"file:(?://(?:localhost)?)?(/(?!/).*)", re.DOTALL | re.IGNORECASE)
_CHAINED = re.compile(":{2}")
_URL = re.compile(r"pipe:|[a-z][a-z0-9+.-]*:/", re.IGNORECASE)


class Damaged(DataError):
    """Shards that cannot be indexed. ``errors``: shard -> what is wrong with it."""

    def __init__(self, errors: Mapping[str, DataError], shards: int, kept: Path) -> None:
        self.errors = dict(errors)
        first = list(errors.values())[:_NAMED]
        where, what, remedy = first[0].where, first[0].what, first[0].remedy
        if len(errors) > 1:
            named = "; ".join(f"{error.where}: {error.what}" for error in first)
            more = f"; and {len(errors) - _NAMED:,} more" if len(errors) > _NAMED else ""
            where, what = "", f"{len(errors):,} of {shards:,} shards cannot be indexed: {named}{more}"
            remedy = remedy if len({error.remedy for error in errors.values()}) == 1 else REMEDY
        if kept.exists():
            remedy += f" The scans of the others are kept in {kept}: give the same command again."
        super().__init__(what, where, remedy=remedy)


@dataclass
class Gathered:
    """``shards``: those that have a scan, sorted by key; ``reused``: how many had one before; ``read``: bytes of
    the others."""

    scans: Scans
    shards: list[Shard]
    reused: int
    read: int
    damaged: dict[str, DataError] = field(default_factory=dict)


def listed(damaged: Mapping[str, DataError]) -> list[dict[str, str]]:
    """As they stand in reports and in a manifest's settings."""
    return [{"shard": key, "reason": error.what} for key, error in damaged.items()]


def part_folder(out: Path) -> Path:
    """Where scans are kept until the manifest ``out`` is written."""
    return out.with_name(f"{out.name}.part")


def as_path(shard: str) -> str:
    """A path for a URL file://; all else as it is."""
    match = _FILE.fullmatch(shard)
    return unquote(match[1], errors="surrogateescape") if match else shard


def _key(shard: str) -> str:
    """A URL s3:// or an absolute path. Raises ConfigError for what is in no storage of ours: it is no file that is
    missing below the working directory."""
    shard = as_path(shard)
    if "::s3://" in shard or (_CHAINED.search(shard) and not is_remote(shard) and not os.path.lexists(shard)):
        raise ConfigError("several shards in one name", shard, remedy="Name them one by one, or as {a,b}.tar.")
    if is_remote(shard):
        return shard
    if _URL.match(shard) and not os.path.lexists(shard):
        remedy = "Fetch it first; of a storage that speaks S3 (AWS_ENDPOINT_URL) name it s3://BUCKET/KEY."
        raise ConfigError("shards are files or s3:// objects, and this is neither", shard, remedy=remedy)
    return os.path.abspath(shard)


def sorted_keys(shards: Iterable[str], old: Sequence[str] = ()) -> list[str]:
    """URLs and absolute paths. Raises ConfigError (none, one named twice, among ``old``, or in no storage of ours)."""
    keys = sorted(map(_key, shards))
    if not keys:
        raise ConfigError("no shards to index", remedy="Name at least one .tar file.")
    for key, after in pairwise(keys):
        if key == after or "\n" in key:
            raise ConfigError("a shard is named twice, or its name holds a line break", value=key)
    for key in sorted(set(old).intersection(keys))[:1]:
        raise ConfigError("a shard is in the old manifest already", value=key, remedy="Name the new ones alone.")
    return keys


def gather(
    keys: Sequence[str], out: Path, progress: Progress | None = None, workers: int = 0,
    known: Mapping[str, Stat] | None = None, skip_damaged: bool = False, filters: Filters | None = None,
) -> Gathered:  # fmt: skip
    """Scan the shards that have no scan beside ``out`` yet. ``workers``: processes at most; below 2 this one does it.
    ``known``: what a listing told of objects, which are then not asked for one by one.

    Raises, when all others are scanned, Damaged unless ``skip_damaged``; before that where one is missing. Further
    PermissionDenied, StorageError, and OSError where ``out`` cannot be written. What is scanned by then is kept.
    ConfigError where another process has written the manifest meanwhile: then nothing is kept.
    """
    folder = part_folder(out)
    shards, damaged = _asked(keys, known or {})
    if damaged and not skip_damaged:
        raise Damaged(damaged, len(keys), folder)
    scans = Scans(folder, filters.names if filters else ())
    todo = [shard for shard in shards if shard not in scans]
    total, left = sum(shard.stat.size for shard in shards), sum(shard.stat.size for shard in todo)
    done, ended = total - left, len(shards) - len(todo)
    processes = min(workers, len(todo), 1 + left // _WORTH)
    answers = concurrency.run(_scanner, (filters,), todo, processes if processes > 1 else 0, "index")
    try:
        if todo:
            scans.begin()  # what cannot be written is told before hours of reading
        _tell(progress, done, total, ended, len(shards))
        for shard, found in answers:
            refuse_existing(out)
            if isinstance(found, DataError):
                damaged[shard.key] = found
            else:
                scans.add(shard, found)
            done, ended = done + shard.stat.size, ended + 1
            _tell(progress, done, total, ended, len(shards))
    finally:
        answers.close()
        (scans.remove if (out / MARK).exists() else scans.close)()
    damaged = dict(sorted(damaged.items()))
    if damaged and not skip_damaged:
        raise Damaged(damaged, len(keys), folder)
    return Gathered(scans, [s for s in shards if s.key not in damaged], len(shards) - len(todo), left, damaged)


def _asked(keys: Sequence[str], known: Mapping[str, Stat]) -> tuple[list[Shard], dict[str, DataError]]:
    reader = StorageClient()

    def ask(key: str) -> Stat | DataError:
        try:
            return known.get(key) or (reader.stat(key) if is_remote(key) else file_stat(key))
        except DataError as error:
            return error

    threads = Threads(ask, min(_THREADS, len(keys)))
    try:
        answers = [threads.submit(key) for key in keys]
        found = [(key, answer.result()) for key, answer in zip(keys, answers, strict=True)]
    finally:
        threads.close()
    return (
        [Shard(key, stat) for key, stat in found if isinstance(stat, Stat)],
        {key: error for key, error in found if isinstance(error, DataError)},
    )


def _scanner(filters: Filters | None) -> Callable[[Shard], tuple[Shard, Scan | DataError]]:
    reader = StorageClient()

    def one(shard: Shard) -> tuple[Shard, Scan | DataError]:
        try:
            return shard, scan(shard.key, shard.stat, reader, filters)
        except DataError as error:
            return shard, error

    return one


def _tell(progress: Progress | None, done: int, total: int, ended: int, shards: int) -> None:
    if progress:
        progress(done, total, f"{ended:,} of {shards:,} shards")
