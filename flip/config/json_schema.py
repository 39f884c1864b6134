"""JSON Schemas: of dataclasses that users write in YAML, for editors, and of JSON that programs write, for scripts.

``definitions``: of a dataclass. Types come from ``flip.common.typed.TYPES``, bounds and choices from the fields
(``flip.common.option``), descriptions from the docstrings below them. Rules between fields are not in the schema:
``flip.config.validate`` checks those at submission. Each section is a definition, and each field stands in its section
alone. The other places in which a field may be written, such as dotted keys, refer to it.

``of_table``: of a table of ``flip.runs.records``.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

from flip.common import user_classes
from flip.common.option import BOUNDS, descriptions
from flip.common.typed import TYPES
from flip.config.schema import YES_NO
from flip.runs.records import Field, FieldType

DIALECT = "http://json-schema.org/draft-07/schema#"
"""The newest one that editors support in full. Its keyword for shared parts is ``definitions``."""

Node = dict[str, Any]

_SHARE: Node = {
    "type": ["number", "string"], "minimum": 0, "exclusiveMaximum": 1,
    "pattern": r"^\+?(0*\.[0-9_]+|0+\.?|[0-9.]+[eE]-[0-9]+)$",
}  # fmt: skip
"""A share from 0 to below 1, such as a mask. As text it starts with 0 or a dot, or has a negative exponent."""


def definitions(kind: Any) -> dict[str, Node]:
    """Name of a dataclass -> the object with its fields, for a section and all sections below it.

    Fields of a section below may also be given under dotted keys, and members of a list of sections by name:
    ``stages: {pretrain: {...}}``, ``stages.pretrain.mask``.
    """
    nodes: dict[str, Node] = {}
    _define(kind, nodes)
    return nodes


def reference(name: str) -> Node:
    """The definition of this name."""
    return {"$ref": f"#/definitions/{name}"}


def references(name: str, properties: Mapping[str, Node]) -> dict[str, Node]:
    """Key -> a reference to this property of a definition, or to the place that the property itself refers to."""
    return {
        key: node if node.keys() == {"$ref"} else reference(f"{name}/properties/{key}")
        for key, node in properties.items()
    }


def closed(properties: Mapping[str, Node], patterns: Mapping[str, Node] | None = None) -> Node:
    """An object with these properties and no others. ``patterns``: regular expression of a key -> its node."""
    names: Node = {"type": "object", "properties": dict(properties)}
    if patterns:
        names["patternProperties"] = dict(patterns)
    return {**names, "additionalProperties": False}


def of_table(kind: Any) -> Node:
    """The JSON Schema of a declaration in the form of ``flip.runs.records``: a type, a table, a list, or a Field."""
    if isinstance(kind, Field):
        node = of_table(kind.kind)
        if kind.null:
            node = _or_null(node)
        return _described(node, kind.meaning)
    if isinstance(kind, FieldType):
        return kind.schema
    if isinstance(kind, list):
        return {"type": "array", "items": of_table(kind[0])}
    nodes = {name: of_table(declared) for name, declared in kind.items()}
    if nodes.keys() == {"*"}:
        return {"type": "object", "additionalProperties": nodes["*"]}
    properties = {name: node for name, node in nodes.items() if not name.startswith("^")}
    required = [name for name in properties if isinstance(kind[name], Field) and kind[name].required]
    table: Node = {"type": "object", "properties": properties, "required": required}
    patterns = {name: node for name, node in nodes.items() if name.startswith("^")}
    if patterns:
        table["patternProperties"] = patterns
    return table


def _or_null(node: Node) -> Node:
    """The node, which null satisfies too."""
    if not node:
        return node
    if isinstance(node.get("type"), str):
        return {**node, "type": [node["type"], "null"]}
    return {"anyOf": [node, {"type": "null"}]}


def _define(kind: Any, nodes: dict[str, Node]) -> None:
    """Add the definition of a section, unless it is present, and those of the sections below it."""
    if kind.__name__ in nodes:
        return
    base = getattr(kind, "base", None)
    if base:
        _define(base, nodes)
    properties: Node = {}
    patterns: Node = {}
    described = descriptions(kind)
    for name, hint in typing.get_type_hints(kind).items():
        member = (typing.get_args(hint) or (hint,))[0]
        if dataclasses.is_dataclass(member):
            _define(member, nodes)
            if member is hint:
                node = _section(name, member, nodes, properties, patterns)
            else:
                node = _members(name, member, nodes, patterns)
        elif base:
            node = _or_null(reference(f"{base.__name__}/properties/{name}"))
        else:
            node = _value(hint, kind.__dataclass_fields__[name].metadata)
        if not base:
            node = _described(node, described.get(name, ""))
        properties[name] = node
    nodes[kind.__name__] = closed(properties, patterns)


def _section(name: str, member: Any, nodes: Mapping[str, Node], properties: Node, patterns: Node) -> Node:
    """The section in field ``name``. Its fields are added to those of its owner, under dotted keys."""
    below = nodes[member.__name__]
    for key, node in references(member.__name__, below["properties"]).items():
        properties[f"{name}.{key}"] = node
    for key, node in below.get("patternProperties", {}).items():
        patterns[rf"^{name}\.{key[1:]}"] = node
    return reference(member.__name__)


def _members(name: str, member: Any, nodes: dict[str, Node], patterns: Node) -> Node:
    """The list of sections in field ``name``. Members and their fields are added to the keys of its owner, by name."""
    item = reference(member.__name__)
    change = f"Change{member.__name__}"
    nodes[change] = {"anyOf": [item, {"type": "null"}], "description": "The member's fields; null removes it."}
    fields = references(member.__name__, nodes[member.__name__]["properties"])
    within = {rf"^[\w-]+\.{re.escape(key)}$": node for key, node in fields.items()}
    patterns[rf"^{name}\.[\w-]+$"] = reference(change)
    for key, node in within.items():
        patterns[rf"^{name}\.{key[1:]}"] = node
    named = {"type": "object", "additionalProperties": reference(change), "patternProperties": within}
    return {"anyOf": [{"type": "array", "items": item}, named]}


def _described(node: Node, text: str) -> Node:
    """The node with its description, if any; this dialect ignores what stands next to a reference."""
    if not text:
        return node
    if "$ref" in node:
        return {"allOf": [node], "description": text}
    return {**node, "description": text}


def _value(hint: Any, rules: Mapping[str, Any]) -> Node:
    """One value, or a list or mapping of values, with its rules."""
    if rules.get("decimal"):
        return dict(_SHARE)
    if typing.get_origin(hint) is list:
        array = {"type": "array", "items": _value(typing.get_args(hint)[0], rules)}
        if rules.get("weights"):
            return {"anyOf": [array, {"type": "object", "additionalProperties": {"type": "number"}}]}
        return array
    if rules.get("user_class"):
        entry: Node = {"type": "string", "pattern": f"^{user_classes.PATTERN}$"}
        if rules.get("choices"):
            return {"anyOf": [{"enum": [*rules["choices"]]}, entry]}
        return entry
    if rules.get("choices"):
        # YAML's, for yes and no
        booleans = []
        if set(YES_NO) <= set(rules["choices"]):
            booleans = [True, False]
        return {"enum": [*rules["choices"], *booleans]}
    limits = {bound.keyword: rules[rule] for rule, bound in BOUNDS.items() if rule in rules}
    value = {**TYPES[hint].schema, **limits}
    if rules.get("least"):
        return {"anyOf": [value, {"type": "array", "items": value, "minItems": 2, "maxItems": 2}]}
    return value
