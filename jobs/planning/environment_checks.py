"""Compares the environment of jobs with that of submit: files in containers, and variables of storage clients.

``check_container`` compares the paths that a run reads with those that the container of its profile sees.
``check_variables`` compares the variables for object storage that are set here with those that jobs get.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePath

from flip.common.cache import cache_root
from flip.config.derived import dataset_lanes
from flip.config.schema import Config
from flip.data.manifest.manifest import MARK, Manifest
from flip.data.storage.base import is_remote
from flip.runs.addresses import SCHEMES
from flip.runs.checks import OK, UNKNOWN, Check
from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import ClusterProfile
from jobs.slurm.batch_script import FORWARDED_ENV, mounts

APPTAINER_BINDS = ("~", "/tmp", "/var/tmp")  # unless the site has configured others; Pyxis binds nothing by itself
MAX_NAMED = 4  # folders that a remedy names one by one
PROXIES = "(HTTPS?|ALL)_PROXY$"
#: Variables without effect here: of other programs, for retries (we have our own), and those that disable the metadata
#: service, the last source of credentials.
IRRELEVANT = re.compile(
    "AWS_(CLI_.*|DEFAULT_OUTPUT|EC2_METADATA_DISABLED|EXECUTION_ENV|MAX_ATTEMPTS|PAGER|RETRY_MODE|SDK_LOAD_CONFIG|VAULT)"
)


def check_container(config: Config, profile: ClusterProfile, sweep: Path, plan: bool = False) -> list[Check]:
    """A row, if the profile has a container. ConfigError if it hides files that the run reads.

    ``plan``: a dry run without data on any machine, which only reports it.
    """
    if profile.kind != "slurm" or not profile.container:
        return []
    visible = _visible_folders(profile, sweep)
    hidden = dict[str, str]()
    for key, path in paths_read(config):
        if place := _hidden(path, visible):
            hidden.setdefault(place, key)
    if not hidden:
        return [Check(OK, f"sees all that is read, in {', '.join(visible)}")]
    place, key = next(iter(hidden.items()))
    what = f"{key} leads to a path that the container of the profile {profile.name} does not see"
    remedy = f"Add to its container_mounts, at the same path: {_folders(hidden)}."
    return _refuse(ConfigError(what, place, remedy=remedy), plan)


def paths_read(config: Config) -> Iterator[tuple[str, str]]:
    """(key, path) of the files that ranks read, and the folders of shards whose manifest is on this machine."""
    for share in dataset_lanes(config.data):
        yield from _set(f"data.sets.{share.name}.manifest" if share.name else "data.manifest", share.manifest)
    yield "data.tokenizer", config.data.tokenizer
    yield "data.token_table", config.data.token_table
    yield "data.weights", config.data.weights
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
    """The folders of its local shards."""
    return list(dict.fromkeys(os.path.dirname(key) for key in Manifest.load(manifest).keys if not is_remote(key)))


def _visible_folders(profile: ClusterProfile, sweep: Path) -> list[str]:
    """Folders that have the same path inside the container."""
    pairs = [mount.split(":")[:2] for mount in mounts(profile, sweep)]
    if profile.container_runtime == "apptainer":
        pairs += [[os.path.expanduser(folder)] * 2 for folder in APPTAINER_BINDS]
    return [path for path, place in (map(os.path.normpath, pair) for pair in pairs) if path == place]


def _hidden(path: str, visible: Sequence[str]) -> str:
    """The path, or the target of its link, if it lies in none of the visible folders; else empty."""
    if not path or is_remote(path):
        return ""
    real = os.path.realpath(path)
    path = os.path.normpath(path)
    if not _inside(path, visible):
        return path
    if _inside(real, [*visible, *map(os.path.realpath, visible)]):
        return ""
    return real


def _inside(path: str, folders: Sequence[str]) -> bool:
    return any(PurePath(path).is_relative_to(folder) for folder in folders)


def _folders(hidden: Iterable[str]) -> str:
    """The folders to mount: the cache for paths in it, a common parent for many."""
    cache = str(cache_root())
    places = (os.path.dirname(place) if place.endswith(".json") else place for place in hidden)
    folders = list(dict.fromkeys(cache if _inside(place, [cache]) else place for place in places))
    above = os.path.commonpath(folders)
    if len(folders) > MAX_NAMED and above != "/":
        return above
    return ", ".join(folders)


def check_variables(places: Iterable[str], profile: ClusterProfile, plan: bool = False) -> list[Check]:
    """A row, if jobs on Slurm use object storage. ConfigError if variables for it are not forwarded.

    ``places``: the manifests, folders and addresses that they need. ``plan``: as for ``check_container``.
    """
    schemes = []
    if profile.kind == "slurm":
        schemes = sorted({url.partition("://")[0] for url in _addresses(places)})
    if not schemes:
        return []
    names = client_variables(schemes, os.environ)
    setup = "\n".join(profile.setup)
    given = {*FORWARDED_ENV, *profile.env, *(name for name in names if re.search(rf"\b{re.escape(name)}\b", setup))}
    missing = [name for name in names if name not in given]
    if not missing:
        if names:
            state = f"are forwarded to jobs: {', '.join(names)}"
        else:
            state = "are not set here"
        return [Check(OK, f"the variables for {', '.join(schemes)} {state}")]
    remedy = f"In the profile: env: [{', '.join([*profile.env, *missing])}]. Or unset them and check again."
    what = f"env: variables for {', '.join(schemes)} that are set here are not forwarded to jobs"
    error = ConfigError(what, f"cluster profile {profile.name}", ", ".join(missing), remedy)
    return _refuse(error, plan)


def client_variables(schemes: list[str], environ: Mapping[str, str]) -> list[str]:
    """Names of the variables in ``environ`` that affect clients for these schemes."""
    prefixes = [SCHEMES[scheme].variables for scheme in schemes if scheme in SCHEMES and SCHEMES[scheme].variables]
    pattern = "|".join([*prefixes, *(f"FSSPEC_{re.escape(scheme)}_" for scheme in schemes)])
    names = sorted(name for name, value in environ.items() if value and not IRRELEVANT.fullmatch(name.upper()))
    proxied = any(re.match(PROXIES, name, re.IGNORECASE) for name in names)
    wanted = re.compile(f"{pattern}|{PROXIES}{'|NO_PROXY$' if proxied else ''}", re.IGNORECASE)
    return [name for name in names if wanted.match(name)]


def required_places(config: Config) -> list[str]:
    """The manifests that a run reads, and the URL of its checkpoints."""
    sets = (folder for item in config.evaluate.sets for folder in (item.manifest, item.train))
    return [*(share.manifest for share in dataset_lanes(config.data)), *sets, config.checkpoint.url]


def _addresses(places: Iterable[str]) -> Iterator[str]:
    """The places that are addresses, and one address per local manifest with shards in object storage."""
    for place in filter(None, places):
        if "://" in place:
            yield from [place] if not place.startswith("file://") else []
        elif os.path.isfile(os.path.join(place, MARK)):
            yield from filter(None, [_remote(place)])


@lru_cache(maxsize=64)
def _remote(manifest: str) -> str:
    return next((key for key in Manifest.load(manifest, check=False).keys if is_remote(key)), "")


def _refuse(error: ConfigError, plan: bool) -> list[Check]:
    """Raise ``error``; in a plan on a machine without the data, return it as not checked."""
    if plan:
        return [Check(UNKNOWN, str(error).rstrip("."))]
    raise error
