"""`shards weights`: writes the file of weights that ``data.weights`` names."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flip.config.weights import UNIT, WeightFacts
from flip.data.chunk_reader import ChunkReader, Sample
from flip.data.decode import DecodeError, noting_place, place_of
from flip.data.manifest import npy_header
from flip.data.manifest.manifest import Manifest
from flip.data.manifest.uids import MEMBER, parse_uid
from flip.data.manifest.weights import piece_size, pieces, write_weights
from flip.data.sample_members import fields_of
from flip.files.creation import open_regular
from flip.runs.errors import ConfigError, DataError
from jobs.common.terminal import ProgressBar
from tools.shards_commands.output import CommandResult, lines, writing

_TABLE_REMEDY = "A table is a .npy file: uids (u8,u8), each row a view, or uids with a number (u8,u8,f8)."


def weights(options: argparse.Namespace) -> CommandResult:
    """Write the weights of the samples of a manifest."""
    manifest = Manifest.load(options.manifest)
    if os.path.lexists(options.out):
        raise ConfigError("the file already exists", options.out, remedy="Name another file for --out.")
    if options.values:
        values = _read(options.values, "--values")
        source = os.path.basename(options.values)
        numbers = pieces(values, piece_size(manifest.chunk))
    elif options.field:
        source = f"field {options.field}"
        numbers = _in_pieces(manifest, partial(_field, options.field))
    else:
        source = os.path.basename(options.table)
        numbers = _in_pieces(manifest, UidTable(options.table).weight)
    with writing(options.out):
        facts = write_weights(options.out, manifest, numbers, options.cap, source)
    report = weights_report(facts) | {"file": options.out}
    text = "\n".join([*lines(report), "", f"In a sweep: data: {{weights: {shlex.quote(options.out)}}}"])
    return CommandResult(report, 0, text)


def weights_report(facts: WeightFacts) -> dict[str, Any]:
    """What a file of weights holds, as plain values."""
    used = facts.samples // facts.chunk * facts.chunk
    return {
        "manifest": facts.manifest, "source": facts.source, "samples": used, "with_a_weight": facts.positive,
        "effective_samples": facts.effective, "views_an_epoch": facts.epoch, "sum": round(facts.total / UNIT, 3),
        "largest": facts.largest, "smallest_above_0": facts.smallest, "capped": facts.capped,
        "views_a_read": facts.places, "samples_a_read": facts.chunk, "repeats_a_read": facts.repeats,
    }  # fmt: skip


class UidTable:
    """Weights by uid, of a .npy file; a uid that occurs several times has the sum. Raises ConfigError."""

    def __init__(self, path: str) -> None:
        rows = _read(path, "--table")
        names = rows.dtype.names or ()
        kinds = [rows.dtype[name].kind + str(rows.dtype[name].itemsize) for name in names]
        if rows.ndim != 1 or kinds[:2] != ["u8", "u8"] or len(kinds) > 3 or not len(rows):
            raise ConfigError("no table of uids and weights", "--table", path, _TABLE_REMEDY)
        values = np.ones(len(rows))
        if len(kinds) == 3:
            values = rows[names[2]].astype(np.float64)
        pairs = np.empty((len(rows), 2), np.dtype(">u8"))
        pairs[:, 0] = rows[names[0]]
        pairs[:, 1] = rows[names[1]]
        keys = pairs.view("V16").ravel()
        self._keys, places = np.unique(keys, return_inverse=True)
        self._values = np.bincount(places.ravel(), values)

    def weight(self, sample: Sample) -> float:
        """The weight of a sample; 0 if its uid is not listed. Raises DecodeError if it has none."""
        uid = parse_uid(sample.get(MEMBER, memoryview(b"")))
        if uid is None:
            raise DecodeError("no uid in its json")
        key = np.frombuffer(uid, "V16")[0]
        place = int(np.searchsorted(self._keys, key))
        if place < len(self._keys) and self._keys[place] == key:
            return float(self._values[place])
        return 0.0


def _field(name: str, sample: Sample) -> float:
    return fields_of(sample, [name])[0]


def _in_pieces(manifest: Manifest, weight: Any) -> Iterator[NDArray[np.float64]]:
    """The weights of all samples, which are read; those that the manifest excludes get 0. Raises DataError."""
    size = piece_size(manifest.chunk)
    numbers = np.zeros(min(size, manifest.samples))
    first = 0
    with ProgressBar("reading") as bar:
        for id, sample in ChunkReader().samples(manifest):
            while id >= first + len(numbers):
                yield numbers
                first += len(numbers)
                numbers = np.zeros(min(size, manifest.samples - first))
            try:
                with noting_place(partial(place_of, manifest, id)):
                    numbers[id - first] = weight(sample)
            except DecodeError as error:
                shard, ordinal = manifest.locate(id)
                remedy = "Each sample needs one. Exclude it (flip shards exclude), or use --values."
                where = f"{shard}, sample {ordinal}"
                raise DataError(f"no weight of sample {id}: {error}", where, remedy=remedy) from error
            bar(id + 1, manifest.samples)
    while first < manifest.samples:
        yield numbers
        first += len(numbers)
        numbers = np.zeros(min(size, manifest.samples - first))


def _read(path: str, option: str) -> NDArray[Any]:
    """The array of a .npy file, mapped into memory. Raises ConfigError."""
    try:
        with open_regular(path) as file:
            npy_header.check_header(file, os.fstat(file.fileno()).st_size)
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", option, path) from error
    except (ValueError, EOFError) as error:
        raise ConfigError(f"no .npy file: {error}", option, path, "Write it with numpy.save.") from error
    if values.ndim != 1:
        raise ConfigError("needs one dimension", option, list(values.shape), "Give a number or a row per sample.")
    return values
