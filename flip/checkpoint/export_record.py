"""The record of an exported folder (docs/export.md), without torch; ``flip.export.load`` reads the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from flip.config import merge as configuration
from flip.config.schema import Config
from flip.runs import formats
from flip.runs.checkpoint_folder import SavedCheckpoint, validate_record
from flip.runs.errors import ConfigError, DataError
from flip.runs.formats import FormatError
from flip.runs.rundir import read_json

EXPORT_FILE = "export.json"
"""Form, variant, run, stage, samples, attempt, ..., and ``files`` with sizes and checksums."""
CONFIG = "flip_config.yaml"
OPEN_CLIP = "open_clip_model.safetensors"
TIMM = "timm/model.safetensors"
TOKENIZER = "tokenizer.json"
HEADER_LIMIT = 16 << 20
"""Largest header of a safetensors file, in bytes; a tensor takes about 100."""


def is_export(folder: Path) -> bool:
    return (folder / EXPORT_FILE).is_file()


def read_export(folder: Path) -> SavedCheckpoint:
    """export.json as a checkpoint whose files are not verified yet.

    Raises DataError if it is invalid, FormatError if another version wrote it, ConfigError if it is not an export for
    open_clip.
    """
    try:
        record: Any = read_json(folder / EXPORT_FILE)
        formats.check(formats.EXPORT, record, folder / EXPORT_FILE)
        if "format" in record:
            remedy = "Take the run, or export it with --to open_clip."
            raise ConfigError("the toolkit does not read back this format", folder, record["format"], remedy)
        validate_record(record)
        return SavedCheckpoint(folder, record)
    except FormatError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"is invalid: {type(error).__name__} {error}", folder / EXPORT_FILE) from error


def check_header(path: Path) -> None:
    """Raise DataError if a safetensors file states a header that is too large, OSError if it cannot be read."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > HEADER_LIMIT:
        what = f"the weights state a header of {size:,} bytes, at most {HEADER_LIMIT:,} are read"
        raise DataError(what, path, remedy="Copy the file again.")


def digest(source: SavedCheckpoint) -> str:
    """16 hex digits over the checksums of the weights, independent of the path and of other fields."""
    files = source.record["files"]
    facts = [(name, files.get(name, {}).get("sha256")) for name in (OPEN_CLIP, TIMM)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def config(folder: Path) -> Config:
    """The configuration of the exported run, with the tokenizer of the folder."""
    result = configuration.read_config(folder / CONFIG)
    result.data.tokenizer = str(folder / TOKENIZER)
    return result
