"""Every ``auto`` and 0 of a configuration made concrete, once, at submission (docs/contracts.md, Configuration).

What is resolved stands in config.yaml and belongs to the run's identity. No torch: a login node has none.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flip.config.derived import WEIGHT_TOLERANCE, allocate_lanes, buffer_bytes, weight_error, world_size
from flip.config.host import Host
from flip.config.schema import Config, Data, DataSet
from flip.config.validate import check_fields
from flip.runs.errors import ConfigError, DataError, PermissionDenied

MAX_LANES = 4096
MAX_CHUNK, MIN_CHUNKS = 256, 4096
MACHINE_DEPENDENT = (("data", "lanes"), ("compute", "precision"), ("compute", "attention"), ("compute", "threads"))
"""Fields of the identity whose ``auto`` follows the machine, and not the rest of the configuration alone."""
DEMONSTRATION = tuple(f"cache:emoji/{name}" for name in ("train", "noto-v1", "twemoji", "openmoji", "unseen"))
"""The manifests that tools/demo_data.py makes."""


@dataclass(frozen=True)
class DatasetFacts:
    """What planning needs to know of a data set. ``nominal``: as the configuration claims, there is no manifest yet."""

    samples: int
    chunk: int
    mean_bytes: float
    digest: str
    nominal: bool


def cache_root() -> Path:
    """FLIP_CACHE, by default ~/.cache/flip. Raises ConfigError if the user has no home folder."""
    try:
        return Path(os.environ.get("FLIP_CACHE") or "~/.cache/flip").expanduser().absolute()
    except RuntimeError as error:
        remedy = "Name a folder for cached files: export FLIP_CACHE=FOLDER."
        raise ConfigError("the home folder of this user is not known", remedy=remedy) from error


def resolve_path(path: str) -> str:
    """An absolute path: ``cache:NAME`` lies in the cache, other relative paths in the working directory. URLs stay.

    Raises ConfigError for what can be no path.
    """
    if not path or "://" in path:
        return path
    if "\0" in path:
        raise ConfigError("a path holds no NUL", value=path)
    if path.startswith("cache:"):
        return str(cache_root() / path.removeprefix("cache:"))
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:  # ~somebody
        raise ConfigError("the path begins with the home of nobody", value=path, remedy="Write it out.") from error


def manifest_record(folder: str) -> dict[str, Any] | None:
    """manifest.json of a manifest's folder, None where there is none. Raises DataError, PermissionDenied."""
    path = Path(resolve_path(folder)) / "manifest.json"
    remedy = "Build it again: python tools/shards.py index"
    if not folder or "://" in folder:
        return None
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise PermissionDenied("may not be read", str(path), remedy="Ask its owner for read permission.") from error
    except ValueError as error:
        raise DataError("is damaged: not JSON", str(path), remedy=remedy) from error
    if not isinstance(record, dict) or not {"samples", "chunk", "mean_bytes", "digest"} <= record.keys():
        raise DataError("is damaged: samples, chunk, mean_bytes or digest is missing", str(path), remedy=remedy)
    return record


def default_chunk(samples: int) -> int:
    """R: the largest power of two <= 256 that leaves at least 4096 chunks, else 1."""
    chunk = MAX_CHUNK
    while chunk > 1 and samples // chunk < MIN_CHUNKS:
        chunk //= 2
    return chunk


def dataset_facts(config: Config, nominal: bool = True) -> list[DatasetFacts]:
    """What the manifests say of the training data, set by set, or what the configuration claims where there is none.

    ``nominal``: whether a claim will do. Raises ConfigError where no data set is named, DataError where a manifest is
    missing and nothing is claimed.
    """
    data = config.data
    if not data.sets:
        return [_facts(data, "data", nominal)]
    if data.manifest or data.chunk:
        remedy = "Set data.manifest to '' and data.chunk to 0, and name all data sets in data.sets."
        raise ConfigError("data.sets: data.manifest or data.chunk is given too", value=data.manifest, remedy=remedy)
    return [_facts(one, f"data.sets.{one.name}", nominal) for one in data.sets]


def _facts(data: Data | DataSet, key: str, nominal: bool) -> DatasetFacts:
    record = manifest_record(data.manifest)
    if record is not None:
        mean = float(record["mean_bytes"])
        return DatasetFacts(int(record["samples"]), int(record["chunk"]), mean, str(record["digest"]), False)
    if data.samples and nominal:
        chunk = data.chunk or default_chunk(data.samples)
        return DatasetFacts(data.samples, chunk, float(data.sample_bytes), "", True)
    if not data.manifest:
        remedy = f"Give the folder of a manifest (python tools/shards.py index), or {key}.samples to plan without data."
        raise ConfigError(f"{key}.manifest: no data set is named", remedy=remedy)
    plan = "--dry-run plans without them." if data.samples else f"To plan without them, set {key}.samples."
    if os.path.normpath(data.manifest) in DEMONSTRATION:
        remedy = "Fetch the demonstration data: python tools/demo_data.py"
    elif data.manifest.startswith("cache:"):
        remedy = "Index the shards, with this folder as --out: python tools/shards.py index. Which shards: the sweep's"
        remedy += f" head or docs/reproduce.md says it. {plan}"
    else:
        remedy = f"Index the shards first: python tools/shards.py index. {plan}"
    raise DataError("there is no manifest here", resolve_path(data.manifest), remedy=remedy)


def default_lanes(config: Config, data: Sequence[DatasetFacts], buffer: int) -> int:
    """L: the largest number <= 4096 that divides every B, is a multiple of W, and fits the data and the buffer.

    Of several data sets each must get its lanes. Where nothing fits it is W, and ``validate`` says what to change.
    """
    ranks, common = world_size(config), math.gcd(*(stage.batch for stage in config.stages))
    block, weights = config.data.block, [one.weight for one in config.data.sets] or [1.0]
    for lanes in range(min(MAX_LANES, common) // ranks * ranks, 0, -ranks):
        if common % lanes:
            continue
        parts = list(zip(allocate_lanes(lanes, weights), data, strict=True))
        room = all(0 < 2 * held * block <= one.samples // one.chunk for held, one in parts)
        bytes = sum(buffer_bytes(held, block, one.chunk, one.mean_bytes) for held, one in parts)
        if room and bytes <= buffer and weight_error([held for held, _ in parts], weights) <= WEIGHT_TOLERANCE:
            return lanes
    return ranks


def _paths(config: Config) -> Iterator[tuple[Any, str]]:
    """The (object, field) pairs that hold paths."""
    yield config.data, "manifest"
    yield config.data, "tokenizer"
    yield config.data, "cache"
    for one in config.data.sets:
        yield one, "manifest"
    for dataset in config.evaluate.sets:
        yield dataset, "manifest"
        yield dataset, "classes"
        yield dataset, "train"


def _compute(config: Config, on: Host) -> None:
    compute, data, resources = config.compute, config.data, config.resources
    cuda = compute.device == "cuda" or (compute.device == "auto" and resources.gpus > 0)
    compute.device = "cuda" if cuda else "cpu"
    if compute.precision == "auto":
        compute.precision = "bf16" if cuda or on.bf16 else "fp32"
    if compute.attention == "auto":
        compute.attention = "sdpa" if cuda or compute.precision == "fp32" else "explicit"
    if compute.deterministic == "auto":
        compute.deterministic = "no" if cuda else "yes"
    if data.workers < 0:
        data.workers = min(8 if cuda else 1, max(1, data.lanes // world_size(config)))
    if compute.threads == 0:
        # On GPUs little is left to the CPU, and the number must not follow the login node that resolves it.
        cores = resources.cpus or on.cores // max(1, resources.processes)
        compute.threads = 4 if cuda else max(1, cores - data.workers)


def inherit_machine_fields(config: Config, stored: Config) -> Config:
    """A copy in which those of OF_MACHINE that were left ``auto`` (or 0) are as in ``stored``, a resolved one."""
    config = copy.deepcopy(config)
    for section, name in MACHINE_DEPENDENT:
        owner = getattr(config, section)
        if getattr(owner, name) in ("auto", 0):
            setattr(owner, name, getattr(getattr(stored, section), name))
    return config


def resolve(config: Config, on: Host, data: Sequence[DatasetFacts]) -> Config:
    """A copy without ``auto``: paths, compute, R, L, workers, threads. N and the mean bytes are those of ``data``.

    ``on`` describes a node that ranks run on, ``data`` the data sets. Raises ConfigError for a value out of its range,
    and where ``data.chunk`` is not the manifest's.
    """
    check_fields(config)
    config = copy.deepcopy(config)
    for owner, name in _paths(config):
        setattr(owner, name, resolve_path(getattr(owner, name)))
    ours = config.data
    members: Sequence[Data | DataSet] = ours.sets or [ours]
    for one, found in zip(members, data, strict=True):
        if one.chunk not in (0, found.chunk):
            key = f"data.sets.{one.name}.chunk" if isinstance(one, DataSet) else "data.chunk"
            remedy = f"Leave it out, or index the shards again with --chunk {one.chunk}."
            what = f"{key}: the manifest's chunks hold {found.chunk} samples"
            raise ConfigError(what, value=one.chunk, remedy=remedy)
        one.samples, one.sample_bytes, one.chunk = found.samples, round(found.mean_bytes), found.chunk
    ours.buffer = ours.buffer or on.memory // 4 * config.resources.nodes
    if ours.lanes == 0 and config.stages:
        ours.lanes = default_lanes(config, data, ours.buffer)
    _mix(ours)
    ours.decoder = "simplejpeg" if ours.decoder == "auto" else ours.decoder
    ours.resize = "torchvision" if ours.resize == "auto" else ours.resize
    _compute(config, on)
    return config


def _mix(data: Data) -> None:
    """Of several data sets: their lanes, and N as their sum."""
    if not data.sets:
        return
    data.samples = sum(one.samples for one in data.sets)
    if not any(one.lanes for one in data.sets):
        for one, lanes in zip(data.sets, allocate_lanes(data.lanes, [one.weight for one in data.sets]), strict=True):
            one.lanes = lanes
