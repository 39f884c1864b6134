"""Reading an exported folder back (docs/export.md): what was written there is our own model again, bit for bit.

Only the logit scale may differ: an export holds the clamped one. A text encoder that sees no padding is the same
function, if not the same bits (``flip.padding``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from flip import model, padding, translation
from flip.commit import Commit, Damaged, check, verify
from flip.config import load as configuration
from flip.config.schema import Config
from flip.exitcodes import ConfigError, DataError
from flip.rundir import read_json

MARK = "export.json"
"""What the folder is: form, variant, run, stage, samples, attempt, ..., and ``files`` with sizes and checksums."""
FORM = 1
CONFIG = "flip_config.yaml"
OPEN_CLIP = "open_clip_model.safetensors"
TIMM = "timm/model.safetensors"
TOKENIZER = "tokenizer.json"


def is_export(folder: Path) -> bool:
    return (folder / MARK).is_file()


def mark(folder: Path) -> Commit:
    """export.json as a commit of that folder, whose files are yet to be verified.

    Raises DataError where it cannot be understood, ConfigError where a later version of the toolkit wrote it.
    """
    try:
        record: Any = read_json(folder / MARK)
        if record["form"] != FORM:
            remedy = f"This version reads form {FORM}; use the version of the toolkit that wrote it."
            raise ConfigError("form: not a version that can be read here", folder / MARK, record["form"], remedy)
        check(record)
        return Commit(folder, record)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot be understood: {type(error).__name__} {error}", folder / MARK) from error


def config(folder: Path) -> Config:
    """The run's configuration as the export keeps it, with the folder's own tokenizer; no torch, no weights."""
    found = configuration.read(folder / CONFIG)
    found.data.tokenizer = str(folder / TOKENIZER)
    return found


def read(folder: Path) -> tuple[model.Pair, Config, Commit]:
    """The model of an exported folder, verified before it is read. Raises DataError, ConfigError."""
    source = mark(folder)
    try:
        verify(source)
    except Damaged as error:
        remedy = "Copy the folder again, all files of it, or export again."
        raise DataError(f"the export is damaged: {error}", folder, remedy=remedy) from error
    found = config(folder)
    pair = model.build(found.model, found.augment, "sdpa")
    tensors, tower = load_file(folder / OPEN_CLIP), load_file(folder / TIMM)
    state = translation.from_timm(tower) | translation.text_from_open_clip(tensors)
    state |= translation.projection_from_open_clip(tensors, found.model.image.layers, found.model.embed)
    if found.model.text.padding == "mask":
        state = padding.without(state, found.model.text)
    pair.load_state_dict(state)
    return pair, found, source
