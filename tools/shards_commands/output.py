"""What the shards commands share: results and their display, errors while writing."""

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from flip.data.manifest.build_parquet import PARQUET
from flip.data.manifest.manifest import Manifest, refuse_existing
from flip.data.sample_members import refuse_json_members
from flip.files import deletion
from flip.files.creation import OUTPUT_MODE, atomic_write, output_folder
from flip.runs.errors import ConfigError, PermissionDenied
from jobs.common.filesystem import unwritable
from jobs.common.text import plain

CLASSES = "classes.json"
"""Names and templates of the classes of an evaluation set, next to its manifest."""


class CommandResult(NamedTuple):
    """Result of a command, printed as JSON or as ``text`` (default: one line per name)."""

    report: dict[str, Any]
    code: int = 0
    text: str = ""

    def show(self) -> str:
        return self.text or "\n".join(lines(self.report))


_WORDS = {
    "B": "B, pairs of a batch",
    "L": "L, lanes",
    "Q": "Q, chunks of a block",
    "R": "R, samples of a chunk",
}
"""Key of a report -> what people read in its place."""


def print_details(options: argparse.Namespace, report: Mapping[str, Any]) -> None:
    """With --json, print what an error that is raised next is about, as the one document on standard output."""
    if options.json:
        print(json.dumps(report, indent=1))


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """One line per name; for a table or list, one line per entry below the name. Text from files is escaped."""
    labels = {name: plain(_WORDS.get(name, name.replace("_", " "))) for name in report}
    width = max((len(labels[name]) for name, value in report.items() if not isinstance(value, (dict, list))), default=0)
    for name, value in report.items():
        name = labels[name]
        if isinstance(value, dict):
            yield name
            yield from (f"  {line}" for line in lines(value))
        elif isinstance(value, list):
            yield name
            for row in value:
                yield "  " + plain("  ".join(map(str, row.values())) if isinstance(row, dict) else str(row))
        else:
            yield f"{name:{width}}  {plain(number(value))}"


def names(text: str, option: str) -> list[str]:
    """Split ``a,b`` into ``[a, b]``. Raises ConfigError if it is empty."""
    parts = [name.strip() for name in text.split(",") if name.strip()]
    if not parts:
        raise ConfigError("is empty", option, text, "Write names with commas between them, as txt,alt.")
    return parts


def captions(options: argparse.Namespace, manifest: Manifest, default: str = "txt") -> list[str]:
    """The members that ``--captions`` names. ``default``: of tars without it. Raises ConfigError."""
    text = options.captions
    if text is None:
        text = parquet_captions(manifest) if manifest.pages else default
    members = names(text, "--captions")
    refuse_json_members(members, "--captions")
    return members


def parquet_captions(manifest: Manifest) -> str:
    """The value of data.captions for a manifest of parquet files."""
    return ",".join(f"json:{name}" for name in manifest.settings[PARQUET]["captions"])


def number(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if abs(value) >= 1000:
            return f"{value:,.0f}"
        return f"{value:,.4g}"
    return str(value)


@contextmanager
def writing(out: str | Path) -> Iterator[None]:
    """Convert file system errors inside to errors about writing ``out``."""
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError("a file is where a folder must be, or the other way round", error.filename or out) from error
    except OSError as error:
        raise unwritable(error, out, "Choose another --out.") from error


def copy_classes(source: Manifest, out: Path) -> None:
    """Copy the names of classes of an evaluation set next to a manifest that is made of it. Raises OSError.

    A file that is in ``out`` already stays.
    """
    path = source.folder / CLASSES
    if not path.is_file() or (out / CLASSES).exists():
        return
    output_folder(out)
    with atomic_write(out / CLASSES, OUTPUT_MODE) as file:
        file.write(path.read_bytes())


def claim(out: Path) -> None:
    """Check that a manifest can be written to ``out`` before hours of reading. Creates no folder."""
    with writing(out):  # also if OUT lies below a folder that may not be entered
        refuse_existing(out)
        existed = out.exists()
        output_folder(out)
        writable = os.access(out, os.W_OK | os.X_OK) or not out.exists()  # False if another process's claim removed it
    if not existed:
        with suppress(OSError):  # removed meanwhile, or in use
            deletion.delete_empty_folder(out)
    if not writable:
        raise PermissionDenied("may not be written", str(out), remedy="Choose another --out.")
