"""`shards recode`: writes the shards of a manifest again with smaller images, and their manifest.

Samples, their order, R and the exceptions stay; so do all members but the image. Each shard is written by one process
under a temporary name, then recorded in OUT.part: a command that was interrupted continues with the other shards. When
all are written, they are indexed.

    OUT.part/recode.json    what is recoded, and how; another command in the same place is refused
    OUT.part/N.json         what became of the samples of shard N, with size and time of change of its file
    OUT.part/lock           locked by the command that runs
    OUT.part/*.jsonl        the journal of the index
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flip.common.host import cores
from flip.common.image_formats import EXTENSIONS
from flip.concurrency import map_in_processes
from flip.data.chunk_reader import ChunkReader, Sample
from flip.data.decode import DecodeError
from flip.data.manifest import build
from flip.data.manifest.build import ScanResults
from flip.data.manifest.manifest import RECODED, Manifest, refuse_existing
from flip.data.storage.base import is_remote
from flip.files import deletion
from flip.files.creation import OUTPUT_MODE, atomic_write, open_lock, output_folder
from flip.runs.errors import ConfigError, DataError, StorageError
from flip.runs.rundir import to_json
from jobs.common import filesystem
from jobs.common.cli import command
from jobs.common.terminal import ProgressBar
from tools.shards_commands.manifest import kind, manifest_facts, position, refuse_parquet, shuffling
from tools.shards_commands.output import CommandResult, copy_classes
from tools.shards_commands.recode_image import (
    SUBSAMPLING,
    Recoding,
    Unsuitable,
    markers_are_safe,
    recode_image,
    view_psnr,
)

AGAIN = "Then give the same command again: it continues."
FEW = 500
"""Samples that need no other process."""
EXAMPLES = 10
"""Damaged images in the report for people."""
MOST_IDS = 50
"""Most ids in the command that excludes damaged images."""
VIEWS = 1000
"""Samples, spread over the data set, whose views are compared before and after."""
PLAN = "recode.json"
LOCK = "lock"
PIECE = 1 << 20
"""Bytes of one read of a written shard."""
EXCLUDED = "excluded by the manifest"
DAMAGED = "in a damaged chunk, all of which the manifest excludes"
_FILTERED = ("filters", "seen", "kept", "dropped", "uids")
"""Settings about samples that the source left out of its shards, and that the new shards do not hold."""
_LEFTOVER = re.compile(r"\d+\.tar\.tmp\.[0-9a-f]{16}")


@dataclass
class RecodeResult:
    """What became of the samples of one shard, or of all shards."""

    samples: int = 0
    recoded: int = 0
    unchanged: dict[str, int] = field(default_factory=dict)
    """Reason -> samples whose image is as it was."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Id -> why training cannot read the image. They are among ``unchanged``."""
    unverified: int = 0
    """Damaged JPEGs with restart markers, in which no reader may skip."""
    source_bytes: int = 0
    """Bytes of the images before."""
    bytes: int = 0
    """Bytes of the images now."""
    psnr: list[float] = field(default_factory=list)
    """Of views of a sample of the recoded images, dB."""

    def add(self, other: RecodeResult) -> None:
        self.samples += other.samples
        self.recoded += other.recoded
        for reason, count in other.unchanged.items():
            self.leave(reason, count)
        self.damaged |= other.damaged
        self.unverified += other.unverified
        self.source_bytes += other.source_bytes
        self.bytes += other.bytes
        self.psnr += other.psnr

    def leave(self, reason: str, count: int = 1) -> None:
        self.unchanged[reason] = self.unchanged.get(reason, 0) + count


def recode(options: argparse.Namespace) -> CommandResult:
    """Write shards with smaller images to ``--out``, and their manifest."""
    recoding = Recoding(options.short, options.quality, options.restart_markers)
    old = Manifest.load(options.manifest)
    out = Path(options.out).absolute()
    remedy = "Write tars first: flip shards make FILES --out FOLDER; then recode these."
    refuse_parquet(old, "recode writes tars from tars, and these are parquet files", remedy)
    shuffle = shuffling(old, options.batch)
    _refuse_own_folder(old, out)
    work = RecodeFolder(old, out, recoding)
    workers = options.workers
    if not workers and old.samples > FEW:
        workers = cores()
    with filesystem.writing(out, AGAIN), work.locked():
        outcome = _write_shards(work, workers)
        copy_classes(old, out)
        new = _index(work, outcome, workers)
        work.remove()
    return CommandResult(_report(old, new, outcome, shuffle, options.json))


def _refuse_own_folder(old: Manifest, out: Path) -> None:
    """Raise ConfigError if ``out`` holds the source."""
    folders = {os.path.dirname(key) for key in old.keys if not is_remote(key)}
    folders.add(str(old.folder))
    if os.path.realpath(out) in map(os.path.realpath, folders):
        raise ConfigError("the source is in this folder", "--out", str(out), "Name another folder.")


class RecodeFolder:
    """The folder of the new shards, and OUT.part, which says how far they are."""

    def __init__(self, source: Manifest, out: Path, recoding: Recoding) -> None:
        self.source = source
        self.out = out
        self.recoding = recoding
        self.part = build.part_folder(out)
        self.shards = [number for number, row in enumerate(source.shards.tolist()) if row[0]]
        """Rows of the source's shards that have samples, in order."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Claim the folder. Raises ConfigError if it holds something else, or another command writes to it."""
        refuse_existing(self.out)
        plan = {"source": self.source.digest} | asdict(self.recoding)
        recorded = _read_json(self.part / PLAN)
        if not recorded and self.out.exists() and any(self.out.iterdir()):
            raise ConfigError("the folder is not empty", str(self.out), remedy="Choose another --out.")
        if recorded and recorded != plan:
            what = f"a command with other options was interrupted: {json.dumps(recorded)}"
            remedy = f"Repeat that one, choose another --out, or delete {self.out} and {self.part}."
            raise ConfigError(what, str(self.part / PLAN), remedy=remedy)
        output_folder(self.part)
        output_folder(self.out)
        lock = open_lock(self.part / LOCK)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                remedy = "Wait for it, or choose another --out."
                raise ConfigError("another command writes here", str(self.out), remedy=remedy) from None
            _write_json(self.part / PLAN, plan)
            for path in self.out.iterdir():  # of a command that was killed
                if _LEFTOVER.fullmatch(path.name):
                    deletion.delete_file(path)
            yield
        finally:
            os.close(lock)

    def shard(self, number: int) -> Path:
        """The new shard for the source's shard ``number``. Names sort as numbers."""
        return self.out / f"{number:0{max(5, len(str(len(self.source.keys))))}d}.tar"

    def done(self, number: int) -> RecodeResult | None:
        """What became of a shard that is complete; None if it is not."""
        record = _read_json(self._record(number))
        try:
            info = os.stat(self.shard(number))
        except FileNotFoundError:
            return None
        if record.pop("file", None) != [info.st_size, info.st_mtime_ns]:
            return None
        return RecodeResult(**record)

    def finish(self, number: int, outcome: RecodeResult) -> None:
        """Record that a shard is complete."""
        info = os.stat(self.shard(number))
        _write_json(self._record(number), asdict(outcome) | {"file": [info.st_size, info.st_mtime_ns]})

    def remove(self) -> None:
        """Delete OUT.part."""
        deletion.discard_own_folder(self.part)

    def _record(self, number: int) -> Path:
        return self.part / f"{number}.json"


def _read_json(path: Path) -> dict[str, Any]:
    """A record; empty if there is none. It is complete if it exists."""
    with suppress(FileNotFoundError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with atomic_write(path, OUTPUT_MODE) as file:
        file.write(to_json(dict(value)).encode())


def _write_shards(work: RecodeFolder, workers: int) -> RecodeResult:
    """Write the shards that are missing; returns what became of all."""
    total = RecodeResult()
    todo = []
    for number in work.shards:
        earlier = work.done(number)
        if earlier is None:
            todo.append(number)
        else:
            total.add(earlier)
    arguments = (str(work.source.folder), str(work.out), work.recoding)
    results = map_in_processes(_writer, arguments, todo, min(workers, len(todo)), "recode")
    with ProgressBar("recoding") as bar, closing(results):
        bar(total.samples, work.source.samples)
        for outcome in results:
            total.add(outcome)
            bar(total.samples, work.source.samples)
    return total


def _writer(manifest: str, out: str, recoding: Recoding) -> Callable[[int], RecodeResult]:
    work = RecodeFolder(Manifest.load(manifest, check=False), Path(out), recoding)
    return ShardRecoder(work).write


class ShardRecoder:
    """Writes new shards, one after the other."""

    def __init__(self, work: RecodeFolder) -> None:
        self.work = work
        self.manifest = work.source
        self.reader = ChunkReader()
        self._step = max(1, self.manifest.samples // VIEWS)

    def write(self, number: int) -> RecodeResult:
        """Write the shard ``number``, and its record.

        Raises StorageError if a file cannot be written, DataError if the source is damaged.
        """
        path = self.work.shard(number)
        outcome = RecodeResult()
        with filesystem.writing(path, AGAIN):
            with atomic_write(path, OUTPUT_MODE) as file:
                summed = _SummedFile(file)
                with tarfile.open(fileobj=summed, mode="w") as tar:  # type: ignore[call-overload]
                    self._write_samples(number, tar, outcome)
            if _crc_of(path) != summed.crc:
                deletion.delete_file(path)
                raise StorageError("the file holds other bytes than were written", str(path), remedy=AGAIN)
            self.work.finish(number, outcome)
        return outcome

    def _write_samples(self, number: int, tar: tarfile.TarFile, outcome: RecodeResult) -> None:
        previous = ""
        for id, key, sample in self._samples(number):
            if key == previous:  # filters left out what was between them
                key = f"{key}-{id}"
            previous = key
            for extension, data in self._members(id, sample, outcome).items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
            outcome.samples += 1

    def _samples(self, number: int) -> Iterator[tuple[int, str, Sample]]:
        """Id, key and members of the samples of a shard; no members in a damaged chunk that the manifest excludes."""
        manifest = self.manifest
        first = int(manifest.first[number])
        stop = int(manifest.first[number + 1])
        for j in range(first // manifest.chunk, -(-stop // manifest.chunk)):
            start = manifest.chunk_ids(j).start
            ids = [id for id in manifest.chunk_ids(j) if first <= id < stop]
            try:
                chunk = self.reader.fetch(manifest, j)
                keys = chunk.keys()
                samples = chunk.samples
            except DataError:
                if any(id not in manifest.exceptions for id in ids):
                    raise
                yield from ((id, f"damaged-{id}", {}) for id in ids)
                continue
            yield from ((id, keys[id - start], samples[id - start]) for id in ids)

    def _members(self, id: int, sample: Sample, outcome: RecodeResult) -> dict[str, bytes]:
        """The members to write. Only the image that training reads may differ from the source."""
        if not sample:
            outcome.leave(DAMAGED)
            return {"damaged": b""}  # a sample has a member
        members = {extension: bytes(data) for extension, data in sample.items()}
        image = next((extension for extension in EXTENSIONS if extension in members), None)
        if image is None:
            outcome.leave("no image")
            return members
        data = members[image]
        encoded = self._recoded(id, data, outcome)
        outcome.source_bytes += len(data)
        outcome.bytes += len(encoded or data)
        if encoded is None:
            return members
        name = image
        if image not in ("jpg", "jpeg"):
            name = "jpg"
        return {name if extension == image else extension: content for extension, content in members.items()} | {
            name: encoded
        }

    def _recoded(self, id: int, data: bytes, outcome: RecodeResult) -> bytes | None:
        """The recoded image; None if it stays as it is."""
        if id in self.manifest.exceptions:
            outcome.leave(EXCLUDED)
            return None
        try:
            encoded = recode_image(data, self.work.recoding)
        except (Unsuitable, DecodeError) as error:
            outcome.leave(kind(str(error)))
            is_unsafe = not markers_are_safe(data)
            if is_unsafe or isinstance(error, DecodeError):
                outcome.damaged[str(id)] = str(error)
            outcome.unverified += is_unsafe
            return None
        outcome.recoded += 1
        if id % self._step == 0:
            outcome.psnr.append(round(view_psnr(data, encoded, id), 2))
        return encoded


class _SummedFile:
    """A file to write, with the CRC32 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.crc = 0

    def write(self, data: bytes) -> int:
        self.crc = zlib.crc32(data, self.crc)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()


def _crc_of(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


def _index(work: RecodeFolder, outcome: RecodeResult, workers: int) -> Manifest:
    """Scan the new shards and write their manifest, with R and the exceptions of the source. Raises DataError."""
    keys = [str(work.shard(number)) for number in work.shards]
    with ProgressBar("indexing", "B") as bar:
        scanned = build.scan_shards(keys, work.out, bar, workers)
    _check_counts(work, scanned)
    settings = {name: value for name, value in work.source.settings.items() if name not in (*_FILTERED, "labels")}
    settings[RECODED] = asdict(work.recoding) | {
        "source": work.source.digest,
        "subsampling": SUBSAMPLING,
        "images": outcome.recoded,
        "kept": outcome.unchanged,
        "restart_markers_verified": work.recoding.markers and not outcome.unverified,
    }
    filters = work.source.settings.get("filters")
    if filters:
        settings[RECODED]["filters"] = filters
    chunk = work.source.chunk
    return build.merge(scanned, work.out, chunk, more=settings, exceptions=work.source.exceptions)


def _check_counts(work: RecodeFolder, scanned: ScanResults) -> None:
    """Raise DataError if a shard does not hold as many samples as its source."""
    for number, shard in zip(work.shards, scanned.shards, strict=True):
        expected = int(work.source.shards[number, 0])
        count = scanned.scans.samples(shard)
        if count != expected:
            what = f"the new shard holds {count:,} samples, its source {expected:,}"
            raise DataError(what, shard.key, remedy=f"Delete it. {AGAIN}")


def _report(
    old: Manifest, new: Manifest, outcome: RecodeResult, shuffle: Mapping[str, Any], names_all: bool
) -> dict[str, Any]:
    report = manifest_facts(new) | {
        "images_recoded": outcome.recoded,
        "images_kept": sum(outcome.unchanged.values()),
        "image_bytes_before": outcome.source_bytes,
        "image_bytes": outcome.bytes,
        "times_fewer_bytes": round(old.mean_bytes / max(1.0, new.mean_bytes), 2),
        "restart_markers_verified": new.restart_markers_verified,
    }
    if outcome.unchanged:
        report["kept_by_reason"] = dict(sorted(outcome.unchanged.items(), key=lambda row: -row[1]))
    if outcome.damaged:
        ids = sorted(map(int, outcome.damaged))
        if not names_all:
            ids = ids[:EXAMPLES]
        report["images_damaged"] = len(outcome.damaged)
        report["damaged_images"] = [position(old, id) | {"reason": outcome.damaged[str(id)]} for id in ids]
    if outcome.psnr:
        low, median = np.percentile(outcome.psnr, [5, 50]).round(1).tolist()
        report["views_compared"] = len(outcome.psnr)
        report["psnr_median_db"] = median
        report["psnr_of_the_worst_5_percent_db"] = low
    report["source"] = {"digest": old.digest, "mean_bytes": round(old.mean_bytes), **shuffle}
    report["advice"] = list(_advice(outcome, shuffle, old.folder.absolute()))
    return report


def _advice(outcome: RecodeResult, shuffle: Mapping[str, Any], source: Path) -> Iterator[str]:
    yield (
        "The default of data.lanes follows the mean bytes of a sample. For the source's order at batch"
        f" {shuffle['B']:,} set data.lanes: {shuffle['L']}, or the number in the record of your run."
    )
    yield "It is another data set: a run on it is another run. init.extend continues a complete one with its weights."
    if outcome.unverified:
        ids = ",".join(sorted(outcome.damaged, key=int))
        exclude = command("shards", "exclude", source, "--ids", ids, "--out", "NEW_FOLDER")
        if len(outcome.damaged) > MOST_IDS:
            exclude = command("shards", "verify", source, "--out", "NEW_FOLDER")
        yield (
            f"{outcome.unverified:,} damaged JPEGs have restart markers, so that readers must not skip between markers."
            f" Exclude them from the source first: {exclude}"
        )
