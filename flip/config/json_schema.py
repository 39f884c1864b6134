"""JSON Schema of settings, made from dataclasses: completion, descriptions and checks in editors.

Types, bounds and choices come from the fields (``flip.config.schema.option``), descriptions from the docstrings below
them. Rules between fields are not in the schema: ``flip.config.validate`` checks those at submission.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

from flip.config.schema import YES_NO

DIALECT = "http://json-schema.org/draft-07/schema#"
"""The newest one that editors support in full."""

Node = dict[str, Any]

_NUMBER = r"^[-+]?[0-9.][0-9_]*\.?[0-9_]*([eE][-+]?[0-9]+)?$"
"""Numbers that YAML 1.2 reads as text, such as 40_000, are read as numbers here."""
_SHARE: Node = {
    "type": ["number", "string"], "minimum": 0, "exclusiveMaximum": 1,
    "pattern": r"^\+?(0*\.[0-9_]+|0+\.?|[0-9.]+[eE]-[0-9]+)$",
}  # fmt: skip
"""A share from 0 to below 1, such as a mask. As text it starts with 0 or a dot, or has a negative exponent."""
_SCALARS: dict[Any, Node] = {
    int: {"type": ["integer", "string"], "pattern": _NUMBER},
    float: {"type": ["number", "string"], "pattern": _NUMBER},
    bool: {"enum": [True, False, "yes", "no"]},
    str: {"type": ["string", "number"]},
}
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def section(kind: Any) -> Node:
    """An object with the fields of a dataclass, those of its sections also under dotted keys.

    Members of a list of sections may also be given by name: ``stages: {pretrain: {...}}``, ``stages.pretrain.mask``.
    """
    properties: Node = {}
    patterns: Node = {}
    described = descriptions(kind)
    for name, hint in typing.get_type_hints(kind).items():
        member = (typing.get_args(hint) or (hint,))[0]
        if not dataclasses.is_dataclass(member):
            rules = kind.__dataclass_fields__[name].metadata
            if rules.get("decimal"):
                node = dict(_SHARE)
            else:
                node = field(hint, rules)
        elif member is hint:
            node = section(member)
            patterns |= {rf"^{name}\.{key[1:]}": value for key, value in node["patternProperties"].items()}
            properties |= {f"{name}.{key}": value for key, value in node["properties"].items()}
        else:
            item = section(member)
            optional = {"anyOf": [item, {"type": "null"}], "description": "The member's fields; null removes it."}
            within = {rf"^[\w-]+\.{re.escape(key)}$": value for key, value in item["properties"].items()}
            named = {"type": "object", "additionalProperties": optional, "patternProperties": within}
            node = {"anyOf": [{"type": "array", "items": item}, named]}
            patterns[rf"^{name}\.[\w-]+$"] = optional
            patterns |= {rf"^{name}\.{key[1:]}": value for key, value in within.items()}
        if name in described:
            properties[name] = {**node, "description": described[name]}
        else:
            properties[name] = node
    return {"type": "object", "properties": properties, "patternProperties": patterns, "additionalProperties": False}


def field(hint: Any, rules: Mapping[str, Any]) -> Node:
    """One value, or a list or mapping of values, with its rules."""
    if type(None) in typing.get_args(hint):
        return {"anyOf": [field(typing.get_args(hint)[0], rules), {"type": "null"}]}
    if typing.get_origin(hint) is list:
        return {"type": "array", "items": field(typing.get_args(hint)[0], rules)}
    if typing.get_origin(hint) is dict:
        return {"type": "object"}
    if rules.get("choices"):
        # YAML's, for yes and no
        booleans = []
        if set(YES_NO) <= set(rules["choices"]):
            booleans = [True, False]
        return {"enum": [*rules["choices"], *booleans]}
    number = {**_SCALARS[hint], **{word: rules[rule] for rule, word in _BOUNDS.items() if rule in rules}}
    if rules.get("least"):
        return {"anyOf": [number, {"type": "array", "items": number, "minItems": 2, "maxItems": 2}]}
    return number


def descriptions(kind: Any) -> dict[str, str]:
    """Name of a field -> the docstring below it, as one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(getattr(kind, "base", kind)))).body
    assert isinstance(definition, ast.ClassDef)
    descriptions_by_field = {}
    for node, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = None
            if isinstance(following, ast.Expr):
                text = following.value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                descriptions_by_field[node.target.id] = " ".join(text.value.replace("``", "`").split())
    return descriptions_by_field
