"""`shards make`: writes images with captions or labels as shards, from folders, tables or parquet files, and indexes
them.

The source is read twice: first for its labels and keys, then for its images. Processes write its parts
(`shard_writer`). Equal sources give equal bytes, whatever the number of processes.
"""

import argparse
import errno
import hashlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flip.common.host import cores
from flip.concurrency import map_in_processes
from flip.data.manifest import build
from flip.data.manifest.manifest import Manifest, refuse_existing
from flip.evaluation.datasets.prompts import Prompts, check_prompts
from flip.files import deletion
from flip.files.creation import fsync_path, output_folder
from flip.runs.errors import ConfigError, DataError
from flip.runs.rundir import write_json
from jobs.common.terminal import ProgressBar
from tools.shards_commands.manifest import kind, manifest_facts
from tools.shards_commands.output import CLASSES, CommandResult, names, writing
from tools.shards_commands.parquet_source import ParquetPart, ParquetSource
from tools.shards_commands.shard_writer import TEST, ShardPart, Writing, Written, part_writer
from tools.shards_commands.source_row import Row, Wanted
from tools.shards_commands.source_rows import Source
from tools.shards_commands.sources import NEEDS, open_source

FEW = 2000
"""Rows that need no other process."""
EXAMPLES = 10
"""Refused rows in the report."""


class RowsPart(NamedTuple):
    """Rows of a folder or a table of text, which the main process has read."""

    rows: Sequence[Row]
    folders: Sequence[str]
    number: int
    shard: int

    def read(self) -> Iterator[Row]:
        return iter(self.rows)


class Survey:
    """What the labels and keys of rows state about a source."""

    def __init__(self) -> None:
        self.rows = 0
        self.labels = set[str]()
        self.keys = list[bytes]()
        """A hash of the key of each row that is not refused."""

    def add(self, other: "Survey") -> None:
        self.rows += other.rows
        self.labels |= other.labels
        self.keys += other.keys


def make(options: argparse.Namespace) -> CommandResult:
    """Write shards and manifest into a temporary folder, which gets its name when it is complete."""
    templates = [text.replace("{label}", "{}") for text in options.template or ["a photo of a {}"]]
    check_prompts(Prompts(["label"], templates), "--template")
    if options.images and not os.path.isdir(options.images):
        raise ConfigError("no such folder", "--images", options.images)
    source = open_source(options.source, options.images or "", _wanted(options))
    out = Path(options.out).absolute()
    survey = _survey(source, bool(options.key))
    _check_rows(source, survey, options.key)
    labels = _class_names(survey.labels)
    folder = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    with writing(out):
        refuse_existing(out)
        if out.exists() and any(out.iterdir()):
            raise _occupied(out)
        output_folder(folder, new=True)
        try:
            how = Writing(str(folder), options.per_shard, options.split, options.check, labels, templates)
            sets = SetWriter(source, survey.rows, how, options).write()
            _publish(folder, out)
        finally:
            for left in (folder, build.part_folder(folder)):
                deletion.discard_own_folder(left)
    report = manifest_facts(Manifest.load(out)) | sets[""]
    if TEST in sets:
        report[TEST] = manifest_facts(Manifest.load(out / TEST)) | sets[TEST]
    return CommandResult(report)


def _wanted(options: argparse.Namespace) -> Wanted:
    columns = {name: getattr(options, name) or "" for name in ("image", "caption", "label", "key")}
    if options.columns is None:
        return Wanted(**columns)
    return Wanted(**columns, fields=names(options.columns, "--columns"))


def _occupied(out: Path) -> ConfigError:
    return ConfigError("the folder is not empty", str(out), remedy="Choose another --out.")


def _publish(folder: Path, out: Path) -> None:
    """Give the complete folder its name. Raises ConfigError if another command was faster."""
    try:
        os.rename(folder, out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        refuse_existing(out)
        raise _occupied(out) from error
    fsync_path(out.parent)


def _survey(source: Source | ParquetSource, with_keys: bool) -> Survey:
    """The labels of a source and, if a column has them, the keys. Raises ConfigError, StorageError."""
    if isinstance(source, Source):
        return _survey_of(source.rows(), with_keys)
    total = Survey()
    if not (source.columns.label or source.columns.key):
        total.rows = source.rows_count
        return total
    parts = list(source.survey_parts())
    results = map_in_processes(_surveyor, (with_keys,), parts, _workers(source.rows_count, len(parts)), "make")
    with ProgressBar("reading labels") as bar, closing(results):
        for survey in results:
            total.add(survey)
            bar(total.rows, source.rows_count)
    return total


def _surveyor(with_keys: bool) -> Callable[[ParquetPart], Survey]:
    return lambda part: _survey_of(part.read(), with_keys)


def _survey_of(rows: Iterable[Row], with_keys: bool) -> Survey:
    survey = Survey()
    for row in rows:
        survey.rows += 1
        if row.label:
            survey.labels.add(row.label)
        if with_keys and not row.refused:
            survey.keys.append(_key_hash(row))
    return survey


def _key_hash(row: Row) -> bytes:
    return hashlib.blake2b(row.key.encode(), digest_size=16).digest()


def _workers(rows: int, parts: int) -> int:
    """Processes that read or write the parts of a source; 0: this one does."""
    processes = min(cores(), parts)
    if rows <= FEW or processes == 1:
        return 0
    return processes


def _check_rows(source: Source | ParquetSource, survey: Survey, key_column: str | None) -> None:
    """Raise ConfigError if there are no rows, or if two have the same key."""
    if not survey.rows:
        raise ConfigError("there are no images here", source.path, remedy=NEEDS)
    if len(set(survey.keys)) == len(survey.keys):
        return
    repeated = {key for key, count in Counter(survey.keys).items() if count > 1}
    row = next(row for row in source.rows() if not row.refused and _key_hash(row) in repeated)
    what = f"two rows have the same key; the first is {row.where}"
    raise ConfigError(what, f"--key {key_column}", row.key, "Name a column of unique keys.")


def _class_names(labels: Iterable[str]) -> list[str]:
    """The labels, in the order of their numbers."""
    ordered = sorted(labels)
    if all(map(str.isdecimal, ordered)):
        ordered.sort(key=int)
    return ordered


class SetWriter:
    """Writes the sets of a source: all rows, or for ``--split`` a training set and an evaluation set.

    Args:
        count: rows of the source.
    """

    def __init__(self, source: Source | ParquetSource, count: int, how: Writing, options: argparse.Namespace) -> None:
        self._source = source
        self._count = count
        self._how = how
        self._options = options

    def write(self) -> dict[str, dict[str, Any]]:
        """Write shards, manifest and classes.json of each set; returns the reports by folder.

        Raises DataError if too few rows can be used.
        """
        folder = Path(self._how.folder)
        if self._how.share is not None:
            output_folder(folder / TEST, new=True)
        sets = self._write_shards()
        reports = {name: self._complete(written, folder / name) for name, written in sets.items()}
        if TEST in sets:
            training, test = (np.frombuffer(sets[name].images, "<u8") for name in ("", TEST))
            common = len(np.intersect1d(training, test))
            if common:
                reports[TEST]["pictures_of_the_training_set"] = common
        return reports

    def _write_shards(self) -> dict[str, Written]:
        parts = list[ShardPart]()
        if isinstance(self._source, ParquetSource):
            parts = list(self._source.parts(self._how.per_shard))
            number = len(parts)
        else:
            number = -(-self._count // self._rows_of_part())
        total = {"": Written()}
        if self._how.share is not None:
            total[TEST] = Written()
        workers = _workers(self._count, number)
        results = map_in_processes(part_writer, (self._how,), parts or self._row_parts(), workers, "make")
        with ProgressBar("writing") as bar, closing(results):  # no process writes while the folder is removed
            for sets in results:
                for name, written in sets.items():
                    total[name].add(written)
                bar(sum(written.rows for written in total.values()), self._count)
        for written in total.values():
            written.refused.sort()
        return total

    def _row_parts(self) -> Iterator[ShardPart]:
        """The parts of a folder or a table of text."""
        assert isinstance(self._source, Source)
        size = self._rows_of_part()
        rows = self._source.rows()
        for index, part in enumerate(iter(lambda: list(islice(rows, size)), [])):
            first = index * size
            yield RowsPart(part, self._source.folders, first, first // self._how.per_shard)

    def _rows_of_part(self) -> int:
        """Rows of a part of a folder or table of text: one shard, or enough to fill shards of both sets of a split."""
        share = self._how.share
        if share is None:
            return self._how.per_shard
        return self._how.per_shard * min(10, round(1 / share) + 1)

    def _complete(self, written: Written, folder: Path) -> dict[str, Any]:
        """Write the manifest and classes.json of a set; returns its report. Raises DataError."""
        self._check_refused(written, folder)
        images = written.counts()
        report: dict[str, Any] = {"rows": written.rows, "refused": len(written.refused)}
        if self._how.labels:
            write_json(folder / CLASSES, {"names": self._how.labels, "templates": self._how.templates})
            report["classes"] = len(self._how.labels)
        report |= {f"{name}_pictures": count for name, count in images.items() if count}
        if isinstance(self._source, ParquetSource) and self._source.left_out:
            report["left_out_columns"] = list(self._source.left_out)
        if advice := _advice(images):
            report["advice"] = advice
        if written.refused:
            reasons = Counter(kind(reason) for *_, reason in written.refused)
            report["refused_by_reason"] = dict(reasons.most_common())
            if self._options.json:
                shown = written.refused
            else:
                shown = written.refused[:EXAMPLES]
            report["refused_rows"] = [{"row": where, "reason": reason} for _, where, reason in shown]
        with ProgressBar("indexing", "B") as bar:
            shards = [str(path) for path in folder.glob("*.tar")]
            build.index(shards, folder, 0, bar, _workers(self._count, len(shards)), settings={"pictures": images})
        return report

    def _check_refused(self, written: Written, folder: Path) -> None:
        """Raise DataError if too few rows can be used."""
        rows = written.rows
        refused = written.refused
        if rows - len(refused) >= max(1, self._options.min_complete * rows):
            return
        if not rows:
            remedy = "Choose another --split, or make one set of all rows."
            raise DataError(f"no image falls into the set {folder.name!r}", "--split", self._options.split, remedy)
        what = f"{len(refused):,} of {rows:,} images cannot be used; the first is {refused[0][1]}: {refused[0][2]}"
        remedy = "Correct the source, or accept fewer with --min-complete."
        if "does not exist" in refused[0][2] and not self._source.is_folder:
            base = self._source.images or "the folder of the table"
            remedy = f"Paths in the table are relative to {base}: name their folder with --images."
        if self._source.is_folder:
            remedy += " Each image needs a .txt file of its name or, if none has one, a folder of its class."
        raise DataError(what, remedy=remedy)


def _advice(images: Mapping[str, int]) -> list[str]:
    """Settings that training needs for these images."""
    advice = []
    if images["transparent"]:
        advice.append("transparent images: set data.to_rgb: flatten, because recipe portable2 drops transparency")
    if images["turned"]:
        advice.append("turned images: set data.exif: apply, because by default training does not turn them")
    if images["duplicates"]:
        advice.append("duplicates: equal images of one batch count as each other's negatives")
    return advice
