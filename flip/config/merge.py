"""Merges layers of YAML and command-line overrides into a typed ``Config``, and writes it as YAML (docs/contracts.md).

A layer is checked against the schema before it is merged, so that an error names the layer's file, line and key.
Interpolation is off: a value with ``${`` is refused.
"""

import copy
import dataclasses
import functools
import json
import logging
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flip.common import typed
from flip.common.option import descriptions
from flip.common.yaml_io import LocatedDict, SourceLocation, dump_yaml, line_of, parse_yaml, read_yaml
from flip.config.schema import MODEL_PRESETS, YES_NO, Config
from flip.runs import formats
from flip.runs.credentials import exposes
from flip.runs.errors import ConfigError, suggestion

log = logging.getLogger(__name__)

_CREDENTIALS_REMEDY = "Others can read configurations: use environment variables, or files such as ~/.aws/credentials."


OTHER_NAMES = {
    "epochs": "stages.NAME.samples, the length in samples: epochs times the size of the data set",
    "steps": "stages.NAME.samples, the length in samples: steps times the batch",
    "max_steps": "stages.NAME.samples, the length in samples: steps times the batch",
    "batch_size": "stages.NAME.batch, the global batch of all ranks",
    "learning_rate": "stages.NAME.base_lr, the peak for 256 samples of a batch",
    "mask_ratio": "stages.NAME.mask, the share of patches that are dropped",
    "num_workers": "data.workers, the loader processes of a rank",
}
"""Keys of other trainers -> the setting here."""


def merge(layers: Sequence[tuple[str, Mapping[str, Any]]], dotlist: Sequence[str] = (), stored: bool = False) -> Config:
    """Merge defaults <- size preset <- ``layers`` in order <- ``dotlist``.

    ``layers``: (name for errors, mapping with dotted or nested keys). Lists replace lists; a named list such as
    ``stages`` may also be given as a mapping of name (or position) to the fields to change, or to null (remove).
    ``stored``: the layers are the configuration of an existing run, in which credentials are only a warning.
    Raises ConfigError for unknown keys, wrong types and interpolation; ``validate`` checks the values.
    """
    nested = [(where, expand_dotted_keys(mapping, where)) for where, mapping in [*layers, *map(assignment, dotlist)]]
    named: dict[str, Any] = {"model": _find_preset(nested, stored)}
    for where, layer in nested:
        named = _deep_merge(named, _coerce(Config, layer, named, SourceLocation(where, stored=stored)))
    kinds = fields_of(Config)
    return Config(**{name: _build(kinds[name], values) for name, values in named.items()})


def read_config(path: str | os.PathLike[str]) -> Config:
    """Read a run's config.yaml. Raises ConfigError if it is invalid or has another format."""
    table = read_yaml(path)
    formats.check(formats.CONFIG, table, path)
    return merge([(str(path), table)], stored=True)


def dump(config: Config) -> str:
    """Canonical YAML of every field; ``read_config`` returns the same Config."""
    return dump_yaml(to_dict(config))


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain data, keys in the schema's order, without values that are None and without empty sections."""
    return dataclasses.asdict(config, dict_factory=_given)


def lookup(config: Any, key: str) -> Any:
    """The value at a dotted key, with members of named lists by name or position; None if it does not exist."""
    for part in key.split("."):
        if isinstance(config, list):
            named = [member for member in config if getattr(member, "name", None) == part]
            at_position = [member for i, member in enumerate(config) if part == str(i)]
            config = next(iter(named + at_position), None)
        else:
            config = getattr(config, part, None)
    return config


def assignment(text: str) -> tuple[str, LocatedDict]:
    """The layer (name for errors, mapping) of an override such as ``a.b=1``, whose value is YAML.

    Raises ConfigError.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        remedy = "Example: model.size=L/16"
        if text.endswith((".yaml", ".yml")):
            remedy = "Submit one sweep at a time."
        raise ConfigError("an override has the form KEY=VALUE", "command line", text, remedy)
    where = f"command line, {key.strip()}"
    return "command line", LocatedDict({key.strip(): parse_yaml(value, where)})


def expand_dotted_keys(table: Mapping[str, Any], where: str) -> LocatedDict:
    """The same settings with nested mappings in place of dotted keys.

    ``where``: the layer's name for errors. Raises ConfigError if a key is set twice.
    """
    nested = LocatedDict()
    for key, value in table.items():
        line = line_of(table, key)
        _set(nested, key.split("."), value, SourceLocation(where, key, line))
    return nested


@functools.cache
def fields_of(kind: type) -> dict[str, Any]:
    """Name -> type of a dataclass's fields."""
    return typing.get_type_hints(kind)


def _paths(kind: Any = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema; a member of a list is called NAME."""
    for name, hint in fields_of(kind).items():
        yield prefix + name
        member = (typing.get_args(hint) or (hint,))[0]
        if dataclasses.is_dataclass(member):
            yield from _paths(member, f"{prefix}{name}." + ("NAME." if typing.get_args(hint) else ""))


def _description(key: str) -> str:
    """The description of a field, by its dotted key; empty if it has none."""
    kind: Any = Config
    text = ""
    for part in key.split("."):
        if not dataclasses.is_dataclass(kind):
            continue
        owner = typing.cast(type, kind)
        if part not in fields_of(owner):
            continue  # the name of a member, or its position
        text = descriptions(owner).get(part, "")
        hint = fields_of(owner)[part]
        kind = (typing.get_args(hint) or (hint,))[0]
    return text


def _unknown_key(kind: type, name: str, place: SourceLocation) -> ConfigError:
    """The error for an unknown key, which also names keys of other sections with the same last word."""
    last = name.rpartition(".")[2]
    if last in OTHER_NAMES:
        return place.error("unknown key", remedy=f"In its place: {OTHER_NAMES[last]}.")
    elsewhere = [path for path in _paths() if f"_{path.rpartition('.')[2]}".endswith(f"_{last}")]
    return typed.unknown_key(name, fields_of(kind), place, elsewhere)


def _coerce_scalar(kind: type, value: Any, place: SourceLocation) -> Any:
    if isinstance(value, str) and ("${" in value or value == "???"):  # both are special to OmegaConf
        raise place.error("interpolation is off", value, "Write the value itself.")
    if isinstance(value, str) and exposes(value):
        _refuse_credentials(place, value)
    if isinstance(value, list) and place.key == "data.manifest":
        remedy = "Several data sets belong under data.sets: [{name: NAME, manifest: FOLDER}, ...]."
        raise place.error("is a single data set", value, remedy)
    return typed.read_value(value, typed.TYPES[kind], place, _description(place.key))


def _refuse_credentials(place: SourceLocation, value: str) -> None:
    """Raise ConfigError for a value with credentials. In the configuration of an existing run it is only a warning."""
    error = place.error("contains credentials, or an address with unknown parameters", value, _CREDENTIALS_REMEDY)
    if not place.stored:
        raise error
    _warn(str(error))


@functools.cache
def _warn(text: str) -> None:
    """Log a warning once in a process: a configuration is read several times."""
    log.warning("%s", text)


def _canonical_decimal(text: str, place: SourceLocation) -> str:
    """The canonical form of a decimal number: 0.50, 5e-1 and .5 are all 0.5."""
    number = typed.parse_number(text)
    if number is None:
        raise place.error("needs a decimal number", text, "Example: 0.5")
    if number:
        return format(number.normalize(), "f")
    return "0"


def _change_members(
    kind: type, value: Mapping[str, Any], old: list[dict[str, Any]], place: SourceLocation
) -> list[dict[str, Any]]:
    """Change members of a named list by name or position. A new name is appended, null removes a member."""
    new: list[dict[str, Any] | None] = [dict(member) for member in old]  # None: removed; positions are those of ``old``
    # a mapping of fields, in place of a mapping of names, is a likely mistake
    own = [name for name, item in value.items() if name in fields_of(kind) and not isinstance(item, Mapping)]
    if own and not {member["name"] for member in old} & set(value):
        last = place.key.rpartition(".")[2]
        remedy = f"Write `{last}: [{{name: NAME, {own[0]}: ...}}]`, or `{last}: {{NAME: {{{own[0]}: ...}}}}`."
        raise place.error(f"needs a list, or names; these are fields of one member: {', '.join(own)}", remedy=remedy)
    for name, change in value.items():
        here = place.child(name, line_of(value, name))
        index = next((i for i, member in enumerate(new) if member and member["name"] == name), None)
        if index is None and name.isdigit():
            index = next((i for i, member in enumerate(new[: len(old)]) if member and name == str(i)), None)
            if index is None:
                known = ", ".join(member["name"] for member in new if member) or "none"
                raise here.error("no such member", remedy=f"There are {len(old)}: {known}.")
        if change is None:
            if index is None:
                raise here.error("cannot be removed: no member has this name")
            new[index] = None
        elif index is None:
            new.append({**dataclasses.asdict(kind()), "name": name, **_coerce(kind, change, {}, here)})
        else:
            member = new[index] or {}
            new[index] = _deep_merge(member, _coerce(kind, change, member, here))
    return [member for member in new if member]


def _deep_merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``base`` with the fields of ``over``, merged section by section."""
    new = dict(base)
    for name, value in over.items():
        if isinstance(value, Mapping):
            new[name] = _deep_merge(base.get(name, {}), value)
        else:
            new[name] = value
    return new


def _coerce(kind: Any, value: Any, old: Any, place: SourceLocation) -> Any:
    """``value`` as plain data of the schema's type ``kind``.

    ``old``: the value of the layers below. Raises ConfigError.
    """
    if type(None) in typing.get_args(kind):
        if value is None:
            return None
        return _coerce(typing.get_args(kind)[0], value, old, place)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise place.error("needs a mapping of fields", "nothing" if value is None else value)
        fields: dict[str, Any] = {}
        for name, item in value.items():
            here = place.child(name, line_of(value, name))
            if name not in fields_of(kind):
                raise _unknown_key(kind, name, here)
            rules = kind.__dataclass_fields__[name].metadata
            if isinstance(item, bool) and set(YES_NO) <= set(rules.get("choices") or ()):
                item = YES_NO[0] if item else YES_NO[1]
            if rules.get("least"):
                item, least = _split_range(item, here)
                fields.setdefault(rules["least"], least)
            if rules.get("weights"):
                item, weights = _split_weights(item, here)
                fields.setdefault(rules["weights"], weights)
            fields[name] = _coerce(fields_of(kind)[name], item, (old or {}).get(name), here)
            if rules.get("decimal"):
                fields[name] = _canonical_decimal(fields[name], here)
        return fields
    if typing.get_origin(kind) is list:
        (member,) = typing.get_args(kind)
        is_section = dataclasses.is_dataclass(member)
        if is_section and isinstance(value, Mapping):
            return _change_members(member, value, old or [], place)
        if not isinstance(value, list):
            raise place.error("needs a list", "nothing" if value is None else value)
        if is_section:
            value = [expand_dotted_keys(item, place.where) if isinstance(item, Mapping) else item for item in value]
        items = [_coerce(member, item, None, place.child(i)) for i, item in enumerate(value)]
        if is_section:
            return [_deep_merge(dataclasses.asdict(member()), item) for item in items]
        return items
    return _coerce_scalar(kind, value, place)


def _split_range(value: Any, place: SourceLocation) -> tuple[Any, int]:
    """(the most, the least) of a range [LEAST, MOST]; the least of a single value is 0. Raises ConfigError."""
    if not isinstance(value, list):
        return value, 0
    if len(value) != 2:
        raise place.error("needs a number, or a range [LEAST, MOST]", value)
    least, most = (_coerce_scalar(int, item, place.child(i)) for i, item in enumerate(value))
    if not 1 <= least < most:
        raise place.error("a range needs 1 <= LEAST < MOST", value, "Example: [8, 16]")
    return most, least


def _split_weights(value: Any, place: SourceLocation) -> tuple[Any, list[float]]:
    """(members, weights) of a mapping of members to weights; a list has none. Raises ConfigError."""
    if not isinstance(value, Mapping):
        return value, []
    for name, weight in value.items():
        if isinstance(weight, Mapping):
            remedy = f"Write a list, and the weights in the same order as `{place.key.rpartition('.')[2]}` needs them."
            raise place.child(name).error("a name with a dot cannot have its weight in a mapping", remedy=remedy)
    return list(value), [_coerce_scalar(float, weight, place.child(name)) for name, weight in value.items()]


def _set(table: LocatedDict, path: Sequence[str], value: Any, place: SourceLocation) -> None:
    """Set ``table[a][b][c] = value`` for the path (a, b, c). Raises ConfigError if it is set already."""
    head, *rest = path
    if "" in path:
        raise place.error("a dotted key has an empty part")
    table.lines.setdefault(head, place.line)
    if rest or isinstance(value, Mapping):
        child = table.setdefault(head, LocatedDict())
        if not isinstance(child, LocatedDict):
            raise place.error("is set twice in different ways")
        if rest:
            _set(child, rest, value, place)
            return
        for key, item in value.items():
            _set(child, key.split("."), item, place.child(key, line_of(value, key)))
    elif head in table:
        raise place.error("is set twice in different ways")
    else:
        table[head] = value


def _find_preset(layers: Sequence[tuple[str, LocatedDict]], stored: bool) -> dict[str, Any]:
    """The model fields of the size given by the topmost layer.

    A stored configuration has all fields, so that its size may be one of another release.
    """
    size = Config().model.size
    place = SourceLocation("defaults", "model.size")
    for where, layer in layers:
        model = layer.get("model")
        if isinstance(model, Mapping) and isinstance(model.get("size"), str):
            size = model["size"]
            place = SourceLocation(where, "model.size", line_of(model, "size"))
    if size not in MODEL_PRESETS and not stored:
        near = suggestion(size.lower(), MODEL_PRESETS) or suggestion(size.upper(), MODEL_PRESETS)
        raise place.error("unknown model size", size, f"{near} Sizes: {', '.join(MODEL_PRESETS)}.".strip())
    return MODEL_PRESETS.get(size, {})


def _build(kind: Any, values: Any) -> Any:
    """An instance of a section of the schema with these values, or a list of them."""
    if typing.get_origin(kind) is list and dataclasses.is_dataclass(typing.get_args(kind)[0]):
        return [_build(typing.get_args(kind)[0], member) for member in values]
    if dataclasses.is_dataclass(kind):
        return copy.deepcopy(_build_section(typing.cast(Any, kind), json.dumps(values)))
    return values


@functools.lru_cache(1024)
def _build_section(kind: Any, values: str) -> Any:
    """Cached, as OmegaConf is slow and runs of a sweep share most sections."""
    from omegaconf import OmegaConf  # benchmarks of one GPU import this file on machines without it

    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), json.loads(values)))


def _given(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if value is not None and value != {}}
