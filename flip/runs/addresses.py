"""Addresses of storages: which schemes are admitted, in settings and in records alike.

An address is ``SCHEME://REST`` or a path. ``SCHEMES`` is the only table of schemes: a setting or a record that names
another one is refused before a library reads it, and so is a chain of addresses (``::``), by which fsspec reads one
file system through another. A new storage is a row of it. Standard library, Python >= 3.6.
"""

import re
from typing import Dict, Tuple

from flip.runs.errors import ConfigError

_SCHEME = re.compile(r"([^:/]*)://")
_VARIABLE = re.compile(r"\$[A-Za-z_]\w*")


class Scheme:
    """A kind of address.

    ``storage``: what it names. ``variables``: prefixes of the environment variables of its client, besides those of
    fsspec, as alternatives of a regular expression; "" if it has none. ``holds_shards``: whether shards may lie there,
    and not only checkpoints.
    """

    def __init__(self, storage: str, variables: str = "", holds_shards: bool = False) -> None:
        self.storage = storage
        self.variables = variables
        self.holds_shards = holds_shards


SCHEMES: Dict[str, Scheme] = {
    "file": Scheme("a folder"),
    "s3": Scheme("S3 and compatible storage", "AWS_", holds_shards=True),
    "gs": Scheme("Google Cloud Storage", "GOOGLE_|GCSFS_"),
    "gcs": Scheme("Google Cloud Storage", "GOOGLE_|GCSFS_"),
    "az": Scheme("Azure Blob Storage", "AZURE_"),
    "abfs": Scheme("Azure Blob Storage", "AZURE_"),
    "abfss": Scheme("Azure Blob Storage", "AZURE_"),
}
"""Scheme of an address, in lower case -> what it names."""
#: The beginnings of keys of shards in object storage.
SHARD_PREFIXES = tuple("%s://" % name for name, scheme in SCHEMES.items() if scheme.holds_shards)


def as_url(address: str) -> str:
    """The URL of an address, which may be an absolute path; without a slash at its end."""
    if not is_url(address):
        address = "file://%s" % address
    return address.rstrip("/")


def is_url(address: str) -> bool:
    """Whether an address is a URL, and not a path."""
    return "://" in address


def scheme_of(address: str) -> str:
    """The scheme of a URL; "" for a path."""
    match = _SCHEME.match(address)
    if match is None:
        return ""
    return match.group(1)


def why_refused(address: str) -> str:
    """Why an address is not admitted, as a clause; "" if it is."""
    if "::" in address:
        return "it is a chain of addresses (::)"
    if address.startswith("/"):
        return ""
    if not is_url(address):
        return "it is neither an absolute path nor a URL"
    scheme = scheme_of(address)
    if scheme not in SCHEMES:
        return "the scheme %r is not admitted" % scheme
    return ""


def why_not_local(path: str) -> Tuple[str, str]:
    """(why a path names no place on this machine, remedy); two empty texts if it may.

    Its form alone is looked at, not whether it exists.
    """
    if is_url(path):
        remedy = "A manifest is a local folder; its shards may be in a bucket: flip shards move, flip shards index."
        return "must be a path on this machine, not an address", remedy
    variable = _VARIABLE.search(path)
    if variable:
        remedy = "Write the path itself; ~ stands for your home folder."
        return "variables such as %s are not replaced in paths" % variable.group(), remedy
    return "", ""


def require_local(path: str, where: str) -> None:
    """Raise ConfigError if a path is an address, or has a variable. ``where``: the option that gives it."""
    what, remedy = why_not_local(path)
    if what:
        raise ConfigError(what, where, path, remedy)


def require_admitted(address: str, where: str = "") -> None:
    """Raise ConfigError unless an address is admitted. ``where``: the setting or the record that names it."""
    reason = why_refused(address)
    if reason:
        raise ConfigError("is no address of a storage: %s" % reason, where, address, REMEDY)


REMEDY = "Name an absolute path, or a URL with one of these schemes: %s." % ", ".join(sorted(SCHEMES))
"""The admitted forms of an address, for error texts."""
