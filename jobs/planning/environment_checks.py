"""What the container of a profile sees of the host, and whether that is all that a run reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePath

from flip.config.resolve import cache_root
from flip.config.schema import Config
from flip.config.sets import shares
from flip.data.manifest.manifest import MARK, Manifest
from flip.data.storage.base import is_remote
from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import Profile
from jobs.slurm.batch_script import mounts

ITS_OWN = ("~", "/tmp", "/var/tmp")
"""What apptainer binds, unless the site has it otherwise. Pyxis binds nothing by itself."""
MOST = 4
"""Folders that are named one by one."""


def check(config: Config, profile: Profile, sweep: Path, plan: bool = False) -> list[tuple[str, str, bool]]:
    """(name, what was seen, whether it could not be looked at), where the profile has a container.

    ConfigError where it hides what a resolved run reads: each of its jobs would end for that. ``plan``: a dry run
    without data, made wherever a person sits, where that is only said.
    """
    if profile.kind != "slurm" or not profile.container:
        return []
    seen = _seen(profile, sweep)
    hidden = dict[str, str]()
    for key, path in reads(config):
        if place := _hidden(path, seen):
            hidden.setdefault(place, key)
    if not hidden:
        return [("container", f"sees all that is read, in {', '.join(seen)}", False)]
    place, key = next(iter(hidden.items()))
    what = f"{key} leads there, where the container of the profile {profile.name} sees nothing"
    error = ConfigError(what, place, remedy=f"Add to its container_mounts, at the same path: {_folders(hidden)}.")
    if plan:
        return [("container", str(error).rstrip("."), True)]
    raise error


def reads(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of what ranks read, and the folders of shards where their manifest is here."""
    for one in shares(config.data):
        yield from _set(f"data.sets.{one.name}.manifest" if one.name else "data.manifest", one.manifest)
    yield "data.tokenizer", config.data.tokenizer
    for item in config.evaluate.sets:
        yield from _set(f"evaluate.sets.{item.name}.manifest", item.manifest)
        yield from _set(f"evaluate.sets.{item.name}.train", item.train)
        yield f"evaluate.sets.{item.name}.classes", item.classes
    yield "init.run", config.init.run
    yield "init.export", config.init.export


def _set(key: str, folder: str) -> Iterator[tuple[str, str]]:
    yield key, folder
    if folder and Path(folder, MARK).is_file():
        yield from ((f"{key}, by its shards,", place) for place in _places(folder))


@lru_cache(maxsize=64)
def _places(manifest: str) -> Sequence[str]:
    """The folders of its shards that are files."""
    return list(dict.fromkeys(os.path.dirname(key) for key in Manifest.load(manifest).keys if not is_remote(key)))


def _seen(profile: Profile, sweep: Path) -> list[str]:
    """Folders that are at the same path inside."""
    pairs = [mount.split(":")[:2] for mount in mounts(profile, sweep)]
    if profile.container_runtime == "apptainer":
        pairs += [[os.path.expanduser(folder)] * 2 for folder in ITS_OWN]
    return [path for path, place in (map(os.path.normpath, pair) for pair in pairs) if path == place]


def _hidden(path: str, seen: Sequence[str]) -> str:
    """A path that lies in none of these folders, or what it is a link to, if that does not; empty where all is seen."""
    if not path or is_remote(path):
        return ""
    path, real = os.path.normpath(path), os.path.realpath(path)
    if not _inside(path, seen):
        return path
    return "" if _inside(real, [*seen, *map(os.path.realpath, seen)]) else real


def _inside(path: str, folders: Sequence[str]) -> bool:
    return any(PurePath(path).is_relative_to(folder) for folder in folders)


def _folders(hidden: Iterable[str]) -> str:
    """What to mount for these: the cache for what lies in it, few folders for many."""
    cache = str(cache_root())
    places = (os.path.dirname(place) if place.endswith(".json") else place for place in hidden)
    found = list(dict.fromkeys(cache if _inside(place, [cache]) else place for place in places))
    above = os.path.commonpath(found)
    return above if len(found) > MOST and above != "/" else ", ".join(found)
