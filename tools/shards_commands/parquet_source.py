"""Parquet files as a source of `shards make`: their columns, which must agree, and their parts, which processes read.

Each process opens the files that it reads: no image passes through the main process. A part is a range of rows of one
file. Parts depend on the files and on the size of shards only, so shards are equal for any number of processes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flip.data.manifest.filters import listed
from flip.runs.errors import ConfigError
from tools.shards_commands import image_folders, parquet_files
from tools.shards_commands.parquet_files import IMAGE_LISTS, ParquetFacts, class_names, facts, is_unknown
from tools.shards_commands.source_files import OUTSIDE, SourceFiles
from tools.shards_commands.source_row import Row, SourceColumns, Wanted, choose_columns, rows_of

_PART_ROWS = 10_000
"""Rows of a part, unless four row groups have more: a part reads the groups at its borders in full."""
_SHOWN = 3
"""Files that a message lists."""


class ParquetPart(NamedTuple):
    """A range of rows of a parquet file."""

    path: str
    within: str
    """The folder that must contain the file, after links are followed; "" if the user named the file."""
    folders: Sequence[str]
    """Folders that contain the images of rows with paths; relative ones are relative to the first one."""
    columns: SourceColumns
    start: int
    stop: int
    number: int
    """Number of the first row in the set."""
    shard: int
    """Number of the first shard."""

    def read(self) -> Iterator[Row]:
        """The rows. Raises ConfigError, StorageError."""
        columns = self.columns
        names = list(dict.fromkeys([*columns.used, *(columns.fields or ())]))
        with parquet_files.open_parquet(self.path, _files(self.within)) as table:
            records = parquet_files.records(table, names, self.start, self.stop)
            yield from rows_of(records, columns, self.path, self.start + 1)


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files with the same columns, in the order of their shards."""

    path: str
    """As the user named it, for messages."""
    images: str
    files: Sequence[tuple[ParquetFacts, str]]
    """The facts of each file, and the folder that must contain it, or ""."""
    columns: SourceColumns
    left_out: Sequence[str]
    """Columns with bytes or vectors, which do not become fields of the json member."""
    is_folder = False

    @property
    def rows_count(self) -> int:
        return sum(file.rows for file, _ in self.files)

    def rows(self) -> Iterator[Row]:
        """The rows, in the order of the shards, by one process."""
        for part in self.parts(_PART_ROWS):
            yield from part.read()

    def parts(self, per_shard: int) -> Iterator[ParquetPart]:
        """The parts of all files; a shard has rows of one file. ``per_shard``: rows of a shard."""
        number = 0
        shard = 0
        for file, within in self.files:
            rows = max(_PART_ROWS, 4 * file.largest_group)
            rows = -(-rows // per_shard) * per_shard
            folders = [os.path.dirname(file.path) or "."]
            if self.images:
                folders.insert(0, self.images)
            for start in range(0, file.rows, rows):
                stop = min(start + rows, file.rows)
                first = number + start
                yield ParquetPart(file.path, within, folders, self.columns, start, stop, first, shard)
                shard += -(-(stop - start) // per_shard)
            number += file.rows

    def survey_parts(self) -> Iterator[ParquetPart]:
        """The parts, with the columns of labels and keys only."""
        columns = self.columns._replace(image="", caption="", fields=())
        return (part._replace(columns=columns) for part in self.parts(_PART_ROWS))


def open_parquet_source(path: str, paths: Sequence[tuple[str, str]], images: str, wanted: Wanted) -> ParquetSource:
    """The source of parquet files, given as (path, folder that must contain it). Raises ConfigError, StorageError.

    ``path``: what the user named.
    """
    opened = [(facts(name, _files(within)), within) for name, within in paths]
    files = [(file, within) for file, within in opened if file.rows]  # a file without rows often lacks types, too
    if not files:
        raise ConfigError("the table has no rows", path)
    all_facts = [file for file, _ in files]
    first = all_facts[0]
    columns = choose_columns(wanted, list(first.kinds), first.path)
    _refuse_image_lists(all_facts, columns.image)
    for name in (*columns.used, *(columns.fields or ())):
        _refuse_missing(all_facts, name)
    left_out = list[str]()
    remedy = "Make a set of each form."
    if columns.fields is None:
        left_out = _payloads(all_facts, columns.used)
        others = dict.fromkeys(name for file in all_facts for name in file.kinds)
        columns = columns._replace(fields=[name for name in others if name not in (*columns.used, *left_out)])
        remedy = "Make a set of each form, or name the columns to keep in the json member with --columns."
    _refuse_different_columns(all_facts, [*columns.used, *(columns.fields or ())], remedy)
    columns = columns._replace(classes=_classes(all_facts, columns.label))
    return ParquetSource(path, images, files, columns, left_out)


def parquet_below(folder: str) -> list[tuple[str, str]]:
    """The parquet files below a folder, sorted by name, each with this folder, which must contain it.

    Hidden files and folders are left out. Raises ConfigError if a file lies elsewhere, after links are followed, or if
    the files belong to several splits.
    """
    files = SourceFiles([folder])
    found = list[str]()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [os.path.join(place, name) for name in names if name[0] != "." and parquet_files.is_parquet(name)]
    found.sort()
    for path in found:
        if not files.contains(path):
            pattern = os.path.join(os.path.dirname(path), "*.parquet")
            reason = OUTSIDE.partition(":")[0]
            raise ConfigError(f"the file {reason}", path, remedy=f"If you trust it, name the files: {pattern!r}.")
    _refuse_several_splits(folder, found)
    return [(path, folder) for path in found]


def _files(within: str) -> SourceFiles | None:
    if within:
        return SourceFiles([within])
    return None


def _refuse_several_splits(folder: str, paths: Sequence[str]) -> None:
    """Raise ConfigError if files belong to several splits: one set would mix training and test images."""
    splits = dict[str, str]()
    for path in paths:
        relative = Path(path).relative_to(folder)
        words = [*relative.parts[:-1], relative.name.partition(".")[0].partition("-")[0].partition("_")[0]]
        split = next((word.lower() for word in words if image_folders.is_split(word)), "")
        if split:
            splits.setdefault(split, path)
    if len(splits) < 2:
        return
    names = " and ".join(sorted(splits))
    example = next(iter(splits.values()))
    pattern = os.path.join(os.path.dirname(example), "*.parquet")
    if image_folders.is_split(Path(example).stem.partition("-")[0].partition("_")[0]):
        pattern = os.path.join(os.path.dirname(example), f"{Path(example).stem.partition('-')[0]}*.parquet")
    what = f"{names} are names of splits, which must not become one set"
    raise ConfigError(what, folder, remedy=f"Make a set of each: name its files, as {pattern!r}.")


def _payloads(files: Sequence[ParquetFacts], used: Sequence[str]) -> list[str]:
    """The columns that hold bytes or vectors, without those that are ``used``."""
    names = dict.fromkeys(name for file in files for name in file.kinds if file.is_payload(name))
    return [name for name in names if name not in used]


def _refuse_image_lists(files: Sequence[ParquetFacts], image: str) -> None:
    """Raise ConfigError if the column of images holds several per row."""
    for file in files:
        kind = file.kinds.get(image, "")
        if kind == IMAGE_LISTS or kind.startswith("list of"):
            remedy = "Write a row for each image, as with explode of pandas, or name another column with --image."
            raise ConfigError(f"each row holds {IMAGE_LISTS}", file.path, image, remedy)


def _refuse_different_columns(files: Sequence[ParquetFacts], names: Sequence[str], remedy: str) -> None:
    """Raise ConfigError if the columns ``names`` of two files differ."""
    first = files[0]
    kinds = _known_kinds(files)
    for file in files:
        differences = [text for name in names if (text := _difference(file, first, kinds, name))]
        if differences:
            what = f"its columns differ from those of {first.path}: {listed(differences)}"
            raise ConfigError(what, file.path, remedy=remedy)


def _difference(file: ParquetFacts, first: ParquetFacts, kinds: Mapping[str, str], name: str) -> str:
    """How a column differs from the same one of the first file; empty if it does not."""
    if name not in file.kinds and name not in first.kinds:
        return ""
    if name not in file.kinds:
        return f"{name} is missing"
    if name not in first.kinds:
        return f"{name} is new"
    kind = file.kinds[name]
    if is_unknown(kind) or kind == kinds[name]:
        return ""
    return f"{name} is {kind}, not {kinds[name]}"


def _refuse_missing(files: Sequence[ParquetFacts], name: str) -> None:
    """Raise ConfigError if some files lack a column that is read."""
    lacking = [file.path for file in files if name not in file.kinds]
    if not lacking:
        return
    shown = ", ".join(lacking[:_SHOWN])
    if len(lacking) > _SHOWN:
        shown += f" and {len(lacking) - _SHOWN:,} others"
    what = f"{len(lacking):,} of {len(files):,} files lack a column that {files[0].path} has"
    remedy = "Leave these files out, make a set of them, or name a column that all have."
    raise ConfigError(what, shown, name, remedy)


def _known_kinds(files: Sequence[ParquetFacts]) -> dict[str, str]:
    """Column -> the kind of its values in the first file that has values there."""
    kinds = dict[str, str]()
    for file in files:
        for name, kind in file.kinds.items():
            if not is_unknown(kind):
                kinds.setdefault(name, kind)
    return kinds


def _classes(files: Sequence[ParquetFacts], label: str) -> list[str]:
    """The names of the classes, which must be equal in all files. Raises ConfigError."""
    if not label:
        return []
    names = class_names(files[0], label)
    for file in files:
        if class_names(file, label) != names:
            what = f"the schema has other names of classes than that of {files[0].path}"
            raise ConfigError(what, file.path, label, "Make a set of each.")
    return names
