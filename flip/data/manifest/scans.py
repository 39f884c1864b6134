"""Scans kept in a folder, so that an index that was stopped, or shared out to several machines, need not begin anew.

Each process that scans appends to a file of its own: a line per shard, the CRC32 of what follows in eight hexadecimal
digits, then JSON: the shard as it was (key, size, ETag, time of change), its samples, the filters, the census, and the
arrays of ``Scan`` as [dtype, base64]. A line that is torn or spoiled is a shard that was not scanned, and so is one of
other filters.
"""

from __future__ import annotations

import base64
import json
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from flip.data.manifest.census import Census
from flip.data.manifest.scan import Scan
from flip.data.storage.base import Stat
from flip.runs.errors import DataError


class Shard(NamedTuple):
    """A shard as it was when it was asked for: what is kept of another one under its key is not used."""

    key: str
    stat: Stat


class _Place(NamedTuple):
    path: Path
    start: int
    bytes: int
    samples: int


class Scans:
    """The scans in ``folder``, which need not exist. Raises OSError where they cannot be read or written."""

    def __init__(self, folder: Path, filters: Sequence[str] = ()) -> None:
        self.folder, self._filters = folder, list(filters)
        self._places: dict[Shard, _Place] = {}
        self._file: BinaryIO | None = None
        for path in sorted(folder.glob("*.jsonl")):
            with suppress(FileNotFoundError), open(path, "rb") as file:  # by now another process may have removed it
                start = 0
                for line in file:
                    found = _unpacked(line)
                    if found is not None and self._fits(found):
                        self._places[_shard(found)] = _Place(path, start, len(line), found["samples"])
                    start += len(line)

    def __contains__(self, shard: Shard) -> bool:
        return shard in self._places

    def _fits(self, found: dict[str, Any]) -> bool:
        fields = {*found["arrays"], "census"} if "census" in found else set()
        return fields == set(Scan._fields) and found["filters"] == self._filters

    def samples(self, shard: Shard) -> int:
        return self._places[shard].samples

    def begin(self) -> None:
        """Open a file of this process's own."""
        while self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process that had nothing to do took the empty folder with it
                self._file = open(self.folder / f"{uuid.uuid4().hex}.jsonl", "xb")  # noqa: SIM115  (by close)

    def add(self, shard: Shard, scan: Scan) -> None:
        """Append one. A process that is killed loses nothing; a machine may: its last lines, which are not synced."""
        assert self._file is not None
        line, start = _packed(shard, scan, self._filters), self._file.tell()
        self._file.write(line)
        self._file.flush()
        self._places[shard] = _Place(Path(self._file.name), start, len(line), len(scan.crcs))

    def read(self, shard: Shard) -> Scan:
        """One of those that there are. Raises DataError where the file is no longer what it was."""
        place, found = self._places[shard], None
        with suppress(FileNotFoundError), open(place.path, "rb") as file:
            file.seek(place.start)
            found = _unpacked(file.read(place.bytes))
        if found is None or _shard(found) != shard:
            what = "it was changed or removed meanwhile"
            raise DataError(what, str(place.path), remedy="Give the same command again.")
        arrays = {name: np.frombuffer(base64.b64decode(text), kind) for name, (kind, text) in found["arrays"].items()}
        return Scan(**arrays, census=Census.of_json(found["census"]))

    def close(self) -> None:
        """End adding. A file without a scan goes, and a folder without a file."""
        if self._file is not None:
            if not self._file.tell():
                Path(self._file.name).unlink(missing_ok=True)
            self._file.close()
            self._file = None
        with suppress(OSError):  # not there, or not empty
            self.folder.rmdir()

    def remove(self) -> None:
        """Delete all files of scans."""
        for path in self.folder.glob("*.jsonl"):
            path.unlink(missing_ok=True)
        self.close()


def _packed(shard: Shard, scan: Scan, filters: Sequence[str]) -> bytes:
    fields = scan._asdict()
    census: Census = fields.pop("census")
    arrays = {name: [a.dtype.str, base64.b64encode(a.tobytes()).decode()] for name, a in fields.items()}
    facts = {
        "shard": [shard.key, *shard.stat],
        "samples": len(scan.crcs),
        "filters": filters,
        "census": census.json(),
        "arrays": arrays,
    }
    text = json.dumps(facts).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _unpacked(line: bytes) -> dict[str, Any] | None:
    text = line[9:-1]
    return json.loads(text) if line == b"%08x %s\n" % (zlib.crc32(text), text) else None


def _shard(facts: dict[str, Any]) -> Shard:
    key, *stat = facts["shard"]
    return Shard(key, Stat(*stat))
