"""How a field of a dataclass that users write in YAML is described: ``option``, its default and its rules.

Configurations (``flip.config.schema``) and cluster profiles (``jobs.common.cluster_profile``) are such dataclasses. A
field's type is an entry of ``flip.common.typed.TYPES``, and the docstring below it is its description. From these come
the check of a file with its errors, the JSON Schema for editors (``flip.config.json_schema``), and the page of all
fields. JSON that programs write is described by the tables of ``flip.runs.records``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flip.common import user_classes
from flip.runs import addresses


@dataclass(frozen=True)
class Bound:
    """A kind of limit of a number, such as ``ge``."""

    holds: Callable[[Any, Any], bool]
    """Whether a value keeps a limit."""
    words: str
    """For errors."""
    keyword: str
    """Of JSON Schema."""
    sign: str
    """For pages."""


BOUNDS = {
    "ge": Bound(operator.ge, "at least", "minimum", "≥"),
    "gt": Bound(operator.gt, "above", "exclusiveMinimum", ">"),
    "le": Bound(operator.le, "at most", "maximum", "≤"),
    "lt": Bound(operator.lt, "below", "exclusiveMaximum", "<"),
}
"""Rules of ``option`` that are limits of numbers."""


def option(
    default: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[Any] | None = None,
    identity: bool = True,
    omit_if: Any = None,
    auto: Any = None,
    decimal: bool = False,
    path: str | None = None,
    least: str | None = None,
    weights: str | None = None,
    user_class: str | None = None,
) -> Any:
    """A dataclass field whose metadata are its rules. ``default``: a value, a list, or a section's class.

    Args:
        ge, gt, le, lt: bounds of the number, or of each number of a list (``why_invalid``).
        choices: the allowed values (``why_invalid``).
        identity: False for a label, or for a field that changes when or how a run computes, but not its result.
        omit_if: for a field added to an existing schema: the value that means the behaviour before the field existed.
            With that value the field is not part of the config hash, so that old runs keep theirs. A later change of
            the default never changes it.
        auto: the value that ``resolve_auto`` replaces.
        decimal: the text is a decimal number, stored in its shortest form.
        path: the text is a path, which ``resolve_auto`` makes absolute. In the config hash a ``manifest`` is
            replaced by its digest and a ``file`` by its checksum; a ``folder`` stays.
        least: users may write a range [LEAST, MOST]: the field has MOST, and the field of this name LEAST.
        weights: users may write a mapping of members to weights: the list has the members, and the field of this name
            the weights.
        user_class: the text may also be FILE.py:Class, a user's class derived from the class of this name; without
            ``choices`` it must be (``flip.common.user_classes``).
    """
    given = {
        "ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices, "identity": identity, "omit_if": omit_if,
        "auto": auto, "decimal": decimal, "path": path, "least": least, "weights": weights, "user_class": user_class,
    }  # fmt: skip
    rules = {name: value for name, value in given.items() if value is not None}
    if isinstance(default, type):
        return field(default_factory=default, metadata=rules)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=rules)
    return field(default=default, metadata=rules)


def why_invalid(value: Any, rules: Mapping[str, Any]) -> tuple[str, str]:
    """(what the rules of a field require of a value, remedy) if it breaks one of them; else two empty texts.

    ``rules``: the metadata of a field. ``value``: one value, of a list each member.
    """
    choices = rules.get("choices")
    if "user_class" in rules:
        return _why_no_class(value, choices or ())
    if choices and value not in choices:
        return "no such choice", f"One of: {', '.join(map(str, choices))}."
    for rule, bound in BOUNDS.items():
        if rule in rules and not bound.holds(value, rules[rule]):
            return f"must be {bound.words} {rules[rule]}", ""
    if "path" in rules:
        return addresses.why_not_local(value)
    return "", ""


def _why_no_class(values: Any, choices: Sequence[str]) -> tuple[str, str]:
    """As ``why_invalid``, of a field with the rule ``user_class``; ``values``: its value, or all members of a list."""
    for value in values if isinstance(values, list) else [values]:
        if value not in choices and not user_classes.is_entry(value):
            if choices:
                return "no such choice", f"One of: {', '.join(choices)}, or FILE.py:Class."
            return "needs FILE.py:Class", "Name a file in the folder of the sweep file, and a class: mine.py:Mine."
    return "", ""


@functools.cache
def descriptions(kind: Any) -> dict[str, str]:
    """Name of a field -> the docstring below it, as one line."""
    import ast  # only for errors and schemas
    import inspect
    import textwrap

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
