"""Whether jobs have what submit has: the host's files inside a container, and the variables that lead to buckets.

``check_container`` compares what a resolved run reads with what the container of its profile sees.
``check_variables`` compares the environment variables of storage clients here with those that go with jobs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePath

from flip.config.derived import dataset_lanes
from flip.config.resolve import cache_root
from flip.config.schema import Config
from flip.data.manifest.manifest import MARK, Manifest
from flip.data.storage.base import is_remote
from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile
from jobs.slurm.batch_script import FORWARDED_ENV, mounts

APPTAINER_BINDS = ("~", "/tmp", "/var/tmp")
"""What apptainer binds, unless the site has it otherwise. Pyxis binds nothing by itself."""
MAX_NAMED = 4
"""Folders that are named one by one."""


def check_container(
    config: Config, profile: ClusterProfile, sweep: Path, plan: bool = False
) -> list[tuple[str, str, bool]]:
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
    for one in dataset_lanes(config.data):
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


def _seen(profile: ClusterProfile, sweep: Path) -> list[str]:
    """Folders that are at the same path inside."""
    pairs = [mount.split(":")[:2] for mount in mounts(profile, sweep)]
    if profile.container_runtime == "apptainer":
        pairs += [[os.path.expanduser(folder)] * 2 for folder in APPTAINER_BINDS]
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
    return above if len(found) > MAX_NAMED and above != "/" else ", ".join(found)


OF_CLIENTS = {
    "s3": "AWS_", "gs": "GOOGLE_|GCSFS_", "gcs": "GOOGLE_|GCSFS_",
    "abfs": "AZURE_", "abfss": "AZURE_", "adl": "AZURE_", "az": "AZURE_",
}  # fmt: skip
"""Scheme of an address -> how the names of its client's variables begin, besides fsspec's own."""
PROXIES = "(HTTPS?|ALL)_PROXY$"
IRRELEVANT = re.compile(
    "AWS_(CLI_.*|DEFAULT_OUTPUT|EC2_METADATA_DISABLED|EXECUTION_ENV|MAX_ATTEMPTS|PAGER|RETRY_MODE|SDK_LOAD_CONFIG|VAULT)"
)
"""What changes nothing: for other programs' eyes, for retries, which are ours, and to ask no service of the machine's,
which is the last that is asked for credentials."""


def check_variables(places: Iterable[str], profile: ClusterProfile, plan: bool = False) -> list[tuple[str, str, bool]]:
    """(name, what was seen, whether it could not be looked at), where jobs on Slurm read or write in a bucket.

    ``places``: the manifests, folders and addresses that they need. ConfigError where variables that lead there are not
    passed on. ``plan``: a dry run without data, made wherever a person sits, where that is only said.
    """
    found = sorted({url.partition("://")[0] for url in _addresses(places)}) if profile.kind == "slurm" else []
    if not found:
        return []
    names, schemes = client_variables(found, os.environ), ", ".join(found)
    setup = "\n".join(profile.setup)
    given = {*FORWARDED_ENV, *profile.env, *(name for name in names if re.search(rf"\b{re.escape(name)}\b", setup))}
    missing = [name for name in names if name not in given]
    if not missing:
        told = f"go with jobs: {', '.join(names)}" if names else "are not set here"
        return [("environment", f"the variables that lead to {schemes} {told}", False)]
    remedy = f"In the profile: env: [{', '.join([*profile.env, *missing])}]. Or unset them and check again."
    what = f"env: what leads to {schemes} from here does not go with jobs"
    error = ConfigError(what, f"cluster profile {profile.name}", ", ".join(missing), remedy)
    if plan:
        return [("environment", str(error).rstrip("."), True)]
    raise error


def client_variables(schemes: list[str], environ: Mapping[str, str]) -> list[str]:
    """Names of the variables that lead to such addresses, or to others than would be reached without."""
    ours = [OF_CLIENTS[scheme] for scheme in schemes if scheme in OF_CLIENTS]
    begin = "|".join([*ours, *(f"FSSPEC_{re.escape(scheme)}_" for scheme in schemes)])
    names = sorted(name for name, value in environ.items() if value and not IRRELEVANT.fullmatch(name.upper()))
    proxied = any(re.match(PROXIES, name, re.IGNORECASE) for name in names)
    wanted = re.compile(f"{begin}|{PROXIES}{'|NO_PROXY$' if proxied else ''}", re.IGNORECASE)
    return [name for name in names if wanted.match(name)]


def needed(config: Config) -> list[str]:
    """What a run reads, and where its checkpoints go."""
    sets = (folder for item in config.evaluate.sets for folder in (item.manifest, item.train))
    return [*(one.manifest for one in dataset_lanes(config.data)), *sets, config.checkpoint.url]


def _addresses(places: Iterable[str]) -> Iterator[str]:
    """Those that are addresses, and one of each manifest that is here and names shards in a bucket."""
    for place in filter(None, places):
        if "://" in place:
            yield from [place] if not place.startswith("file://") else []
        elif os.path.isfile(os.path.join(place, MARK)):
            yield from filter(None, [_remote(place)])


@lru_cache(maxsize=64)
def _remote(manifest: str) -> str:
    return next((key for key in Manifest.load(manifest, check=False).keys if is_remote(key)), "")
