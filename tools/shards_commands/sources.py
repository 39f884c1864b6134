"""What the argument SOURCE of `shards make` names: a folder of images, a table, or parquet files."""

import os
from collections.abc import Sequence
from pathlib import Path

from flip.common.image_formats import EXTENSIONS, is_image_name
from flip.runs.errors import ConfigError
from tools.shards_commands import other_formats
from tools.shards_commands.index import expand
from tools.shards_commands.parquet_files import is_parquet
from tools.shards_commands.parquet_source import ParquetSource, open_parquet_source, parquet_below
from tools.shards_commands.source_row import Wanted
from tools.shards_commands.source_rows import TABLES, Source

NEEDS = (
    f"A folder has images ({', '.join(EXTENSIONS)}) with text files or in folders of classes, or parquet files;"
    f" a table is a file ({', '.join(TABLES)})."
)


def open_source(arguments: Sequence[str], images: str, wanted: Wanted) -> Source | ParquetSource:
    """The source of the arguments: one folder or table, or several parquet files, patterns and folders of them.

    Parquet files are sorted by their path, as the shards of `shards index`. Raises ConfigError, PermissionDenied,
    StorageError.
    """
    for argument in arguments:
        other_formats.refuse_address(argument)
    paths = [path for argument in arguments for path in _matches(argument)]
    title = " ".join(arguments)
    files = list[tuple[str, str]]()
    for path in paths:
        found = _parquet_files(path)
        if not found and len(paths) == 1:
            return Source(path, images, wanted)
        if not found:
            remedy = "Make a set of each, and train on several; or write one table of all rows."
            raise ConfigError(
                "of several sources, each must be a parquet file or a folder of them", path, remedy=remedy
            )
        files += found
    files.sort()
    for (path, _), (after, _) in zip(files, files[1:], strict=False):
        if os.path.realpath(path) == os.path.realpath(after):
            raise ConfigError("the file is named twice", after, remedy="Name it once.")
    return open_parquet_source(title, files, images, wanted)


def _matches(argument: str) -> list[str]:
    """The paths that an argument names: itself if it exists, else those that match it as a pattern."""
    if os.path.lexists(argument):
        return [argument]
    paths = [str(path) for path in expand([argument])[0]]
    if paths == [os.path.abspath(argument)] or paths == [argument]:
        return [argument]
    return paths


def _parquet_files(path: str) -> list[tuple[str, str]]:
    """The parquet files that a path names, each with the folder that must contain it, or "" for a named file.

    Empty for a folder of images and other tables. Raises ConfigError for a folder of another format.
    """
    if not os.path.isdir(path):
        return [(path, "")] if is_parquet(path) else []
    names, has_images = _names_below(path)
    if has_images:
        return []
    has_parquet = any(map(is_parquet, names))
    if not has_parquet or any(name.lower().endswith(".tar") for name in names):
        other_formats.refuse_folder(Path(path), names)
    if not has_parquet:
        return []
    return parquet_below(path)


def _names_below(folder: str) -> tuple[list[str], bool]:
    """Files and folders below a folder, relative to it, without hidden ones, and whether one is an image.

    The search ends at the first image: other files do not matter then.
    """
    names = list[str]()
    for place, folders, files in os.walk(folder):
        inner = os.path.relpath(place, folder)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        visible = sorted(name for name in files if name[0] != ".")
        if any(map(is_image_name, visible)):
            return [], True
        names += [os.path.normpath(os.path.join(inner, name)) for name in (*visible, *folders)]
    return names, False
