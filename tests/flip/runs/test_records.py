"""Tests of the tables that describe records and documents, and of their errors."""

import pytest

from flip.runs.records import ANYTHING, COUNT, NUMBER, TEXT, Field, checked

ROW = {"stage": TEXT.needed(), "samples": COUNT}
TABLE = {
    "name": Field(TEXT, "its name", required=True),
    "loss": Field(NUMBER, required=True, null=True),
    "rows": [ROW],
    "env": {"*": TEXT},
    r"^test\..+\.n$": COUNT,
    "value": ANYTHING,
}
RECORD = {"name": "a", "loss": 1.5, "rows": [{"stage": "x", "samples": 3}], "env": {"A": "b"}, "test.imagenet.n": 5}


def test_record_of_the_declared_types_stays_the_same():
    record = {**RECORD, "value": [1, None], "of another release": {"a": 1}}
    assert checked(record, TABLE) == record


def test_null_is_absent_unless_the_field_may_be_null():
    record = {"name": "a", "loss": None, "rows": [{"stage": "x", "samples": None}], "test.a.n": None}
    assert checked(record, TABLE) == {"name": "a", "loss": None, "rows": [{"stage": "x"}]}


@pytest.mark.parametrize("change, message", [
    ({"name": 3}, "`name` is not text (found: 3)"),
    ({"name": None}, "lacks `name`"),
    ({"loss": "x"}, "`loss` is not a number within limits (found: 'x')"),
    ({"rows": {}}, "`rows` is not a list (found: {})"),
    ({"rows": [{"stage": "x"}, {"samples": 1}]}, "lacks `rows.1.stage`"),
    ({"rows": [{"stage": "x", "samples": -1}]}, "`rows.0.samples` is not a whole number from 0 to 10^18 (found: -1)"),
    ({"env": {"A": 1}}, "`env.A` is not text (found: 1)"),
    ({"test.imagenet.n": "x"}, "`test.imagenet.n` is not a whole number from 0 to 10^18 (found: 'x')"),
])  # fmt: skip
def test_error_names_field_type_and_value(change, message):
    with pytest.raises(ValueError) as caught:
        checked({**RECORD, **change}, TABLE)
    assert str(caught.value) == message
