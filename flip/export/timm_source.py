"""A ViT of timm as the source of the first weights of a run's image encoder: its architecture as fields of ``Model``.

``init.export`` may name a folder as timm saves it (``config.json``, ``model.safetensors``), such as ``timm/`` of an
export, or a local safetensors file with timm's names. The text encoder, the projections and the logit scale keep their
fresh weights. No torch: submission compares the fields with those of the run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from flip.checkpoint import export_record
from flip.config.schema import Config
from flip.files.creation import read_regular
from flip.runs.checkpoint_folder import sha256
from flip.runs.errors import ConfigError, DataError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CONFIG_LIMIT = 1 << 20
"""Bytes of config.json; real ones have one or two kB."""
CLASSIFIER = "head."
"""Start of the names of the classifier, which is left out."""
_BLOCK = re.compile(r"blocks\.(\d{1,9})\.")
_PARTS = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_POOLS = {"token": "class", "avg": "patches", "map": "attention"}
_QK_NORMS = ("attn.q_norm", "attn.k_norm")
_ATTENTION_POOL = "attn_pool."
"""Start of the names of pooling by attention; its parts follow."""
_POOL_PARTS = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
TABLE_TOLERANCE = 1e-4
"""Largest difference of positions from the fixed table, whose values are at most 1."""
FRESH = "the text encoder, the projections and the logit scale start with fresh weights"


@dataclass(frozen=True)
class TimmWeights:
    """The tensors of a file by name, without their values."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    described: Mapping[str, Any]
    """config.json; empty for a single file."""


def is_timm(path: Path) -> bool:
    """Whether a path is a model folder of timm, or a file of safetensors."""
    if path.is_file():
        return path.suffix == ".safetensors"
    if not all((path / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        return False
    try:
        return "architecture" in json.loads(read_regular(path / CONFIG_FILE, CONFIG_LIMIT).decode("utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def weights_file(path: Path) -> Path:
    """The file of the weights of a source."""
    if path.is_file():
        return path
    return path / WEIGHTS_FILE


def digest(path: Path) -> str:
    """16 hex digits over the files of a source. Raises OSError."""
    if path.is_file():
        files = [path]
    else:
        files = [path / CONFIG_FILE, path / WEIGHTS_FILE]
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()[:16]


def source_config(path: Path, like: Config) -> Config:
    """``like`` with the image encoder of the source; what the source does not tell is as in ``like``.

    Raises ConfigError with the part of the model that this toolkit lacks, DataError if the weights cannot be read.
    """
    source = _read(path)
    _refuse_other_parts(source, like.model.image.tower)
    shapes = source.shapes
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    positions = shapes["pos_embed"][1]
    learned = like.model.image.positions == "learned"
    grid = _grid(source, positions, learned)
    if not learned:
        _refuse_other_table(source, grid, width)
    arguments = source.described.get("model_args") or {}
    image = replace(
        like.model.image,
        size=grid * patch,
        patch=patch,
        width=width,
        layers=_layers(shapes),
        heads=int(arguments.get("num_heads") or like.model.image.heads),
        pool=_pool(source, like.model.image.pool),
        norm_pre="norm_pre.weight" in shapes,
        registers=_registers(shapes),
        qk_norm=f"blocks.0.{_QK_NORMS[0]}.weight" in shapes,
    )
    activation = _ACTIVATIONS.get(str(arguments.get("act_layer")), like.model.activation)
    model = replace(like.model, image=image, activation=activation, norm_eps=_eps(source, like.model.norm_eps))
    preprocess = source.described.get("pretrained_cfg") or {}
    augment = replace(
        like.augment,
        mean=list(preprocess.get("mean") or like.augment.mean),
        std=list(preprocess.get("std") or like.augment.std),
    )
    return replace(like, model=model, augment=augment)


def note(path: str) -> str:
    """What a plan says about a run that starts from the source at ``path``; empty for other sources."""
    if not path or not is_timm(Path(path)) or export_record.is_export(Path(path)):
        return ""
    heads = ""
    if Path(path).is_file():
        heads = ". The file does not name its number of heads: it must be model.image.heads"
    return f"init.export: weights of timm for the image encoder; {FRESH}{heads}"


def _read(path: Path) -> TimmWeights:
    file = weights_file(path)
    export_record.check_header(file)
    try:
        with safe_open(file, framework="np") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(f"the weights cannot be read: {error}", file, remedy="Copy the file again.") from error
    described = {}
    if not path.is_file():
        described = _described(path / CONFIG_FILE)
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:  # its other sizes could be any numbers
        raise DataError(f"the tensor {empty[0]} is empty", file, shapes[empty[0]], "Copy the file again.")
    encoder = {name: shape for name, shape in shapes.items() if not name.startswith(CLASSIFIER)}
    return TimmWeights(file, encoder, described)


def _described(path: Path) -> dict[str, Any]:
    """config.json, whose parts are objects. Raises DataError."""
    try:
        described = json.loads(read_regular(path, CONFIG_LIMIT).decode("utf-8"))
        for name in ("model_args", "pretrained_cfg"):
            dict(described.get(name) or {})
        int((described.get("model_args") or {}).get("num_heads") or 0)
        return dict(described)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"is no configuration of timm: {type(error).__name__} {error}", path) from error


def _registers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    if "reg_token" in shapes:
        return shapes["reg_token"][-2]
    return 0


def _more_parts(shapes: Mapping[str, tuple[int, ...]]) -> tuple[set[str], set[str]]:
    """(names of tensors, parts of blocks) that the tower ``timm`` has beside those of ``flip``, as far as the file has
    them."""
    names = {"reg_token"} & shapes.keys()
    if any(name.startswith(_ATTENTION_POOL) for name in shapes):
        stems = [f"{_ATTENTION_POOL}{part}" for part in _POOL_PARTS]
        names |= {f"{_ATTENTION_POOL}latent", *(f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias"))}
    parts = set()
    if f"blocks.0.{_QK_NORMS[0]}.weight" in shapes:
        parts = set(_QK_NORMS)
    return names, parts


def _refuse_other_parts(source: TimmWeights, tower: str) -> None:
    names, parts = set[str](), set[str]()
    if tower == "timm":
        names, parts = _more_parts(source.shapes)
    stems = ["patch_embed.proj", "norm"]
    if "norm_pre.weight" in source.shapes:
        stems.append("norm_pre")
    for number in range(max(1, _layers(source.shapes))):
        stems += [f"blocks.{number}.{part}" for part in (*_PARTS, *sorted(parts))]
    first = {"cls_token"}
    if f"{_ATTENTION_POOL}latent" in names:
        first = set()
    wanted = {*first, *names, "pos_embed", *(f"{stem}.{kind}" for stem in stems for kind in ("weight", "bias"))}
    other = sorted(source.shapes.keys() - wanted)
    if other:
        raise _lacking(f"it has {other[0]}, for which the tower {tower} has no parameter", source)
    missing = sorted(wanted - source.shapes.keys() - {"patch_embed.proj.bias"})
    if missing:
        raise _lacking(f"it has no {missing[0]}", source)
    ranks = {"cls_token": 3, "reg_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 2}
    for name, rank in ranks.items():
        if name in source.shapes and len(source.shapes[name]) != rank:
            raise _lacking(f"{name} has the shape {source.shapes[name]}", source)
    width, channels, height, side = source.shapes["patch_embed.proj.weight"]
    if channels != 3 or height != side:
        raise _lacking(f"patch_embed.proj.weight has the shape {source.shapes['patch_embed.proj.weight']}", source)
    if source.shapes["pos_embed"][2] != width:
        raise _lacking(f"pos_embed has the shape {source.shapes['pos_embed']}", source)
    if source.shapes["blocks.0.mlp.fc1.weight"] != (4 * width, width):
        raise _lacking(f"its hidden layers are not 4 times as wide as {width}", source)
    if ("patch_embed.proj.bias" in source.shapes) == ("norm_pre.weight" in source.shapes):
        raise _lacking("a patch embedding has a bias here exactly if no LayerNorm precedes the blocks", source)


def _layers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of blocks by the largest number in a name."""
    last = max((int(match[1]) for name in shapes if (match := _BLOCK.match(name))), default=-1)
    return min(last, len(shapes)) + 1  # a larger number cannot be right, and stays unknown


def _grid(source: TimmWeights, positions: int, learned: bool) -> int:
    """Patches per side. Positions are of all patches, or also of the class token, which only learned ones have here."""
    for count in (positions, positions - 1):
        grid = round(count**0.5)
        is_whole = count == positions
        if grid * grid == count and (is_whole or (learned and "reg_token" not in source.shapes)):
            return grid
    if round((positions - 1) ** 0.5) ** 2 == positions - 1:
        has = "a learned position of the class token"
    else:
        has = "no grid"
    raise _lacking(f"pos_embed has {positions} rows, {has}, and the run has fixed positions", source)


def _refuse_other_table(source: TimmWeights, grid: int, width: int) -> None:
    """Raise ConfigError if the positions are not the fixed table of ``flip.models.image_encoder.sincos``."""
    with safe_open(source.path, framework="np") as tensors:
        positions = tensors.get_tensor("pos_embed")[0].astype(np.float64)
    if np.abs(positions - _table(grid, width)).max() > TABLE_TOLERANCE:
        raise _lacking("its positions are learned, and those of the run are fixed", source)


def _table(grid: int, width: int) -> NDArray[Any]:
    angle = np.arange(grid)[:, None] * 10000.0 ** -(np.arange(width // 4) / (width / 4))
    line = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    return np.concatenate([np.tile(line, (grid, 1)), np.repeat(line, grid, axis=0)], axis=1)


def _pool(source: TimmWeights, otherwise: str) -> str:
    arguments = source.described.get("model_args") or {}
    pool = arguments.get("global_pool") or source.described.get("global_pool")
    if f"{_ATTENTION_POOL}latent" in source.shapes:
        return _POOLS["map"]
    if not pool:
        return otherwise
    if pool not in _POOLS or pool == "map":
        raise _lacking(f"global_pool is {pool}", source)
    if pool == "avg" and arguments.get("pool_include_prefix"):
        return "all"
    return _POOLS[pool]


def _eps(source: TimmWeights, otherwise: float) -> float:
    """That of timm's classes: 1e-5 for the architectures of CLIP, else 1e-6."""
    name = str(source.described.get("architecture", ""))
    if not name:
        return otherwise
    return 1e-5 if "clip" in name else 1e-6


def _lacking(why: str, source: TimmWeights) -> ConfigError:
    remedy = (
        "A ViT of timm with a class token fits: with model.image.positions: learned, or with the fixed positions of an"
        " export (docs/export.md). With model.image.tower: timm also registers, norms of queries and keys, and pooling"
        " by attention without a class token fit."
    )
    return ConfigError(f"init.export: cannot start from this model of timm, because {why}", source.path, remedy=remedy)
