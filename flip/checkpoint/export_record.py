"""What an exported folder says of itself (docs/export.md); ``flip.export.load`` reads its weights. No torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from flip.config import merge as configuration
from flip.config.schema import Config
from flip.runs.commit import Commit, validate_record
from flip.runs.errors import ConfigError, DataError
from flip.runs.rundir import read_json

EXPORT_FILE = "export.json"
"""What the folder is: form, variant, run, stage, samples, attempt, ..., and ``files`` with sizes and checksums."""
FORMAT_VERSION = 1
CONFIG = "flip_config.yaml"
OPEN_CLIP = "open_clip_model.safetensors"
TIMM = "timm/model.safetensors"
TOKENIZER = "tokenizer.json"
HEADER_LIMIT = 16 << 20
"""Bytes of the header of a safetensors file: names, types and shapes, about 100 for each tensor."""


def is_export(folder: Path) -> bool:
    return (folder / EXPORT_FILE).is_file()


def read_export(folder: Path) -> Commit:
    """export.json as a commit of that folder, whose files are yet to be verified.

    Raises DataError where it cannot be understood, ConfigError where a later version of the toolkit wrote it.
    """
    try:
        record: Any = read_json(folder / EXPORT_FILE)
        if record["form"] != FORMAT_VERSION:
            remedy = f"This version reads form {FORMAT_VERSION}; use the version of the toolkit that wrote it."
            raise ConfigError("form: not a version that can be read here", folder / EXPORT_FILE, record["form"], remedy)
        validate_record(record)
        return Commit(folder, record)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot be understood: {type(error).__name__} {error}", folder / EXPORT_FILE) from error


def check_header(path: Path) -> None:
    """Raises DataError if a safetensors file states a header that is too large, OSError if it cannot be read."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > HEADER_LIMIT:
        what = f"the weights state a header of {size:,} bytes, at most {HEADER_LIMIT:,} are read"
        raise DataError(what, path, remedy="Copy the file again.")


def digest(found: Commit) -> str:
    """16 hex digits over the checksums of its weights: the same wherever it lies and whatever else is told in it."""
    files = found.record["files"]
    facts = [(name, files.get(name, {}).get("sha256")) for name in (OPEN_CLIP, TIMM)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def config(folder: Path) -> Config:
    """The run's configuration as the export keeps it, with the folder's own tokenizer; no torch, no weights."""
    found = configuration.read_config(folder / CONFIG)
    found.data.tokenizer = str(folder / TOKENIZER)
    return found
