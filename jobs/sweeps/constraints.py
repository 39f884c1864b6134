"""The conditions of a sweep (`where` in docs/sweeps.md): comparisons of a run's settings, parsed, never evaluated.

line       = comparison {"or" comparison}           a run is selected if each of its lines holds
comparison = KEY ("==" | "!=" | "<" | "<=" | ">" | ">=") VALUE  |  KEY ["not"] "in" "[" VALUE {"," VALUE} "]"
VALUE      = number | text | "text" | true | false | null | KEY
"""

import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from flip.common.yaml_io import SourceLocation, parse_yaml
from flip.config.schema import Config
from flip.runs.errors import nearest

_WORD = r"""[^\s<>=!\[\]"']++"""
_COMPARISON = re.compile(
    rf"""\s*(?P<key>{_WORD})\s*(?P<op><=|>=|==|!=|<|>|not\s+in\b|{_WORD})"""
    rf"""\s*(?P<value>"[^"]*"|'[^']*'|\[[^\[\]]*\]|{_WORD})\s*(?P<joint>\S+)?"""
)
_ORDER: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_FORM = "For example: stages.pretrain.mask >= 0.5 or model.size in [B/16, L/16]. Every line must hold."


@dataclass(frozen=True)
class _Comparison:
    key: str
    op: str
    value: Any
    other: str = ""
    """The key to compare with; empty: ``value``."""

    @property
    def keys(self) -> Iterator[str]:
        yield self.key
        if self.other:
            yield self.other


@dataclass(frozen=True)
class Condition:
    """One line of comparisons, of which one must hold."""

    text: str
    place: SourceLocation
    any: tuple[_Comparison, ...]

    def check(self, settings: Collection[str]) -> None:
        """Raise ConfigError for a key that no run has."""
        for key in (key for comparison in self.any for key in comparison.keys if key not in settings):
            last = key.rpartition(".")[2]
            near = nearest(key, settings) or [name for name in settings if name.endswith("." + last)]
            remedy = "Give the full key, for example stages.pretrain.mask."
            if near:
                remedy = f"Did you mean {' or '.join(near[:3])}?"
            raise self.place.error(f"{key}: no such key in these runs", self.text, remedy)

    def holds(self, run: str, settings: Mapping[str, Any]) -> bool:
        """Whether it holds for the dotted settings of a run. Raises ConfigError if < or > compares no numbers."""
        return any(self._true(comparison, run, settings) for comparison in self.any)

    def _true(self, comparison: _Comparison, run: str, settings: Mapping[str, Any]) -> bool:
        left = settings.get(comparison.key)
        if comparison.other:
            right = settings.get(comparison.other)
        else:
            right = comparison.value
        if comparison.op in ("in", "not in"):
            return any(_same(left, item) for item in comparison.value) == (comparison.op == "in")
        if comparison.op in ("==", "!="):
            return _same(left, right) == (comparison.op == "==")
        numbers = _decimal(left), _decimal(right)
        if None in numbers:
            if numbers[0] is None:
                name = comparison.key
                value = left
            else:
                name = comparison.other or "the right side"
                value = right
            if value is None:
                shown = "absent"
                remedy = f"Start the line with `{comparison.key} == null or`."
            else:
                shown = repr(value)
                remedy = "Use ==, != or in."
            what = f"{name} is {shown} in run {run}: only numbers can be ordered"
            raise self.place.error(what, self.text, remedy)
        return _ORDER[comparison.op](*numbers)


def _decimal(value: Any) -> Decimal | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return None
    if number.is_finite():
        return number
    return None


def _same(left: Any, right: Any) -> bool:
    numbers = _decimal(left), _decimal(right)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return type(left) is type(right) and left == right


def parse(lines: Any, place: SourceLocation) -> tuple[Condition, ...]:
    """The conditions of ``where``: a line or a list of lines."""
    texts = lines if isinstance(lines, list) else [lines]
    if not texts:
        raise place.error("is empty", remedy=_FORM)
    for text in texts:
        if text is None:
            raise place.error("needs lines of comparisons", "nothing", _FORM)
        if not isinstance(text, str):
            raise place.error("needs lines of comparisons", text, _FORM)
        if "${" in text:
            raise place.error("interpolation is off", text, "Write the value itself.")
    return tuple(Condition(text, place, tuple(_comparisons(text, place))) for text in texts)


def _comparisons(text: str, place: SourceLocation) -> Iterator[_Comparison]:
    """The comparisons of a line. ConfigError for anything else."""
    at = 0
    joint = "or"
    while joint:
        match = _COMPARISON.match(text, at)
        if match is None:
            rest = text[at:].strip()
            if not rest:
                raise place.error("ends too early", text, _FORM)
            raise place.error(f"{rest[:40]} is not a comparison", text, _FORM)
        key, op, token, joint = match.group("key", "op", "value", "joint")
        yield _comparison(key, " ".join(op.split()), token, text, place)
        if joint == "and":
            raise place.error("comparisons of a line are joined by or", text, "Write two lines: every line must hold.")
        if joint not in (None, "or"):
            raise place.error(f"comparisons of a line are joined by or, not by {joint[:20]}", text, _FORM)
        at = match.end()


def _comparison(key: str, op: str, token: str, text: str, place: SourceLocation) -> _Comparison:
    if op not in ("==", "!=", "in", "not in", *_ORDER):
        raise place.error(f"{op} does not compare", text, f"==, !=, <, <=, >, >=, in and not in do. {_FORM}")
    in_list = op in ("in", "not in")
    if in_list and not token.startswith("["):
        raise place.error(f"{op} compares with a list, not with {token}", text, _FORM)
    if not in_list and token.startswith("["):
        raise place.error(f"{op} compares with one value, not with {token}", text, _FORM)
    if token[0] in "\"'":
        return _Comparison(key, op, token[1:-1])
    if "." in token and token.partition(".")[0] in Config.__dataclass_fields__:
        return _Comparison(key, op, None, token)
    value = parse_yaml(token, place.where)
    items = [value]
    if in_list:
        items = value
    if any(isinstance(item, (dict, list)) for item in items):
        raise place.error(f"{token} cannot be compared with", text, _FORM)
    if in_list:
        value = tuple(value)
    return _Comparison(key, op, value)
