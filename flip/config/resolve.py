"""Replaces every ``auto`` of a configuration by a value, once, at submission (docs/contracts.md, Configuration).

The resolved values are stored in config.yaml and are part of the run's config hash. ``dataset_facts`` reads what
``resolve_auto`` needs from manifests. No torch: a login node has none.
"""

import contextlib
import copy
import itertools
import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flip.common.cache import cache_root
from flip.common.host import Host
from flip.common.image_formats import is_image_name
from flip.config.derived import WEIGHT_TOLERANCE, allocate_lanes, buffer_bytes, weight_error, world_size
from flip.config.schema import Compute, Config, Data, DataSet, walk_fields
from flip.config.validate import check_fields
from flip.config.weights import WeightFacts, check_facts, read_facts, refuse_unfit
from flip.runs import formats
from flip.runs.errors import ConfigError, DataError, PermissionDenied, read_error
from flip.runs.records import MANIFEST_LIMIT
from flip.runs.rundir import read_record

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".pq")
"""Names of tables that `shards make` reads."""
LOOKED_AT = 200
"""Most entries of a folder that are examined to recognise images."""
MAX_LANES = 4096
"""Most lanes that ``auto`` chooses."""
MAX_CHUNK = 256
"""Most samples of a chunk by default."""
MIN_CHUNKS = 4096
"""Fewest chunks of a data set by default, unless a chunk of one sample gives fewer."""
CPU_TILE = 1024
"""``compute.loss_tile`` on a CPU, where more columns are not faster (benchmarks/loss.py)."""
TILE_VALUES = 2**23
"""Logits of a tile on CUDA, where smaller tiles launch more kernels: 2,610 per step at b = 128 and B = 65,536."""
MACHINE_DEPENDENT = (
    ("data", "lanes"), ("compute", "precision"), ("compute", "attention"), ("compute", "threads"),
    ("compute", "compile"), ("compute", "replicate"), ("compute", "loss_tile"),
)  # fmt: skip
"""Fields of the config hash that an existing run keeps if the configuration leaves them to ``auto``: those that depend
on the machine, and those whose ``auto`` is newer than some runs."""
DEMONSTRATION = tuple(f"cache:emoji/{name}" for name in ("train", "noto-v1", "twemoji", "openmoji", "unseen"))
"""The manifests of the quickstart, which flip demo_data creates."""


@dataclass(frozen=True)
class DatasetFacts:
    """The facts about a data set that planning needs. ``nominal``: from the configuration, without a manifest."""

    dataset_size: int
    """N, samples."""
    chunk: int
    mean_bytes: float
    nominal: bool
    weights: WeightFacts | None = None
    """Of ``data.weights``."""


def resolve_auto(config: Config, on: Host, data: Sequence[DatasetFacts]) -> Config:
    """Return a copy without ``auto``: paths, compute, R, L, workers, threads, and N and mean bytes of ``data``.

    ``on``: a node that ranks run on. Raises ConfigError for a value out of its range, and if ``data.chunk`` is not that
    of the manifest.
    """
    check_fields(config)
    config = copy.deepcopy(config)
    for _, owner, field, value in walk_fields(config):
        if "path" in field.metadata:
            setattr(owner, field.name, resolve_path(value))
    section = config.data
    members: Sequence[Data | DataSet] = section.sets or [section]
    for member, facts in zip(members, data, strict=True):
        if member.chunk not in (0, facts.chunk):
            if isinstance(member, DataSet):
                key = f"data.sets.{member.name}.chunk"
            else:
                key = "data.chunk"
            what = f"{key}: the manifest's chunks hold {facts.chunk} samples"
            remedy = f"Leave it out, or index the shards again with --chunk {member.chunk}."
            raise ConfigError(what, value=member.chunk, remedy=remedy)
        member.samples = facts.dataset_size
        member.sample_bytes = round(facts.mean_bytes)
        member.chunk = facts.chunk
    config.resources.hours = config.resources.hours or on.hours
    fewest = config.resources.least_nodes or config.resources.nodes
    section.buffer = section.buffer or on.memory // 4 * fewest
    if section.lanes == 0 and config.stages:
        section.lanes = default_lanes(config, data, section.buffer)
    if data[0].weights:
        for stage in config.stages:
            refuse_unfit(data[0].weights, section.weights, section.lanes, section.block, stage.batch)
    if section.sets:
        section.samples = sum(dataset.samples for dataset in section.sets)
        if not any(dataset.lanes for dataset in section.sets):
            lanes = allocate_lanes(section.lanes, [dataset.weight for dataset in section.sets])
            for dataset, count in zip(section.sets, lanes, strict=True):
                dataset.lanes = count
    if section.decoder == "auto":
        section.decoder = "simplejpeg"
    if section.resize == "auto":
        section.resize = "torchvision"
    _resolve_compute(config, on)
    return config


def resolve_arithmetic(compute: Compute, fast_bf16: bool) -> None:
    """Resolve ``auto`` values of precision, attention and determinism for ``compute.device``, cpu or cuda.

    ``fast_bf16``: whether the processor is fast at bf16.
    """
    cuda = compute.device == "cuda"
    if compute.precision == "auto":
        compute.precision = "bf16" if cuda or fast_bf16 else "fp32"
    if compute.attention == "auto":
        if cuda or compute.precision == "fp32":
            compute.attention = "sdpa"
        else:
            compute.attention = "explicit"
    if compute.deterministic == "auto":
        compute.deterministic = "no" if cuda else "yes"


def inherit_machine_fields(config: Config, stored: Config) -> Config:
    """Return a copy whose unresolved MACHINE_DEPENDENT fields have the values of ``stored``, a resolved one."""
    config = copy.deepcopy(config)
    for section, name in MACHINE_DEPENDENT:
        owner = getattr(config, section)
        if getattr(owner, name) in ("auto", 0):
            setattr(owner, name, getattr(getattr(stored, section), name))
    return config


def dataset_facts(config: Config, nominal: bool = True) -> list[DatasetFacts]:
    """The facts of each training data set, from its manifest, or if it has none from the configuration.

    ``nominal``: accept facts from the configuration. Raises ConfigError if no data set is given, and DataError if a
    manifest is missing and the configuration has no facts.
    """
    data = config.data
    if not data.sets:
        facts = _read_facts(data, "data", nominal)
        if not data.weights:
            return [facts]
        path = resolve_path(data.weights)
        weights = read_facts(path)
        record = manifest_record(data.manifest) or {}
        check_facts(weights, path, facts.dataset_size, facts.chunk, record.get("digest", ""))
        return [replace(facts, weights=weights)]
    if data.weights:
        remedy = "Index all shards into one manifest (flip shards index --add), or leave data.weights out."
        raise ConfigError("data.weights: several data sets (data.sets) have none", value=data.weights, remedy=remedy)
    if data.manifest or data.chunk:
        remedy = "Set data.manifest to '' and data.chunk to 0, and give all data sets in data.sets."
        raise ConfigError("data.sets: data.manifest or data.chunk is given too", value=data.manifest, remedy=remedy)
    return [_read_facts(dataset, f"data.sets.{dataset.name}", nominal) for dataset in data.sets]


def default_chunk(samples: int) -> int:
    """R: the largest power of two <= 256 that leaves at least 4096 chunks, else 1."""
    chunk = MAX_CHUNK
    while chunk > 1 and samples // chunk < MIN_CHUNKS:
        chunk //= 2
    return chunk


def default_lanes(config: Config, data: Sequence[DatasetFacts], buffer: int) -> int:
    """L: the largest number <= 4096 that divides every B, is a multiple of W, and fits the data and the buffer.

    With weights, no views of a sample may share a batch. Each of several data sets must get at least one lane, and its
    weight within WEIGHT_TOLERANCE. If no number fits, L is W, and ``validate`` reports what to change.
    """
    ranks = world_size(config)
    common = math.gcd(*(stage.batch for stage in config.stages))
    block = config.data.block
    weights = [dataset.weight for dataset in config.data.sets] or [1.0]
    for lanes in range(min(MAX_LANES, common) // ranks * ranks, 0, -ranks):
        if common % lanes:
            continue
        parts = list(zip(allocate_lanes(lanes, weights), data, strict=True))
        fits = all(0 < 2 * count * block <= facts.dataset_size // facts.chunk for count, facts in parts)
        size = sum(buffer_bytes(count, block, facts.chunk, facts.mean_bytes) for count, facts in parts)
        fits = fits and not any(
            facts.weights and facts.weights.why_unfit(lanes, block, stage.batch)
            for facts in data
            for stage in config.stages
        )
        if fits and size <= buffer and weight_error([count for count, _ in parts], weights) <= WEIGHT_TOLERANCE:
            return lanes
    return ranks


def resolve_path(path: str) -> str:
    """An absolute path: ``cache:NAME`` is in the cache, other relative paths are in the working directory. URLs stay.

    Raises ConfigError for an invalid path.
    """
    if not path or "://" in path:
        return path
    if "\0" in path:
        raise ConfigError("a path cannot contain NUL", value=path)
    if path.startswith("cache:"):
        return str(cache_root() / path.removeprefix("cache:"))
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:  # ~USER
        raise ConfigError(
            "the path starts with the home of an unknown user", value=path, remedy="Write it out."
        ) from error


def depends_on_folder(config: Config) -> bool:
    """Whether a merged configuration, before ``resolve_auto``, names a file by a path from the working directory."""
    values = [value for _, _, field, value in walk_fields(config) if "path" in field.metadata]
    values.append(config.init.export)
    return any(map(is_relative, values)) or is_relative_profile(config.resources.cluster)


def is_relative_profile(cluster: str) -> bool:
    """Whether a cluster is given by the path of its profile from the working directory, not by its name."""
    return cluster.endswith((".yaml", ".yml")) and is_relative(cluster)


def is_relative(path: str) -> bool:
    """Whether ``resolve_path`` starts at the working directory."""
    return bool(path) and "://" not in path and not path.startswith(("/", "~", "cache:"))


def manifest_record(folder: str) -> dict[str, Any] | None:
    """manifest.json of a manifest's folder, or None.

    Raises FormatError if another version wrote it, DataError if it is damaged or too large, PermissionDenied, or the
    error of ``read_error``.
    """
    path = Path(resolve_path(folder)) / "manifest.json"
    remedy = "Build it again: flip shards index"
    if not folder or "://" in folder:
        return None
    try:
        record = read_record(path, {}, MANIFEST_LIMIT)
    except NotADirectoryError:
        return None
    except PermissionError as error:
        raise PermissionDenied("may not be read", str(path), remedy="Ask its owner for read permission.") from error
    except OSError as error:
        raise read_error(error, "the manifest cannot be read", path) from error
    except ValueError as error:
        raise DataError(f"the manifest is damaged: {error}", remedy=remedy) from error
    if record is None:
        return None
    formats.check(formats.MANIFEST, record, path)
    if not {"samples", "chunk", "mean_bytes", "digest"} <= record.keys():
        raise DataError("is damaged: samples, chunk, mean_bytes or digest is missing", str(path), remedy=remedy)
    return record


def source_remedy(path: str) -> str:
    """The remedy if ``path`` has tars, images or a table of images in place of a manifest; empty if it has none."""
    tars = path if path.endswith(".tar") else ""
    is_source = is_image_name(path) or Path(path).suffix.lower() in TABLES
    if not is_source and not tars and "://" not in path:
        with contextlib.suppress(OSError):
            for file in _files_below(path):
                if file.endswith(".tar"):
                    tars = os.path.join(os.path.dirname(file), "*.tar")
                    break
                is_source |= is_image_name(file)
    if tars:
        return f"Index the shards: flip shards index {shlex.quote(tars)} --out data/manifest"
    if is_image_name(path):
        path = os.path.dirname(path) or "."
    if is_source:
        return f"Make shards and a manifest of it: flip shards make {shlex.quote(path)} --out data/mine"
    return ""


def _resolve_compute(config: Config, on: Host) -> None:
    """Resolve ``auto`` values of ``compute`` and ``data.workers`` in place; lanes are resolved already."""
    compute = config.compute
    data = config.data
    resources = config.resources
    cuda = compute.device == "cuda" or (compute.device == "auto" and resources.gpus > 0)
    compute.device = "cuda" if cuda else "cpu"
    resolve_arithmetic(compute, on.bf16)
    if compute.compile == "auto":
        compute.compile = "yes" if cuda else "no"
    if compute.replicate == 0:
        compute.replicate = resources.nodes if cuda else 1
    if compute.reshard == "auto":  # a plan that knows the memory of the GPUs may change it
        if cuda and world_size(config) > 1:
            compute.reshard = "no"
        else:
            compute.reshard = "yes"
    if compute.loss_tile == 0:
        if cuda:
            compute.loss_tile = _loss_tile(config)
        else:
            compute.loss_tile = CPU_TILE
    if data.workers < 0:
        data.workers = min(8 if cuda else 1, max(1, data.lanes // world_size(config)))
    if compute.threads == 0:
        # With GPUs the CPU does little, and the number must not depend on the login node that resolves it.
        cores = resources.cpus or on.cores // max(1, resources.processes)
        if cuda:
            compute.threads = 4
        else:
            compute.threads = max(1, cores - data.workers)


def _loss_tile(config: Config) -> int:
    """A power of two of columns, so that TILE_VALUES logits of a rank fill a tile; at least as many as on a CPU."""
    local = max((stage.batch for stage in config.stages), default=1) // world_size(config)
    return max(CPU_TILE, 2 ** int(math.log2(TILE_VALUES / max(1, local))))


def _files_below(folder: str) -> Iterator[str]:
    """Some files of a folder and of its first subfolder: images often lie in a folder per class.

    Raises OSError.
    """
    folders = []
    with os.scandir(folder) as entries:
        for entry in itertools.islice(entries, LOOKED_AT):
            if entry.is_dir():
                folders.append(entry.path)
            else:
                yield entry.path
    for inner in folders[:1]:
        with os.scandir(inner) as entries:
            yield from (entry.path for entry in itertools.islice(entries, LOOKED_AT))


def _read_facts(data: Data | DataSet, key: str, nominal: bool) -> DatasetFacts:
    """``dataset_facts`` of one data set. ``key``: its section, for errors."""
    record = manifest_record(data.manifest)
    if record is not None:
        mean = float(record["mean_bytes"])
        return DatasetFacts(int(record["samples"]), int(record["chunk"]), mean, False)
    if data.samples and nominal:
        chunk = data.chunk or default_chunk(data.samples)
        return DatasetFacts(data.samples, chunk, float(data.sample_bytes), True)
    if not data.manifest:
        remedy = f"Give the folder of a manifest (flip shards index), or {key}.samples to plan without data."
        raise ConfigError(f"{key}.manifest: no data set is given", remedy=remedy)
    if source := source_remedy(resolve_path(data.manifest)):
        raise DataError("no manifest, but data to make one from", resolve_path(data.manifest), remedy=source)
    if data.samples:
        plan = "--dry-run plans without them."
    else:
        plan = f"To plan without them, set {key}.samples."
    if os.path.normpath(data.manifest) in DEMONSTRATION:
        remedy = "Fetch the demonstration data: flip demo_data"
    elif data.manifest.startswith("cache:"):
        remedy = "Index the shards, with this folder as --out: flip shards index. Which shards: the sweep's"
        remedy += f" head or docs/reproduce.md lists them. {plan}"
    else:
        remedy = f"Index the shards first: flip shards index. {plan}"
        if is_relative(data.manifest):
            remedy = f"{key}.manifest {data.manifest} is relative to the current folder. {remedy}"
    raise DataError("no manifest in this folder", resolve_path(data.manifest), remedy=remedy)
