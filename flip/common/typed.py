"""Typed fields of the YAML files that users write: configurations, cluster profiles and sweep files.

An error names file, line and key, what the field needs, and the value; for an unknown key the nearest keys. JSON
records, which programs write, have a check of their own with the same ``FieldType`` (``flip.runs.records``): there an
unknown field comes from another release and stays, and hosts read them with Python 3.6 and without YAML.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, get_type_hints

from flip.common.option import descriptions, why_invalid
from flip.common.yaml_io import SourceLocation, line_of
from flip.runs.errors import ConfigError, nearest
from flip.runs.records import MAPPING, FieldType

_SPELLED = {"pattern": r"^[-+]?[0-9.][0-9_]*\.?[0-9_]*([eE][-+]?[0-9]+)?$"}
"""A number as text: YAML 1.2 reads numbers such as 40_000 as text."""

NO_DESCRIPTIONS: Mapping[str, str] = {}


def read_fields(
    table: Mapping[str, Any],
    types: Mapping[str, FieldType],
    place: SourceLocation,
    remedy: Callable[[str], str] = lambda name: "",
    about: Mapping[str, str] = NO_DESCRIPTIONS,
) -> dict[str, Any]:
    """The values of a mapping of known fields, converted to their types.

    ``place``: of the mapping. ``remedy``: what to do about an unknown key, if that is not to correct its spelling.
    ``about``: descriptions of fields.
    Raises ConfigError.
    """
    values = {}
    for name, value in table.items():
        here = place.child(name, line_of(table, name))
        if name not in types:
            raise unknown_key(name, types, here, remedy=remedy(name))
        values[name] = read_value(value, types[name], here, about.get(name, ""))
    return values


def read_section(kind: Any, table: Mapping[str, Any], place: SourceLocation) -> dict[str, Any]:
    """The given fields of a dataclass without sections, converted to their types.

    ``place``: of the mapping. Raises ConfigError for an unknown key, a wrong type, or a value that breaks a rule of its
    field (``flip.common.option``).
    """
    types = {name: TYPES[hint] for name, hint in get_type_hints(kind).items()}
    values = read_fields(table, types, place, about=descriptions(kind))
    for name, value in values.items():
        what, remedy = why_invalid(value, kind.__dataclass_fields__[name].metadata)
        if what:
            raise place.child(name, line_of(table, name)).error(what, value, remedy)
    return values


def read_value(value: Any, kind: FieldType, place: SourceLocation, about: str = "") -> Any:
    """``value``, converted to its type. ``about``: the description of the field. Raises ConfigError."""
    if not kind.fits(value):
        remedy = about and f"It is: {first_sentence(about)}"
        if value is None:
            raise place.error(f"has no value, and needs {kind.description}", remedy=remedy)
        raise place.error(f"needs {kind.description}", value, remedy or _form(value, kind))
    if kind.convert:
        return kind.convert(value)
    return value


def _form(value: Any, kind: FieldType) -> str:
    """How a value of another form is written, as a remedy; empty if that is not clear."""
    if kind.description == MAPPING.description and isinstance(value, str):
        return "Write `key: value` lines; a colon may be missing."
    if kind.description == MAPPING.description and isinstance(value, list):
        return "Write {name: , other: } in place of [name, other]."
    if kind.description.startswith("a list") and isinstance(value, (int, float, str)):
        return f"Write [{value}]."
    return ""


def first_sentence(text: str) -> str:
    """A description up to its first full stop or semicolon, with a full stop."""
    return re.split(r"[.;] |[.;]$", text, maxsplit=1)[0] + "."


def unknown_key(
    name: str, known: Iterable[str], place: SourceLocation, elsewhere: Iterable[str] = (), remedy: str = ""
) -> ConfigError:
    """The error for a key that no field has.

    ``known``: the keys in this mapping. ``elsewhere``: full keys of similar fields in others.
    """
    section = place.key.removesuffix(name)
    near = [section + other for other in nearest(name, known)]
    near += [key for key in elsewhere if key not in near]
    if near:
        spelling = f"Did you mean {' or '.join(near)}?"
    else:
        spelling = f"Keys here: {', '.join(known)}."
    return place.error("unknown key", remedy=remedy or spelling)


def parse_number(value: Any) -> Decimal | None:
    """The finite number that a value is or spells, within the range of floats; else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = Decimal(str(value).strip())
    except InvalidOperation:
        return None
    if number.is_finite() and abs(number.adjusted()) < 308:
        return number
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    number = parse_number(value)
    return number is not None and number == number.to_integral_value()


def _as_integer(value: Any) -> int:
    return int(Decimal(str(value).strip()))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_options(value: Any) -> bool:
    return isinstance(value, dict) and not any(isinstance(item, dict | list) for item in value.values())


def _options(value: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): "" if item in (None, True) else str(item) for key, item in value.items()}


TYPES: dict[Any, FieldType] = {
    str: FieldType("text", _is_text, str, schema={"type": ["string", "number"]}),
    int: FieldType("a whole number", _is_integer, _as_integer, schema={"type": ["integer", "string"], **_SPELLED}),
    float: FieldType(
        "a number",
        lambda value: parse_number(value) is not None,
        float,
        schema={"type": ["number", "string"], **_SPELLED},
    ),
    bool: FieldType(
        "true or false",
        lambda value: str(value).lower() in ("true", "false", "yes", "no"),
        lambda value: str(value).lower() in ("true", "yes"),
        schema={"enum": [True, False, "yes", "no"]},
    ),
    list[str]: FieldType("a list of texts", _is_texts),
    dict[str, str]: FieldType(
        "options and their values, without dashes", _is_options, _options, schema={"type": "object"}
    ),
}
"""Type of a dataclass's field -> its values in YAML. A number may be written as text: YAML reads 40_000 as text."""
