"""Everything that can be known to be wrong before a job is queued: data, tokenizer, paths, space, memory (design 1, 3).

A check that fails raises the error that the job would have died of. What cannot be looked at from here (a nominal data
set, a cluster's file system) is returned as skipped, so that a plan can say so.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from flip import flops
from flip.config.resolve import DataFacts, Host
from flip.config.schema import Config, Stage
from flip.config.stages import world
from flip.data.manifest import Manifest
from flip.data.reader import Reader
from flip.exitcodes import ConfigError, DataError, PermissionDenied, StorageError
from jobs.cluster import Profile
from jobs.disk import ELSEWHERE, unwritable
from jobs.table import count, size

STATE_BYTES = 12
"""Of a checkpoint per parameter: the weight and two moments, fp32."""

SHARDS_LOOKED_AT = 2000
"""At most; of more, evenly spread ones."""


@dataclass(frozen=True)
class Check:
    """One thing looked at and found right, or ``skipped``; ``detail`` says what was seen, or why not."""

    name: str
    detail: str
    skipped: bool = False


def check(config: Config, data: DataFacts, profile: Profile, on: Host, folder: Path) -> list[Check]:
    """All checks of a resolved run that will live below ``folder``. The first that fails raises its FlipError.

    ``on`` is the node that ranks run on. Looks at files and leaves none behind.
    """
    return [
        _data(config, data),
        _tokenizer(config, data),
        *_evaluations(config, data),
        _machine(config, profile, on),
        _memory(config, profile, on),
        _writable(profile, folder),
        _space(config, profile, folder),
    ]


def _data(config: Config, data: DataFacts) -> Check:
    if data.nominal:
        return Check("data set", f"the {count(data.samples)} samples are nominal: there is no manifest yet", True)
    return Check("data set", _look_at(config.data.manifest))


@lru_cache(maxsize=64)
def _look_at(folder: str) -> str:
    """Load a manifest, read its first chunk and compare the shards' sizes. Raises DataError, PermissionDenied."""
    manifest = Manifest.load(folder)
    shards = len(manifest.keys)
    for i in range(0, shards, max(1, shards // SHARDS_LOOKED_AT)):
        key, expected = manifest.keys[i], int(manifest.shards[i, 1])
        try:
            found = os.stat(key).st_size
        except FileNotFoundError:
            raise DataError("the shard is missing", key, remedy="Restore it, or index the others again.") from None
        except PermissionError:
            raise PermissionDenied("the shard may not be read", key, remedy="Grant read access to it.") from None
        if found != expected:
            remedy = "It is not the file that was indexed: restore it, or index the shards again."
            raise DataError(f"the shard has {found} bytes, indexed were {expected}", key, remedy=remedy)
    Reader(deadline=10.0).read_chunk(manifest, 0)
    return f"{manifest.samples:,} samples in {shards:,} shards, {folder}"


def _tokenizer(config: Config, data: DataFacts) -> Check:
    path = config.data.tokenizer
    if data.nominal and not (path and Path(path).exists()):
        return Check("tokenizer", f"{path or 'none is named'}: not on this machine", True)
    pieces, rows = _tokenizer_size(path), config.model.text.vocabulary
    if pieces > rows:
        what = f"the tokenizer has {pieces} pieces, the model {rows} rows"
        raise ConfigError(what, path, remedy=f"Set model.text.vocabulary to {pieces}, or take a smaller tokenizer.")
    return Check("tokenizer", f"{pieces:,} pieces, {path}")


@lru_cache(maxsize=16)
def _tokenizer_size(path: str) -> int:
    from flip.tokenizer import Tokenizer

    return Tokenizer(path, 32, True).size


def _evaluations(config: Config, data: DataFacts) -> list[Check]:
    checks = []
    for item in config.evaluate.sets:
        name = f"evaluation set {item.name}"
        if data.nominal and not (Path(item.manifest) / "manifest.json").exists():
            checks.append(Check(name, f"{item.manifest}: not on this machine", True))
            continue
        classes = _classes(item.classes)
        checks.append(Check(name, f"{_look_at(item.manifest)}; {classes} classes"))
    return checks


@lru_cache(maxsize=64)
def _classes(path: str) -> int:
    """The number of classes in a classes.json. Raises DataError, PermissionDenied."""
    try:
        record: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DataError("there is no such file of class names", path) from None
    except PermissionError:
        raise PermissionDenied("may not be read", path, remedy="Grant read access to it.") from None
    except ValueError as error:
        raise DataError(f"not JSON: {error}", path) from None
    remedy = 'Write {"names": ["cat", ...], "templates": ["a picture of {}", ...]}.'
    names, templates = (record.get(key) for key in ("names", "templates")) if isinstance(record, dict) else (None, None)
    if not isinstance(names, list) or not isinstance(templates, list) or not names or not templates:
        raise DataError("needs names and templates", path, remedy=remedy)
    if any(not isinstance(template, str) or "{}" not in template for template in templates):
        raise DataError("a template needs {} for the name", path, remedy=remedy)
    return len(names)


def _machine(config: Config, profile: Profile, on: Host) -> Check:
    """GPUs must be there; too few cores only make it slow, and are said."""
    resources = config.resources
    if profile.kind == "local" and resources.nodes > 1:
        raise ConfigError("resources.nodes: this machine is one node", value=resources.nodes, remedy="Set it to 1.")
    if resources.gpus and profile.kind == "local" and not on.cuda:
        raise ConfigError(
            "resources.gpus: no NVIDIA driver on this machine", value=resources.gpus, remedy="Set it to 0."
        )
    if profile.gpus_per_node and resources.gpus > profile.gpus_per_node:
        what = f"resources.gpus: a node of {profile.name} has {profile.gpus_per_node}"
        raise ConfigError(what, value=resources.gpus)
    if resources.hours > profile.hours:
        what = f"resources.hours: an attempt on {profile.name} may last {profile.hours:g} h"
        raise ConfigError(what, value=resources.hours, remedy="Ask for less: a run goes on in the next attempt.")
    wanted = resources.processes * (config.compute.threads + config.data.workers)
    verdict = "" if wanted <= on.cores else ": more than there are, so it will be slow"
    return Check("cores", f"{wanted} threads and loader processes on {on.cores} cores a node{verdict}")


def _memory(config: Config, profile: Profile, on: Host) -> Check:
    """The largest stage's estimate against the host's memory; a card's memory is in no profile."""
    if config.resources.gpus:
        return Check("GPU memory", "the profile does not say what a card has", True)
    ranks, compute = world(config), config.compute

    def rank(stage: Stage) -> int:
        local = stage.batch // ranks
        return flops.memory(config.model, local, stage.mask, compute.precision, ranks, compute.attention)["total"]

    needed = max(map(rank, config.stages)) * config.resources.processes
    if needed > on.memory:
        what = f"about {size(needed)} of memory are needed on a node that has {size(on.memory)}"
        raise ConfigError(what, remedy="Lower the batch, or spread it over more nodes.")
    return Check("memory", f"about {size(needed)} of {size(on.memory)} a node")


def _here(profile: Profile, folder: Path) -> Path | None:
    """The nearest folder that exists; None where a cluster's file system is not on this machine."""
    above = [path for path in (folder, *folder.parents) if path.is_dir()]
    return above[0] if above and (profile.kind == "local" or folder.parent.exists()) else None


def _writable(profile: Profile, folder: Path) -> Check:
    """Create, rename and delete a probe where the runs will live."""
    place = _here(profile, folder)
    if place is None:
        return Check("runs root", f"{folder.parent}: not on this machine", True)
    probe = place / f".probe.{os.getpid()}"
    blocking = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if blocking is not None:
        raise ConfigError("a file is where a folder must be", str(blocking), remedy=ELSEWHERE)
    try:
        probe.touch()
        probe.rename(probe.with_suffix(".moved"))
        probe.with_suffix(".moved").unlink()
    except OSError as error:
        raise unwritable(error, place) from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return Check("runs root", f"{folder.parent}: files can be created, renamed and deleted")


def _space(config: Config, profile: Profile, folder: Path) -> Check:
    """Room for the checkpoints of one run: those kept, the last of every stage, and the one being written."""
    place = _here(profile, folder)
    if place is None:
        return Check("free space", f"{folder.parent}: not on this machine", True)
    held = config.checkpoint.keep + len(config.stages) + 1
    needed = STATE_BYTES * flops.parameters(config.model)["total"] * held
    free = shutil.disk_usage(place).free
    if needed > free:
        what = f"{size(free)} are free, up to {held} checkpoints of one run need {size(needed)}"
        raise StorageError(what, str(place), remedy=f"Free space there. {ELSEWHERE}")
    return Check("free space", f"{size(needed)} for checkpoints of {size(free)} free")
