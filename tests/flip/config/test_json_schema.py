"""Tests that a table and the JSON Schema made from it accept and refuse the same documents."""

import jsonschema
import pytest

from flip.config import json_schema
from flip.runs.records import ANYTHING, FLAG, INTEGER, NUMBER, TEXT, Field, FieldType, checked

STATE = FieldType("a state", lambda value: value in ("on", "off"), schema={"enum": ["on", "off"]})
TABLE = {
    "name": Field(TEXT, "its name", required=True),
    "loss": Field(NUMBER, "its loss", required=True, null=True),
    "state": Field(STATE, null=True),
    "rows": Field([{"steps": INTEGER.needed()}], "a row per attempt"),
    "env": {"*": TEXT},
    "yes": FLAG,
    "value": Field(ANYTHING, required=True, null=True),
    r"^test\..+\.n$": INTEGER,
}
DOCUMENT = {"name": "a", "loss": 0.5, "value": None}


@pytest.mark.parametrize("change", [
    {}, {"loss": None}, {"state": "on"}, {"state": None}, {"rows": []}, {"rows": [{"steps": 1, "more": "x"}]},
    {"env": {"A": "b"}}, {"yes": False}, {"value": [1]}, {"test.imagenet.n": 3}, {"another": {}},
])  # fmt: skip
def test_table_and_schema_accept_valid_document(change):
    checked({**DOCUMENT, **change}, TABLE)
    jsonschema.validate({**DOCUMENT, **change}, json_schema.of_table(TABLE))


@pytest.mark.parametrize("change", [
    {"name": 1}, {"name": None}, {"loss": "x"}, {"loss": True}, {"state": "maybe"}, {"rows": {}}, {"rows": [3]},
    {"rows": [{}]}, {"rows": [{"steps": 1.5}]}, {"env": {"A": 1}}, {"yes": "no"}, {"test.imagenet.n": "x"},
])  # fmt: skip
def test_table_and_schema_refuse_broken_document(change):
    with pytest.raises(ValueError):
        checked({**DOCUMENT, **change}, TABLE)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**DOCUMENT, **change}, json_schema.of_table(TABLE))


@pytest.mark.parametrize("name", ["name", "loss", "value"])
def test_table_and_schema_need_required_key(name):
    document = {key: value for key, value in DOCUMENT.items() if key != name}
    with pytest.raises(ValueError, match=f"lacks `{name}`"):
        checked(document, TABLE)
    with pytest.raises(jsonschema.ValidationError, match=f"'{name}' is a required property"):
        jsonschema.validate(document, json_schema.of_table(TABLE))


def test_schema_has_meanings():
    properties = json_schema.of_table(TABLE)["properties"]
    assert properties["name"] == {"type": "string", "description": "its name"}
    assert properties["loss"] == {"type": ["number", "null"], "description": "its loss"}
    assert properties["rows"]["description"] == "a row per attempt"
