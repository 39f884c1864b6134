"""Checks of what a run writes: its folder, the space for checkpoints, their bucket."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from flip.checkpoint.remote import RemoteCheckpoint
from flip.config.schema import Config
from flip.data.storage.retry import RetryPolicy
from flip.runs.addresses import as_url
from flip.runs.checks import OK, UNKNOWN, Check
from flip.runs.errors import ConfigError, PermissionDenied, StorageError
from jobs.common.cluster_profile import ClusterProfile
from jobs.common.filesystem import OTHER_ROOT, probe, unwritable
from jobs.common.text import size


class CheckpointNeed(Protocol):
    """Where the checkpoints of a run go, and how large they are."""

    @property
    def url(self) -> str:
        """Empty: into its directory."""

    @property
    def bytes(self) -> int | None:
        """Most at any time; None: unknown, for they are a program's own."""


def _existing_folder(profile: ClusterProfile, folder: Path) -> Path | None:
    """The nearest folder that exists; None if a cluster's file system is not on this machine."""
    # os.path answers False, as pathlib does not, below a folder that this user cannot enter and on a stale mount
    above = [path for path in (folder, *folder.parents) if os.path.isdir(path)]
    if above and (profile.kind == "local" or os.path.exists(folder.parent)):
        return above[0]
    return None


def check_folder(profile: ClusterProfile, folder: Path, dry: bool) -> Check:
    """Probe the folder where runs will be stored; a dry run checks only the permissions."""
    place = _existing_folder(profile, folder)
    if place is None:
        return Check(UNKNOWN, f"{folder.parent}: not on this machine")
    blocking = next(
        (path for path in (folder, *folder.parents) if os.path.exists(path) and not os.path.isdir(path)), None
    )
    if blocking is not None:
        raise ConfigError("a file is where a folder must be", str(blocking), remedy=OTHER_ROOT)
    if dry:
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionDenied("not writable", str(place), remedy=OTHER_ROOT)
        return Check(OK, f"{folder.parent}: writable")
    try:
        probe(place)
    except OSError as error:
        raise unwritable(error, place) from error
    return Check(OK, f"{folder.parent}: files can be created, locked, renamed, linked and deleted")


def check_space(
    checkpoints: Mapping[Path, CheckpointNeed], profile: ClusterProfile, folder: Path, plan: bool
) -> list[Check]:
    """Space for the checkpoints of all runs that start or continue, by path of the run.

    Per run: the most that it needs at any time, less what its directory holds already.
    ``plan``: a dry run without data on any machine, which too little space does not refuse.
    """
    unknown = sum(need.bytes is None for need in checkpoints.values())
    here = {path: need.bytes for path, need in checkpoints.items() if not need.url and need.bytes is not None}
    if unknown and not here:
        return [Check(UNKNOWN, "a program's checkpoints have a size that only it knows")]
    if not here:
        urls = dict.fromkeys(need.url for need in checkpoints.values())
        if urls:
            return [Check(UNKNOWN, f"checkpoints go to {', '.join(urls)}")]
        return []
    place = _existing_folder(profile, folder)
    if place is None:
        return [Check(UNKNOWN, f"{folder.parent}: not on this machine")]
    needed = sum(max(0, most - _bytes_below(path / "checkpoints")) for path, most in here.items())
    free = shutil.disk_usage(place).free
    runs = "1 run" if len(here) == 1 else f"{len(here)} runs"
    if needed > free:
        what = f"{size(free)} are free, up to {size(needed)} are needed for the checkpoints of {runs}"
        if plan:
            return [Check(UNKNOWN, f"{place}: only {what}")]
        remedy = f"Free space there, lower checkpoint.keep, or start fewer runs with --only. {OTHER_ROOT}"
        raise StorageError(what, str(place), remedy=remedy)
    text = f"{size(needed)} for the checkpoints of {runs}, of {size(free)} free"
    if unknown:
        text += "; without those of programs, whose size is unknown"
    return [Check(OK, text)]


def _bytes_below(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError, PermissionError):  # just deleted by its job; another user's
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def check_bucket(config: Config, dry: bool) -> list[Check]:
    url = config.checkpoint.url
    if url and dry:
        return [Check(UNKNOWN, f"{url}: not written to in a dry run")]
    if url:
        return [Check(OK, probe_url(url))]
    return []


@lru_cache(maxsize=16)
def probe_url(url: str, deadline: float = 10.0) -> str:
    """Write and delete an object below the URL of checkpoints. Raises the error of a save, after the deadline."""
    name = f".probe-{secrets.token_hex(8)}"
    remote = RemoteCheckpoint(as_url(url), RetryPolicy(deadline=deadline))
    remote.put(name, b"probe")
    remote.delete(name)
    return f"{url}: objects can be written and deleted"
