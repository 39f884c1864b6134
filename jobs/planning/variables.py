"""Whether jobs reach a bucket with the variables that submit reaches it with: else it finds all well, and they end."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from flip.config.schema import Config
from flip.config.sets import shares
from flip.data.manifest.manifest import MARK, Manifest
from flip.data.storage.base import is_remote
from flip.runs.errors import ConfigError
from jobs.common.cluster_profile import Profile
from jobs.slurm.batch_script import PASSED

OF_CLIENTS = {
    "s3": "AWS_", "gs": "GOOGLE_|GCSFS_", "gcs": "GOOGLE_|GCSFS_",
    "abfs": "AZURE_", "abfss": "AZURE_", "adl": "AZURE_", "az": "AZURE_",
}  # fmt: skip
"""Scheme of an address -> how the names of its client's variables begin, besides fsspec's own."""
PROXIES = "(HTTPS?|ALL)_PROXY$"
IDLE = re.compile(
    "AWS_(CLI_.*|DEFAULT_OUTPUT|EC2_METADATA_DISABLED|EXECUTION_ENV|MAX_ATTEMPTS|PAGER|RETRY_MODE|SDK_LOAD_CONFIG|VAULT)"
)
"""What changes nothing: for other programs' eyes, for retries, which are ours, and to ask no service of the machine's,
which is the last that is asked for credentials."""


def check(places: Iterable[str], profile: Profile, plan: bool = False) -> list[tuple[str, str, bool]]:
    """(name, what was seen, whether it could not be looked at), where jobs on Slurm read or write in a bucket.

    ``places``: the manifests, folders and addresses that they need. ConfigError where variables that lead there are not
    passed on. ``plan``: a dry run without data, made wherever a person sits, where that is only said.
    """
    found = sorted({url.partition("://")[0] for url in _addresses(places)}) if profile.kind == "slurm" else []
    if not found:
        return []
    names, schemes = telling(found, os.environ), ", ".join(found)
    setup = "\n".join(profile.setup)
    given = {*PASSED, *profile.env, *(name for name in names if re.search(rf"\b{re.escape(name)}\b", setup))}
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


def telling(schemes: list[str], environ: Mapping[str, str]) -> list[str]:
    """Names of the variables that lead to such addresses, or to others than would be reached without."""
    ours = [OF_CLIENTS[scheme] for scheme in schemes if scheme in OF_CLIENTS]
    begin = "|".join([*ours, *(f"FSSPEC_{re.escape(scheme)}_" for scheme in schemes)])
    names = sorted(name for name, value in environ.items() if value and not IDLE.fullmatch(name.upper()))
    proxied = any(re.match(PROXIES, name, re.IGNORECASE) for name in names)
    wanted = re.compile(f"{begin}|{PROXIES}{'|NO_PROXY$' if proxied else ''}", re.IGNORECASE)
    return [name for name in names if wanted.match(name)]


def needed(config: Config) -> list[str]:
    """What a run reads, and where its checkpoints go."""
    sets = (folder for item in config.evaluate.sets for folder in (item.manifest, item.train))
    return [*(one.manifest for one in shares(config.data)), *sets, config.checkpoint.url]


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
