"""Folders of parquet files that `shards index` reads in place."""

import os
import re
from collections.abc import Sequence

from flip.data.chunk_reader import ChunkReader
from flip.data.storage.base import ObjectStat, is_remote
from flip.runs.errors import ConfigError, read_error

ENDINGS = (".parquet", ".pq")
_PART = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.(?:parquet|pq)")
"""The name of a file of ``datasets``: its split comes first."""


def expand_folders(keys: Sequence[str], known: dict[str, ObjectStat]) -> tuple[list[str], dict[str, ObjectStat]]:
    """The files, with those of each folder or prefix that ends with a slash, and the stats of objects.

    Raises ConfigError for a folder without parquet files, or with those of several splits; PermissionDenied,
    StorageError.
    """
    files = list[str]()
    for key in keys:
        if key.endswith(ENDINGS) or not (key.endswith("/") or os.path.isdir(key)):
            files.append(key)
            continue
        if is_remote(key):
            listed = ChunkReader(deadline=60.0).list(key)
            known = known | listed
            inside = [name for name in listed if name.endswith(ENDINGS)]
        else:
            inside = sorted(_below(key))
        if not inside:
            raise ConfigError("no parquet files are in this folder", key, remedy="Name tars without --image.")
        _refuse_splits(key, inside)
        files += inside
    return files, known


def _below(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            found = [(entry.path, entry.is_dir()) for entry in entries if entry.name[0] != "."]
    except OSError as error:
        raise read_error(error, "the folder cannot be read", folder) from error
    files = [path for path, is_folder in found if not is_folder and path.endswith(ENDINGS)]
    for path, is_folder in found:
        if is_folder:
            files += _below(path)
    return files


def _refuse_splits(folder: str, files: Sequence[str]) -> None:
    """Raise ConfigError if files are of several splits: training would see those of the test."""
    matches = (_PART.fullmatch(os.path.basename(name)) for name in files)
    splits = sorted({match[1] for match in matches if match})
    if len(splits) > 1:
        first = next(name for name in files if os.path.basename(name).startswith(f"{splits[-1]}-"))
        remedy = f"Name the files of one: '{os.path.dirname(first)}/{splits[-1]}-*'"
        raise ConfigError(f"the folder holds several splits: {', '.join(splits)}", folder, remedy=remedy)
