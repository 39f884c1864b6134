"""`shards move`: writes the manifest of shards that were copied to another folder or bucket, without reading them.

The samples, their order and the digest stay, so runs continue with the new manifest.
"""

import argparse
from collections.abc import Sequence
from os.path import commonprefix, dirname
from pathlib import Path

from flip.concurrency import DaemonExecutor
from flip.data.chunk_reader import ChunkReader
from flip.data.manifest.build import shard_key, stat_shards
from flip.data.manifest.manifest import Manifest, with_rows, write
from flip.data.storage.base import ObjectStat, is_remote
from flip.runs.addresses import lists
from flip.runs.errors import ConfigError, DataError
from jobs.common.terminal import ProgressBar
from tools.shards_commands.manifest import manifest_facts
from tools.shards_commands.output import CommandResult, claim, copy_classes, print_details, writing

LISTINGS = 16
"""Folders of a bucket that are listed at once."""
NAMED = 10
"""Missing and different shards that the error names."""


def move(options: argparse.Namespace) -> CommandResult:
    """Write a manifest whose shards are below another prefix, if they exist there with the indexed sizes and ETags."""
    old = Manifest.load(options.manifest)
    out = Path(options.out).absolute()
    count = old.shard_count
    keys = replace_prefix(old.keys[:count], options.prefix, shard_key(options.to).rstrip("/"))
    claim(out)
    with ProgressBar("listing") as bar:
        known = _list_folders(sorted({f"{dirname(key)}/" for key in keys if is_remote(key) and lists(key)}), bar)
    with ProgressBar("checking") as bar:
        shards, missing = stat_shards(keys, known, bar)
    wrong = {key: error.what for key, error in missing.items()}
    by_etag = 0
    stats = {shard.key: shard.stat for shard in shards}
    for key, size, etag in zip(keys, old.shards[:count, 1].tolist(), old.etags[:count], strict=True):
        stat = stats.get(key)
        if stat is None:
            continue
        comparable = comparable_etags(etag, stat.etag) and not options.sizes_only
        by_etag += comparable
        if stat.size != size:
            wrong[key] = f"{stat.size:,} bytes, indexed were {size:,}"
        elif comparable and stat.etag != etag:
            wrong[key] = f"its ETag is {stat.etag}, indexed was {etag}"
    if wrong:
        print_details(options, {"wrong": [{"shard": key, "reason": wrong[key]} for key in sorted(wrong)]})
        raise _refusal(wrong, len(keys))
    with writing(out):
        table = with_rows(old, out, keys, [stats[key].etag for key in keys])
        copy_classes(old, out)
        manifest = write(out, table, old.checksums, old.exceptions, old.settings)
    return CommandResult(
        manifest_facts(manifest) | {"compared_by_etag": by_etag, "compared_by_size": len(keys) - by_etag}
    )


def replace_prefix(keys: Sequence[str], prefix: str | None, to: str) -> list[str]:
    """Keys with ``to`` in place of ``prefix``, by default their common folder; keys elsewhere stay.

    Raises ConfigError if no key is below ``prefix``, or two keys would become equal.
    """
    if prefix:
        folder = shard_key(prefix).rstrip("/")
    else:
        folder = dirname(commonprefix([f"{dirname(key)}/" for key in keys]))
    if not prefix and (folder in ("", "/") or folder.endswith(":")):
        remedy = "Name the part of their paths to replace."
        raise ConfigError("the shards have no common folder", "--from", remedy=remedy)
    moved = [to + key.removeprefix(folder) if key.startswith(f"{folder}/") else key for key in keys]
    if not folder or not any(key.startswith(f"{folder}/") for key in keys):
        raise ConfigError("no shard is below this prefix", "--from", prefix or "", f"The first one is {keys[0]}.")
    if len(set(moved)) < len(moved):
        raise ConfigError("two shards would be at one place", "--to", to, "Move them to a prefix of their own.")
    return moved


def comparable_etags(a: str, b: str) -> bool:
    """Whether both are known and of objects that were uploaded at once: others depend on the sizes of their parts."""
    return bool(a and b) and (a == b or "-" not in a + b)


def _list_folders(folders: Sequence[str], bar: ProgressBar) -> dict[str, ObjectStat]:
    """The objects in folders of a bucket. A request per thousand objects, instead of a request per shard."""
    client = ChunkReader(deadline=60.0)
    known = dict[str, ObjectStat]()
    executor = DaemonExecutor(min(LISTINGS, len(folders)), "list")
    try:
        for number, listing in enumerate([executor.submit(client.list, folder) for folder in folders], 1):
            known |= listing.result()
            bar(number, len(folders))
    finally:
        executor.close()
    return known


def _refusal(wrong: dict[str, str], count: int) -> DataError:
    named = "; ".join(f"{key}: {wrong[key]}" for key in sorted(wrong)[:NAMED])
    more = ""
    if len(wrong) > NAMED:
        more = f"; and {len(wrong) - NAMED:,} more (--json lists all)"
    remedy = "Copy them again. ETags of objects with server-side encryption are no checksums: then give --sizes-only."
    return DataError(f"{len(wrong):,} of {count:,} shards are missing there or differ: {named}{more}", remedy=remedy)
