"""Nested plain data (mappings, lists, texts, numbers): as flat keys, compared, and hashed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class ConfigChange(NamedTuple):
    """A key in which two configurations differ. ``was``, ``now``: its values; None if it is absent there."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.was!r} -> {self.now!r}"


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested plain data as dotted key -> value, with ``key`` as prefix.

    Members of named lists have their names as keys; other lists are values.
    """
    if isinstance(value, Mapping):
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
        items = [(str(item["name"]), item) for item in value]
    else:
        return {key: value}
    leaves: dict[str, Any] = {}
    for name, item in items:
        leaves.update(flatten(item, f"{key}.{name}" if key else name))
    return leaves


def compare(before: Mapping[str, Any], after: Mapping[str, Any], ordered: Sequence[str] = ()) -> list[ConfigChange]:
    """The differences between two values of nested plain data, sorted by key.

    ``ordered``: keys of named lists whose order matters.
    """
    was = flatten(before)
    now = flatten(after)
    changes = [
        ConfigChange(key, was.get(key), now.get(key)) for key in sorted({*was, *now}) if was.get(key) != now.get(key)
    ]
    for key in ordered:  # flattened members have no order, so it is compared here
        names = _names(before, key)
        reordered = _names(after, key)
        if names != reordered and sorted(names) == sorted(reordered):
            changes.append(ConfigChange(key, names, reordered))
    return changes


def digest(canonical: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON text of a mapping."""
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _names(config: Mapping[str, Any], key: str) -> list[str]:
    """Names of the members of a list, in order; empty if there is no such list."""
    owner: Any = config
    for part in key.split("."):
        owner = owner.get(part, {})
    return [member["name"] for member in owner]
