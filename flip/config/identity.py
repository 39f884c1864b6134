"""The config hash of a run: one hash of everything that changes its results (docs/contracts.md).

The hash covers the values themselves, not differences from defaults, so a later change of a default cannot make two
runs look alike. The hashed values are stored with the hash, so that differences can be named. ``identity`` makes the
record, ``is_same_run`` and ``diff_identity`` compare a configuration with it. The record also has the class names of
evaluation sets (``classes``) outside of the hash, so that they can be corrected.
"""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flip.common.plain_data import ConfigChange, compare, digest
from flip.config.derived import world_size, world_sizes
from flip.config.resolve import manifest_record, resolve_path
from flip.config.schema import Config, DataSet, Stage
from flip.runs.errors import PermissionDenied
from flip.runs.formats import RUN_NUMBER

_DATA = re.compile(r"data\.(sets\.[^.]+\.)?(manifest|samples)")
"""Keys that name the data set, and not how it is read."""
ORDERED = ("stages", "data.sets")
"""Named lists whose order matters."""


def identity(config: Config, code: str) -> dict[str, Any]:
    """identity.json of a resolved configuration: hash, schema, code (the snapshot's digest), config (what is hashed),
    and classes (digests of class names, which are not hashed).

    The code is not hashed: a run keeps its snapshot, and an edited comment does not make another run. Reads manifests,
    class names and the tokenizer if they exist.
    """
    canonical = _canonical(config)
    return {
        "hash": digest(canonical),
        "schema": RUN_NUMBER,
        "code": code,
        "config": canonical,
        "classes": _class_names(config),
    }


def is_same_run(stored: Mapping[str, Any], config: Config) -> bool:
    """Whether a stored identity.json belongs to a resolved configuration. Class names may differ."""
    return stored.get("hash") == digest(_canonical(config))


def diff_identity(stored: Mapping[str, Any], config: Config) -> list[ConfigChange]:
    """The differences between a stored identity.json and a resolved configuration; empty: they are the same run."""
    return compare(stored["config"], _canonical(config), ORDERED)


def changes_since(stored: Mapping[str, Any] | None, config: Config) -> list[ConfigChange]:
    """As ``diff_identity``, but empty if there is no stored identity.json or it cannot be compared."""
    if stored and isinstance(stored.get("config"), dict):
        return diff_identity(stored, config)
    return []


def concern_only_data(changes: Sequence[ConfigChange]) -> bool:
    """Whether there are changes, and all are about the data."""
    return bool(changes) and all(_DATA.fullmatch(change.key) for change in changes)


def is_missing_content(change: ConfigChange) -> bool:
    """Whether a path that was hashed by its content has no content any more."""
    return _is_content(change.was) and isinstance(change.now, str) and not _is_content(change.now)


def changed_class_names(stored: Mapping[str, Any], config: Config) -> list[str]:
    """Names of evaluation sets whose class names differ from those in a stored identity.json."""
    before = _stored_class_names(stored)
    return [name for name, now in _class_names(config).items() if before.get(name, now) != now]


def missing_class_names(stored: Mapping[str, Any], config: Config) -> list[str]:
    """Files of class names that existed according to a stored identity.json, and do not exist now."""
    before = _stored_class_names(stored)
    now = _class_names(config)
    return [path for name, path in now.items() if _is_content(before.get(name)) and not _is_content(path)]


def generic_key(key: str) -> str:
    """A dotted key with ``*`` in place of the name of a stage or of a data set, also of evaluation."""
    return re.sub(r"\A(stages|data\.sets|evaluate\.sets)\.[^.]*\.", r"\1.*.", key)


def file_digest(path: str) -> str:
    """The checksum of a file's content, or its path if it does not exist."""
    try:
        if path:
            with open(resolve_path(path), "rb") as file:
                return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        return path
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return path
    except PermissionError as error:
        raise PermissionDenied("may not be read", path, remedy="Ask its owner for read permission.") from error


def _is_content(value: Any) -> bool:
    """Whether a hashed value is the digest of a data set or a file, and not its path."""
    return isinstance(value, str) and value.startswith(("digest:", "sha256:"))


def _manifest(path: str) -> str:
    """The digest of a data set, which does not change when it moves; its path if it has no manifest."""
    record = manifest_record(path)
    if record:
        return f"digest:{record['digest']}"
    return path


_DIGESTS: dict[str, Callable[[str], str]] = {"manifest": _manifest, "file": file_digest, "folder": str}


def _hashed(section: Any) -> dict[str, Any]:
    """The fields of a section that are part of the config hash as plain data, with digests in place of paths."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        rules = field.metadata
        if not rules.get("identity", True) or ("omit_if" in rules and value == rules["omit_if"]):
            continue
        if "path" in rules:
            values[field.name] = _DIGESTS[rules["path"]](value)
        elif isinstance(value, list):
            values[field.name] = [_hashed(item) if dataclasses.is_dataclass(item) else item for item in value]
        elif not dataclasses.is_dataclass(value):
            values[field.name] = value
        elif section_values := _hashed(value):
            values[field.name] = section_values
    return values


def _unhashed(section: Any, prefix: str = "", inside: bool = False) -> Iterator[str]:
    """Keys of the fields below a section that are no part of a run's config hash."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        unhashed = inside or not field.metadata.get("identity", True)
        if dataclasses.is_dataclass(value):
            yield from _unhashed(value, f"{prefix}{field.name}.", unhashed)
        elif unhashed:
            yield prefix + field.name


UNHASHED = frozenset([*_unhashed(Config()), *_unhashed(Stage(), "stages.*."), *_unhashed(DataSet(), "data.sets.*.")])
"""``generic_key`` of each setting that is no part of a run's config hash, since it does not change results."""


def _canonical(config: Config) -> dict[str, Any]:
    """The values that the hash covers."""
    values = _hashed(config)
    values["evaluate"]["sets"].sort(
        key=lambda dataset: dataset["name"]
    )  # the order of evaluation sets changes no score
    if not config.init.run and not config.init.export:
        del values["init"]
    values["world"] = world_size(config)
    if config.resources.least_nodes:  # these have the same order of samples, and other last bits
        values["world"] = world_sizes(config)
    return values


def _stored_class_names(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """The class names that a stored identity.json records, as ``_class_names``."""
    recorded = stored.get("classes", {})
    if isinstance(recorded, Mapping):
        return recorded
    return {}


def _class_names(config: Config) -> dict[str, str]:
    """Evaluation set -> digest of its class names, or their path if the file does not exist."""
    return {item.name: file_digest(item.classes) for item in config.evaluate.sets if item.classes}
