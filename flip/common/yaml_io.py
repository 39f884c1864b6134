"""Reads and writes YAML: mappings know the lines of their keys, scalars follow the core schema of YAML 1.2.

``12.8e9`` is a number; ``yes``, ``010`` and ``1:30`` are text. Keys are always text. A duplicate key is an error.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from flip.runs.errors import ConfigError, PermissionDenied, read_error

log = logging.getLogger(__name__)
_LoaderBase: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DumperBase: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

MAX_VALUES = 100_000
"""Limit of values in a file."""
MAX_BYTES = 1 << 20
"""Limit of bytes of a file."""
_SCALARS = (
    ("merge", r"<<", "<"),
    ("null", r"~|null|", "~n\0"),
    ("bool", r"true|True|false|False", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
)
"""Tag of plain scalars, their pattern, and the characters that they can start with (NUL: an empty scalar)."""


_ODD_SPACE = re.compile("[ -]*(?:[\\w.-]+:)?([\u00a0\u2000-\u200d\u202f\u2060\u3000\ufeff])")
"""At the start of a line, or after its key."""
_COMMENT = re.compile(r"\s*#")
_NO_COLON = ("mapping values are not allowed in this context", "could not find expected ':'")
"""Problems that a line without a colon causes in a line below it."""


class LocatedDict(dict[str, Any]):
    """A mapping with the line (1-based) of each key that came from a file."""

    def __init__(self, values: Mapping[str, Any] | None = None, lines: Mapping[str, int] | None = None) -> None:
        super().__init__(values or {})
        self.lines = dict(lines or {})


def line_of(mapping: Any, key: str) -> int:
    """The line of a key, 0 if unknown."""
    if isinstance(mapping, LocatedDict):
        return mapping.lines.get(key, 0)
    return 0


@dataclass(frozen=True)
class SourceLocation:
    """The location of a value: the layer's name, the dotted key, its line (0: unknown).

    ``stored``: the layer is the configuration of an existing run.
    """

    where: str
    key: str = ""
    line: int = 0
    stored: bool = False

    def child(self, name: str | int, line: int = 0) -> SourceLocation:
        """The location of a key of this mapping, or of a member of this list."""
        key = f"{self.key}.{name}" if self.key else str(name)
        return SourceLocation(self.where, key, line or self.line, self.stored)

    def error(self, what: str, value: Any = None, remedy: str = "") -> ConfigError:
        """The error for the value at this location."""
        if self.line:
            place = f"{self.where}:{self.line}"
        else:
            place = self.where
        return ConfigError(f"{self.key}: {what}" if self.key else what, place, value, remedy)


def read_yaml(path: str | os.PathLike[str]) -> LocatedDict:
    """Read the mapping of a YAML file; an empty file is an empty mapping.

    Raises ConfigError if the file is missing, too large, not UTF-8, not YAML or not a mapping, and PermissionDenied if
    it may not be read.
    """
    where = str(path)
    log.debug("reading %s", where)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"more than {MAX_BYTES:,} bytes, too large for a configuration", where)
        text = data.decode("utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError("no such file", where) from error
    except IsADirectoryError as error:
        raise ConfigError("a folder, not a YAML file", where) from error
    except PermissionError as error:
        remedy = "Ask its owner for read permission, or choose another file."
        raise PermissionDenied("may not be read", where, remedy=remedy) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        what = f"not UTF-8 text: byte 0x{error.object[error.start]:02x}"
        raise ConfigError(what, f"{where}:{line}", remedy="Save the file as UTF-8.") from error
    except OSError as error:
        raise read_error(error, "cannot be read", where) from error
    _refuse_odd_space(text, where)
    value = parse_yaml(text, where)
    if value is None:
        return LocatedDict()
    if not isinstance(value, LocatedDict):
        what = f"a mapping is needed at the top, not a {type(value).__name__}"
        raise ConfigError(what, where, remedy="Write `key: value` lines.")
    return value


def parse_yaml(text: str, where: str) -> Any:
    """Parse a YAML text. Raises ConfigError with line and column if it is not valid YAML or repeats a key."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None or not _count(node, {}):
                return None
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, text, where) from error
    except (yaml.YAMLError, ValueError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"not valid YAML: {problem}", where) from error
    except RecursionError as error:
        raise ConfigError("not valid YAML: nested too deeply", where) from error


def _syntax_error(error: yaml.MarkedYAMLError, text: str, where: str) -> ConfigError:
    """The error for a text that is no YAML, at the line to correct."""
    mark = error.problem_mark or error.context_mark
    problem = f"not valid YAML: {error.problem or error.context}"
    if mark is None:
        return ConfigError(problem, where)
    lines = text.split("\n")
    place = f"{where}:{mark.line + 1}:{mark.column + 1}"
    if "".join(lines[mark.line : mark.line + 1])[mark.column : mark.column + 1] == "\t":
        return ConfigError(problem, place, remedy="It is a tab: indent with spaces.")
    if error.problem == "but found another document":
        remedy = "A file has one document: remove the line ---, or write two files."
        return ConfigError("a second YAML document starts here", place, remedy=remedy)
    if error.problem in _NO_COLON:
        # the parser reads on, and complains of a later line
        above = [i for i in range(min(mark.line, len(lines))) if lines[i].strip() and not _COMMENT.match(lines[i])]
        if above and ":" not in lines[above[-1]]:
            line = lines[above[-1]].strip()
            return ConfigError("not valid YAML: no colon", f"{where}:{above[-1] + 1}", line, "Write `key: value`.")
    return ConfigError(problem, place)


def _refuse_odd_space(text: str, where: str) -> None:
    """Raise ConfigError for an invisible character that stands where YAML needs a space: it becomes part of a key."""
    for number, line in enumerate(text.split("\n"), 1):
        odd = _ODD_SPACE.match(line)
        if odd:
            what = f"an invisible character U+{ord(odd.group(1)):04X}, which is no space in YAML"
            remedy = "Replace it by a space. Copied text often has such characters."
            raise ConfigError(what, f"{where}:{number}:{odd.start(1) + 1}", remedy=remedy)


def dump_yaml(value: Any) -> str:
    """YAML text of plain values, keys in their order; equal values give equal texts."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


class _Loader(_LoaderBase):  # type: ignore[misc]
    """Reads scalars by ``_SCALARS`` alone, and mappings as ``LocatedDict``."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


class _Dumper(_DumperBase):  # type: ignore[misc]
    """Quotes text that a reader of YAML 1.1 or 1.2 would not read as text."""

    yaml_implicit_resolvers = {first: list(rules) for first, rules in _DumperBase.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _firsts = ["" if character == "\0" else character for character in _first]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), _firsts)


def _mapping(loader: Any, node: yaml.MappingNode) -> LocatedDict:
    """A mapping with the lines of its keys. Raises ConstructorError for a duplicate key or one that is no scalar."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
        if key.value in lines:
            problem = f"the key {key.value!r} occurs twice (first in line {lines[key.value]})"
            raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        lines[key.value] = key.start_mark.line + 1
    loader.flatten_mapping(node)
    table = LocatedDict()
    for key, value in node.value:
        table[key.value] = loader.construct_object(value, deep=True)
        table.lines[key.value] = key.start_mark.line + 1
    return table


def _bool(loader: Any, node: yaml.ScalarNode) -> bool:
    if str(node.value).lower() not in ("true", "false"):
        raise yaml.constructor.ConstructorError(None, None, "true or false is needed", node.start_mark)
    return str(node.value).lower() == "true"


# Only the tags of YAML's core schema: no dates, bytes or sets.
_Loader.yaml_constructors = {
    tag: _LoaderBase.yaml_constructors[tag]
    for tag in (None, *(f"tag:yaml.org,2002:{name}" for name in ("null", "int", "float", "str", "seq")))
}
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:bool", _bool)


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values below a node, with those of an alias each time that it occurs.

    A short text of nested aliases can expand to more values than memory holds, or to itself.
    """
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # until it is counted: a node that contains itself is infinite
        if isinstance(node, yaml.MappingNode):
            below = [child for pair in node.value for child in pair]
        else:
            below = node.value
        if isinstance(node, yaml.ScalarNode):
            known[id(node)] = 1
        else:
            known[id(node)] = 1 + sum(_count(child, known) for child in below)
    if known[id(node)] > MAX_VALUES:
        problem = f"its aliases expand to more than {MAX_VALUES:,} values"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return known[id(node)]
