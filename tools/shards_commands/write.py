"""`shards make`: writes a table of images and captions as shards and indexes them."""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flip.data.manifest.build import index
from flip.data.manifest.manifest import refuse_existing
from flip.data.manifest.tar import EXTENSIONS, SAMPLE_LIMIT
from flip.runs.errors import ConfigError, DataError, PermissionDenied
from flip.runs.ownership import read_regular
from tools.shards_commands.manifest import facts
from tools.shards_commands.output import Bar, Outcome, writing


def make(options: argparse.Namespace) -> Outcome:
    """Write images and captions as shards, then index them."""
    if options.per_shard < 1:
        raise ConfigError("must be at least 1", "--per-shard", options.per_shard)
    rows, out, paths = list(table(options.table, options.image, options.caption)), Path(options.out), list[str]()
    if not rows:
        raise ConfigError("the table has no rows", options.table)
    refuse_existing(out)
    images = Path(options.images or Path(options.table).parent)
    extensions = [extension(row[options.image], f"{options.table}, row {i}") for i, row in enumerate(rows, 1)]
    import webdataset  # brings torch along: seconds that no mistake above should cost

    with writing(out), Bar("writing", "") as bar:
        out.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(rows), options.per_shard):
            paths.append(str(out / f"{len(paths):05d}.tar"))
            with webdataset.TarWriter(paths[-1], mtime=0) as writer:
                for number, row in enumerate(rows[first : first + options.per_shard], first):
                    picture = read(images / row[options.image], f"{options.table}, row {number + 1}")
                    caption = " ".join(row[options.caption].split())
                    sample = {"__key__": f"{number:09d}", extensions[number]: picture, "txt": caption}
                    rest = {k: v for k, v in row.items() if k not in (options.image, options.caption)}
                    writer.write(sample | ({"json": rest} if rest else {}))
                    bar(number + 1, len(rows))
    with writing(out), Bar("indexing", "B") as bar:
        return Outcome(facts(index(paths, out, 0, bar)))


def extension(name: Any, where: str) -> str:
    """The member name of an image file. Raises DataError if training does not read images of that extension."""
    found = Path(str(name)).suffix.lower().lstrip(".").replace("jpeg", "jpg")
    if found not in EXTENSIONS:
        raise DataError("no known extension of an image", where, name, f"Known are: {', '.join(EXTENSIONS)}.")
    return found


def read(path: Path, where: str) -> bytes:
    """The bytes of an image. Raises DataError, PermissionDenied."""
    try:
        return read_regular(path, SAMPLE_LIMIT)
    except PermissionError:
        raise PermissionDenied("the image may not be read", where, str(path), "Grant read access to it.") from None
    except FileNotFoundError:
        raise DataError("there is no such image", where, str(path), "Check --images.") from None
    except ValueError as error:  # no file, or too large for a sample
        raise DataError(f"the image cannot be read: {error}", where, str(path)) from error
    except OSError as error:
        raise DataError(f"the image cannot be read: {error.strerror}", where, str(path)) from error


def table(path: str, *columns: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a CSV file with a header, or of a JSON-lines file. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # Excel's "CSV UTF-8" begins with a mark
            rows = map(json.loads, file) if path.endswith((".jsonl", ".json")) else csv.DictReader(file)
            for number, row in enumerate(rows, 1):
                missing = [name for name in columns if not isinstance(row, dict) or not isinstance(row.get(name), str)]
                if missing:
                    raise ConfigError(
                        f"row {number} has no text in column {missing[0]!r}", path, remedy="See --image, --caption."
                    )
                yield row
    except OSError as error:
        raise ConfigError(f"the table cannot be read: {error.strerror}", path) from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise ConfigError(f"the table cannot be read: {error}", path) from error
