"""A folder as open_clip writes it: its files, configuration and checksums, and its run directory. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flip.checkpoint import export_record
from flip.config import identity
from flip.config.schema import SCHEMA
from flip.config.yaml_io import dump_yaml, read_yaml
from flip.runs.commit import Commit, Damaged, sha256
from flip.runs.commit import verify as verify_files
from flip.runs.errors import ConfigError, DataError
from flip.runs.ownership import read_regular
from flip.runs.rundir import RunDir, create_json, write_json, write_text

log = logging.getLogger(__name__)

FILES = ("open_clip_config.json", "open_clip_model.safetensors")
WISHES = ("clean", "language", "strip_sep_token")
"""Keywords of a tokenizer that a folder may choose."""
EDITED = ("open_clip_config.json", "README.md")
"""Files of an export that docs/export.md lets people edit."""


def check(folder: str) -> bool:
    """Whether the folder's tokenizer is one of transformers.

    What open_clip_config.json names goes to transformers and timm as it is: a tokenizer may bring code and say that it
    is to be trusted, encoders may be asked for by their names on a hub. Raises ConfigError for such requests and if a
    file is missing, DataError if the weights are truncated or no safetensors.
    """
    lacking = [name for name in FILES if not (Path(folder) / name).is_file()]
    if lacking:
        remedy = "Weights are read as safetensors alone, as open_clip.push_to_hf_hub and our export write them."
        raise ConfigError(f"is no folder of open_clip: {lacking[0]} is missing", folder, remedy=remedy)
    weights = Path(folder) / FILES[1]
    export_record.check_header(weights)
    try:
        with safe_open(weights, framework="np"):
            pass
    except SafetensorError as error:
        raise DataError(f"the weights cannot be read: {error}", weights, remedy="Copy the file again.") from error
    where = str(Path(folder) / FILES[0])
    try:
        model = json.loads(read_regular(where, 1 << 20).decode("utf-8"))["model_cfg"]
        image, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
        wishes = sorted(set(text.get("tokenizer_kwargs") or {}) - set(WISHES))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"is no configuration of open_clip: {type(error).__name__} {error}", where) from error
    remedy = "Only files of the folder are read, and no code of it is run."
    if wishes:
        raise ConfigError("text_cfg.tokenizer_kwargs: a wish that is not granted", where, ", ".join(wishes), remedy)
    named = str(image.get("timm_model_name") or "")
    if text.get("hf_model_name") or (":" in named and not named.startswith("local-dir:")):
        found = text.get("hf_model_name") or named
        raise ConfigError("the model names an encoder of a hub", where, found, remedy)
    return bool(text.get("hf_tokenizer_name"))


def verify(folder: str) -> None:
    """Compare an exported folder with the sizes and checksums in its export.json; other folders have none.

    A change of a file in EDITED is logged. Raises DataError if another file differs or is missing.
    """
    if not export_record.is_export(Path(folder)):
        return
    mark = export_record.mark(Path(folder))
    files = mark.record["files"]
    edited = {name: facts for name, facts in files.items() if name in EDITED}
    try:
        verify_files(Commit(mark.path, {**mark.record, "files": {n: files[n] for n in files if n not in edited}}))
    except Damaged as error:
        remedy = "Copy the folder again, all files of it, or export again."
        raise DataError(f"the export is damaged: {error}", folder, remedy=remedy) from error
    try:
        verify_files(Commit(mark.path, {**mark.record, "files": edited}))
    except Damaged as error:
        log.warning("%s: edited since the export, or damaged: %s", folder, error)


def _settings(folder: str) -> dict[str, Any]:
    return {"model": {"open_clip": folder}}


def refuse_another(subject: RunDir, folder: str) -> None:
    """Raises ConfigError if the run directory ``subject`` is that of another run or model."""
    if subject.config.exists() and read_yaml(subject.config) != _settings(folder):
        raise ConfigError("another run or model stands there", subject.path, remedy="Choose with --save-as.")


def register(subject: RunDir, folder: str) -> None:
    """Make the run directory of a model that has been scored: complete, with nothing but its scores.

    Raises ConfigError as ``refuse_another``.
    """
    refuse_another(subject, folder)
    if subject.result.exists():
        return
    settings = _settings(folder)
    about = {"run": subject.name, "stage": "foreign", "samples": 0, "evaluations": [], "attempts": 0}
    subject.path.mkdir(parents=True, exist_ok=True)
    write_text(subject.config, dump_yaml(settings))
    write_json(subject.identity, {"hash": identity.digest(settings), "schema": SCHEMA, "code": "", "config": settings})
    create_json(subject.result, about)


def digest(folder: str) -> str:
    """SHA-256 over the contents of a folder's files, by name."""
    text = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        text.update(f"{path.name} {sha256(path)}\n".encode())
    return text.hexdigest()
