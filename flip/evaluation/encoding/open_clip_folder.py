"""A model folder of open_clip: files, configuration, checksums, and the run directory of its results. No torch."""

import hashlib
import json
import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flip.checkpoint import export_record
from flip.common.yaml_io import dump_yaml, read_yaml
from flip.config import identity
from flip.evaluation.metrics.result_files import PUBLISHED
from flip.files.creation import read_regular, run_folder
from flip.runs.checkpoint_folder import CorruptCheckpoint, SavedCheckpoint, sha256
from flip.runs.checkpoint_folder import verify as verify_files
from flip.runs.errors import ConfigError, DataError
from flip.runs.formats import RUN_NUMBER
from flip.runs.rundir import RunDir, create_json, create_text, write_json

log = logging.getLogger(__name__)

FILES = ("open_clip_config.json", "open_clip_model.safetensors")
ALLOWED_TOKENIZER_KWARGS = ("clean", "language", "strip_sep_token")
EDITABLE = ("open_clip_config.json", "README.md")
"""Files of an export that may be edited (docs/export.md)."""

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""Endings of files that execute code when they are read; they are never opened here."""
CONVERSION = """\
import json, os, open_clip
from safetensors.torch import save_file
name, source, folder = "ViT-B-16", {source!r}, {folder!r}  # the name as in open_clip's --model
model, _, _ = open_clip.create_model_and_transforms(name, pretrained=source)  # may execute code: trust the file
os.makedirs(folder)
save_file({{k: v.contiguous() for k, v in model.state_dict().items()}}, f"{{folder}}/open_clip_model.safetensors")
config = {{"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": open_clip.get_model_preprocess_cfg(model)}}
json.dump(config, open(f"{{folder}}/open_clip_config.json", "w"))
"""
"""Makes a folder that can be scored of a checkpoint of open_clip; ``source`` and ``folder`` are filled in."""


def is_pickle(path: str) -> bool:
    """Whether a path is a file of pickled weights, which may execute code and is never opened."""
    return path.endswith(PICKLES) and Path(path).is_file()


def conversion(path: str) -> tuple[str, str]:
    """Lines of Python that convert a checkpoint of open_clip, and the folder that they create."""
    folder = str(Path(path).with_suffix(""))
    return CONVERSION.format(source=path, folder=folder), folder


def check(folder: str) -> bool:
    """Check a folder before open_clip reads it; return whether its tokenizer needs transformers.

    open_clip passes names in open_clip_config.json on to transformers and timm. They could load remote code, or models
    from a hub. Raises ConfigError for such names or if a file is missing, DataError if the weights are truncated.
    """
    missing = [name for name in FILES if not (Path(folder) / name).is_file()]
    if missing:
        remedy = "Only safetensors are read, as open_clip.push_to_hf_hub and flip export write them."
        raise ConfigError(f"is no folder of open_clip: {missing[0]} is missing", folder, remedy=remedy)
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
        image = dict(model["vision_cfg"])
        text = dict(model["text_cfg"])
        refused = sorted(set(text.get("tokenizer_kwargs") or {}) - set(ALLOWED_TOKENIZER_KWARGS))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"is no configuration of open_clip: {type(error).__name__} {error}", where) from error
    remedy = "Only files of the folder are read, and none of its code is run."
    if refused:
        raise ConfigError(
            "text_cfg.tokenizer_kwargs: an argument that is not allowed", where, ", ".join(refused), remedy
        )
    timm_name = str(image.get("timm_model_name") or "")
    if text.get("hf_model_name") or (":" in timm_name and not timm_name.startswith("local-dir:")):
        name = text.get("hf_model_name") or timm_name
        raise ConfigError("the model names an encoder of a hub", where, name, remedy)
    return bool(text.get("hf_tokenizer_name"))


def verify(folder: str) -> None:
    """Compare an exported folder with the sizes and checksums in its export.json; other folders have none.

    A changed file in EDITABLE is logged. Raises DataError if another file differs or is missing.
    """
    if not export_record.is_export(Path(folder)):
        return
    mark = export_record.read_export(Path(folder))
    files = mark.record["files"]
    editable = {name: values for name, values in files.items() if name in EDITABLE}
    try:
        verify_files(
            SavedCheckpoint(mark.path, {**mark.record, "files": {n: files[n] for n in files if n not in editable}})
        )
    except CorruptCheckpoint as error:
        remedy = "Copy the folder again, all files of it, or export again."
        raise DataError(f"the export is damaged: {error}", folder, remedy=remedy) from error
    try:
        verify_files(SavedCheckpoint(mark.path, {**mark.record, "files": editable}))
    except CorruptCheckpoint as error:
        log.warning("%s: edited since the export, or damaged: %s", folder, error)


def refuse_another(subject: RunDir, folder: str) -> None:
    """Raises ConfigError if ``subject`` is the directory of another run or model."""
    if not subject.config.exists() or read_yaml(subject.config) == _settings(folder):
        return
    remedy = "Choose another name with --save-as."
    if not subject.identity.exists():
        remedy += " No score of that model was stored yet: to use the name, delete the folder."
    raise ConfigError("is the directory of another run or model", subject.path, remedy=remedy)


def claim(subject: RunDir, folder: str) -> None:
    """Reserve a run directory for the scores of a model, before its job exists: of two models the first gets it.

    Until ``register`` the directory is no run. Raises as ``refuse_another``.
    """
    run_folder(subject.path)
    create_text(subject.config, dump_yaml(_settings(folder)))
    refuse_another(subject, folder)


def register(subject: RunDir, folder: str) -> None:
    """Make the run directory of a scored model: complete, with its scores only. Raises as ``refuse_another``."""
    claim(subject, folder)
    if subject.is_complete():
        return
    settings = _settings(folder)
    result = {"run": subject.name, "stage": PUBLISHED, "samples": 0, "evaluations": [], "attempts": 0}
    record = {"hash": identity.digest(settings), "schema": RUN_NUMBER, "code": "", "config": settings}
    write_json(subject.identity, record)
    create_json(subject.result, result)


def _settings(folder: str) -> dict[str, dict[str, str]]:
    """config.yaml of a model that was not trained here."""
    return {"model": {"open_clip": folder}}


def verified_digest(folder: str) -> str:
    """SHA-256 over the files of a folder, after ``check`` and ``verify``."""
    check(folder)
    verify(folder)
    text = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        text.update(f"{path.name} {sha256(path)}\n".encode())
    return text.hexdigest()
