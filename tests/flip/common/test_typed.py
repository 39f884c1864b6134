"""Tests of the check that configurations, cluster profiles and sweep files share."""

import pytest

from flip.common.typed import TYPES, read_fields
from flip.common.yaml_io import SourceLocation, parse_yaml
from flip.runs.errors import ConfigError

KINDS = {name: TYPES[hint] for name, hint in {
    "width": int, "rate": float, "name": str, "fast": bool, "env": list[str], "options": dict[str, str],
}.items()}  # fmt: skip


def read(text):
    return read_fields(parse_yaml(text, "some.yaml"), KINDS, SourceLocation("some.yaml", "section"))


def test_values_are_converted_to_the_types_of_their_fields():
    text = "width: 40_000\nrate: 2\nname: 16\nfast: yes\nenv: [HOME]\noptions: {exclusive: , nice: 5}\n"
    values = read(text)
    assert values == {
        "width": 40_000, "rate": 2.0, "name": "16", "fast": True, "env": ["HOME"],
        "options": {"exclusive": "", "nice": "5"},
    }  # fmt: skip
    assert isinstance(values["rate"], float)


@pytest.mark.parametrize("text, message", [
    ("rate: 1\nwidht: 8", "some.yaml:2: section.widht: unknown key. Did you mean section.width?"),
    ("zzz: 8", "some.yaml:1: section.zzz: unknown key. Keys here: width, rate, name, fast, env, options."),
    ("width: 1.5", "some.yaml:1: section.width: needs a whole number (found: 1.5)."),
    ("width: true", "some.yaml:1: section.width: needs a whole number (found: True)."),
    ("rate: 1e999", "some.yaml:1: section.rate: needs a number (found: inf)."),
    ("name: [a]", "some.yaml:1: section.name: needs text (found: ['a'])."),
    ("name:", "some.yaml:1: section.name: has no value, and needs text."),
    ("fast: 1", "some.yaml:1: section.fast: needs true or false (found: 1)."),
    ("env: HOME", "some.yaml:1: section.env: needs a list of texts (found: 'HOME'). Write [HOME]."),
    ("options: [a]", "some.yaml:1: section.options: needs options and their values, without dashes (found: ['a'])."),
])  # fmt: skip
def test_error_names_line_key_requirement_and_value(text, message):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value) == message
