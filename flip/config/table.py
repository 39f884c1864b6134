"""YAML as this project reads and writes it: mappings that remember their lines, numbers as people write them.

The scalars are those of YAML 1.2's core schema: ``12.8e9`` is a number, ``yes``, ``010`` and ``1:30`` are text. Keys
are always text. A key that stands twice in a mapping is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flip.exitcodes import ConfigError, PermissionDenied

_LoaderBase: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DumperBase: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

_SCALARS = (
    ("merge", r"<<", "<"),
    ("null", r"~|null|", "~n\0"),
    ("bool", r"true|True|false|False", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
)


class Table(dict[str, Any]):
    """A mapping that remembers the line (1-based) of each of its keys, where it came from a file."""

    def __init__(self, values: Mapping[str, Any] | None = None, lines: Mapping[str, int] | None = None) -> None:
        super().__init__(values or {})
        self.lines = dict(lines or {})


@dataclass(frozen=True)
class Place:
    """Where a value stands: the layer's name, the dotted key, the line of it (0: unknown)."""

    where: str
    key: str = ""
    line: int = 0

    def child(self, name: str | int, line: int = 0) -> Place:
        return Place(self.where, f"{self.key}.{name}" if self.key else str(name), line or self.line)

    def error(self, what: str, value: Any = None, remedy: str = "") -> ConfigError:
        place = f"{self.where}:{self.line}" if self.line else self.where
        return ConfigError(f"{self.key}: {what}" if self.key else what, place, value, remedy)


class _Loader(_LoaderBase):  # type: ignore[misc]
    yaml_implicit_resolvers: dict[str, list[Any]] = {}


class _Dumper(_DumperBase):  # type: ignore[misc]
    """Quotes what a reader of either YAML 1.1 or 1.2 would take for something else than text."""

    yaml_implicit_resolvers = {first: list(rules) for first, rules in _DumperBase.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _firsts = ["" if character == "\0" else character for character in _first]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), _firsts)


def _mapping(loader: Any, node: yaml.MappingNode) -> Table:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
        if key.value in seen:
            problem = f"the key {key.value!r} stands twice (first in line {seen[key.value]})"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        seen[key.value] = key.start_mark.line + 1
    loader.flatten_mapping(node)
    table = Table()
    for key, value in node.value:
        table[key.value] = loader.construct_object(value, deep=True)
        table.lines[key.value] = key.start_mark.line + 1
    return table


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Raises ConfigError with line and column where it is not YAML, or a key stands twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        line = text.split("\n")[mark.line : mark.line + 1] if mark else []
        remedy = "It is a tab: indent with spaces." if line and line[0][mark.column : mark.column + 1] == "\t" else ""
        raise ConfigError(f"not valid YAML: {error.problem or error.context}", place, remedy=remedy) from error
    except (yaml.YAMLError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"not valid YAML: {problem}", where) from error
    except RecursionError as error:
        raise ConfigError("not valid YAML: nested too deeply", where) from error


def read_yaml(path: str | os.PathLike[str]) -> Table:
    """The mapping that a YAML file holds; an empty file is an empty mapping.

    Raises ConfigError where the file is missing, not UTF-8, not YAML or not a mapping; PermissionDenied where it may
    not be read.
    """
    where = str(path)
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError("no such file", where) from error
    except IsADirectoryError as error:
        raise ConfigError("a folder, not a YAML file", where) from error
    except PermissionError as error:
        remedy = "Ask its owner for read permission, or choose another file."
        raise PermissionDenied("may not be read", where, remedy=remedy) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        remedy = "Save the file as UTF-8."
        raise ConfigError(f"not UTF-8 text: byte 0x{byte:02x}", f"{where}:{line}", remedy=remedy) from error
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where) from error
    value = parse_yaml(text, where)
    if value is None:
        return Table()
    if not isinstance(value, Table):
        remedy = "Write `key: value` lines."
        raise ConfigError(f"a mapping is needed at the top, not a {type(value).__name__}", where, remedy=remedy)
    return value


def dump_yaml(value: Any) -> str:
    """YAML text of plain values, keys in their order, the same text for the same value."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text
