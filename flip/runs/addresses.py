"""Addresses of storages: which schemes are admitted, in settings and in records alike.

An address is ``SCHEME://REST`` or a path. ``SCHEMES`` is the only table of schemes: a setting or a record that names
another one is refused before a library reads it, and so is a chain of addresses (``::``), by which fsspec reads one
file system through another. A new storage is a row of it; ``flip.data.storage.storages`` says which client reads it.
Standard library, Python >= 3.6.
"""

import re
from typing import Dict, Tuple

from flip.runs.errors import ConfigError

CHECKPOINTS = "checkpoints"
SHARDS = "shards"
"""What may lie at an address."""

_SCHEME = re.compile(r"([^:/]*)://")
_VARIABLE = re.compile(r"\$[A-Za-z_]\w*")


class Scheme:
    """A kind of address.

    ``storage``: what it names. ``variables``: prefixes of the environment variables of its client, besides those of
    fsspec, as alternatives of a regular expression; "" if it has none. ``package``: what to install for it; "" if
    ``requirements.txt`` has it. ``holds``: whether checkpoints or shards may lie there. ``lists``: whether the storage
    says which objects exist.
    """

    def __init__(
        self, storage: str, variables: str = "", package: str = "", holds: Tuple[str, ...] = (CHECKPOINTS,),
        lists: bool = True,
    ) -> None:  # fmt: skip
        self.storage = storage
        self.variables = variables
        self.package = package
        self.holds = holds
        self.lists = lists


_BOTH = (CHECKPOINTS, SHARDS)
_READ = (SHARDS,)
_GOOGLE = Scheme("Google Cloud Storage", "GOOGLE_|GCSFS_", "gcsfs", _BOTH)
_AZURE = Scheme("Azure Blob Storage", "AZURE_", "adlfs", _BOTH)
_WEB = Scheme("a web server", holds=_READ, lists=False)
_SSH = Scheme("files of a host with SSH", package="paramiko", holds=_READ)
_ORACLE = Scheme("Oracle Object Storage", "OCI_", "ocifs", _READ)
_HADOOP = Scheme("Hadoop", "HADOOP_|ARROW_LIBHDFS_|CLASSPATH$", holds=_READ)

SCHEMES: Dict[str, Scheme] = {
    "file": Scheme("a folder"),
    "s3": Scheme("S3 and compatible storage", "AWS_", holds=_BOTH),
    "gs": _GOOGLE,
    "gcs": _GOOGLE,
    "az": _AZURE,
    "abfs": _AZURE,
    "abfss": _AZURE,
    "http": _WEB,
    "https": _WEB,
    "hf": Scheme("the Hugging Face hub", "HF_|HUGGING_FACE_", "huggingface_hub", _READ),
    "sftp": _SSH,
    "ssh": _SSH,
    "ftp": Scheme("an FTP server", holds=_READ),
    "smb": Scheme("a Windows share", package="smbprotocol", holds=_READ),
    "webdav": Scheme("a WebDAV server", package="'webdav4[fsspec]'", holds=_READ),
    "hdfs": _HADOOP,
    "webhdfs": Scheme("Hadoop by its web interface", holds=_READ),
    "oss": Scheme("Alibaba Object Storage", "OSS_", "ossfs", _READ),
    "tos": Scheme("Volcengine Object Storage", "TOS_", "tosfs", _READ),
    "oci": _ORACLE,
    "ocilake": _ORACLE,
    "lakefs": Scheme("lakeFS", "LAKECTL_|LAKEFS_", "lakefs-spec", _READ),
    "root": Scheme("XRootD", "XRD_|X509_", "fsspec-xrootd", _READ),
    "dbfs": Scheme("Databricks", "DATABRICKS_", holds=_READ),
    "memory": Scheme("the memory of one process", holds=_READ),
}
"""Scheme of an address, in lower case -> what it names. fsspec reads all of them; its other schemes read one file
system through another, or files of this machine, or execute something elsewhere, and are refused."""
#: The beginnings of keys of shards that are no paths.
SHARD_PREFIXES = tuple("%s://" % name for name, scheme in SCHEMES.items() if SHARDS in scheme.holds)


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


def lists(address: str) -> bool:
    """Whether the storage of an admitted URL says which objects exist."""
    return SCHEMES[scheme_of(address)].lists


def why_refused(address: str, thing: str = CHECKPOINTS) -> str:
    """Why an address is not admitted, as a clause; "" if it is. ``thing``: what lies there; "" for anything."""
    if "::" in address:
        return "it is a chain of addresses (::)"
    if address.startswith("/"):
        return ""
    if not is_url(address):
        return "it is neither an absolute path nor a URL"
    scheme = scheme_of(address)
    if scheme not in SCHEMES:
        return "the scheme %r is not admitted" % scheme
    if thing and thing not in SCHEMES[scheme].holds:
        return "the scheme %r is not admitted for %s" % (scheme, thing)
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


def require_admitted(address: str, where: str = "", thing: str = CHECKPOINTS) -> None:
    """Raise ConfigError unless an address is admitted. ``where``: the setting or the record that names it.

    ``thing``: what lies there; "" for anything.
    """
    reason = why_refused(address, thing)
    if reason:
        raise ConfigError("is no address of a storage: %s" % reason, where, address, admitted_forms(thing))


def admitted_forms(thing: str) -> str:
    """The admitted forms of an address, for error texts."""
    schemes = sorted(name for name, scheme in SCHEMES.items() if not thing or thing in scheme.holds)
    return "Name an absolute path, or a URL with one of these schemes: %s." % ", ".join(schemes)
