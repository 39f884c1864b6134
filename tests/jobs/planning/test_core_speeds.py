"""Tests of the table of speeds of a core: which rows answer a question, and those that a measurement has."""

from dataclasses import asdict, replace

import pytest

from flip.runs.errors import ConfigError
from jobs.planning import core_speeds
from jobs.planning.core_speeds import FIXED_COST, Images, SpeedRow, SpeedTable, assumed_table, table_in
from jobs.planning.measurement import FAILED, MEASURED, MeasuredRow, read_measurement
from tests.jobs.planning.test_measurement import example

LARGE = Images(384, markers=False, stated=True)
SMALL = Images(256, markers=True, stated=True)


ROWS = [
    SpeedRow(256, False, 224, 0.5, False, 590.0),
    SpeedRow(384, False, 224, 0.5, False, 1070.0),
    SpeedRow(256, True, 224, 0.0, True, 325.0),
    SpeedRow(256, True, 224, 0.5, True, 285.0),
    SpeedRow(384, True, 224, 0.0, True, 580.0),
    SpeedRow(384, True, 224, 0.5, True, 505.0),
]
TABLE = SpeedTable(ROWS, "here")


@pytest.mark.parametrize(
    "images, mask, kernel, microseconds",
    [
        (LARGE, 0.5, False, 1070),
        (SMALL, 0.0, True, 325),
        (SMALL, 0.5, False, 590),  # markers help the kernel alone
        (SMALL, 0.25, True, (325 + 285) / 2),
        (SMALL, 0.9, True, 285),
    ],
)
def test_table_answers_with_its_rows_and_between_them(images, mask, kernel, microseconds):
    assert TABLE.microseconds(images, 224, mask, kernel) == pytest.approx(microseconds)
    assert TABLE.microseconds(images, 112, mask, kernel) == pytest.approx(microseconds), "the nearest view size"


def test_cost_is_linear_in_pixels():
    def cost(short):
        return TABLE.microseconds(Images(short, False, True), 224, 0.5, False)

    assert cost(256) < cost(320) < cost(384)
    assert cost(768) == pytest.approx(590 + (1070 - 590) * (768**2 - 256**2) / (384**2 - 256**2))
    assert cost(128) == pytest.approx(FIXED_COST + (590 - FIXED_COST) / 4)
    assert cost(1) == pytest.approx(FIXED_COST, abs=0.1)


@pytest.mark.parametrize("mask", [0.0, 0.5, 0.75])
def test_assumed_table_has_all_forms_and_each_costs_less_than_the_one_before(mask):
    table = assumed_table()
    for short in (256, 384):
        forms = [(False, False), (False, True), (True, True)]
        costs = [table.microseconds(Images(short, *form[:1], True), 224, mask, form[1]) for form in forms]
        assert sorted(costs, reverse=True) == costs and len(set(costs)) == 3
    assert "assumed speeds of a core" in table.origin


def test_missing_rows_are_replaced_by_slower_ones():
    plain = SpeedTable([SpeedRow(256, False, 224, 0.5, False, 600.0)], "here")
    assert plain.microseconds(SMALL, 224, 0.5, True) == 600
    with_kernel = SpeedTable([*plain.rows, SpeedRow(256, False, 224, 0.5, True, 300.0)], "here")
    assert with_kernel.microseconds(SMALL, 224, 0.5, True) == 300
    assert with_kernel.microseconds(SMALL, 224, 0.5, False) == 600


def test_plans_name_the_processor_of_the_assumed_table():
    processor = read_measurement(str(core_speeds.ASSUMED_FILE)).machine.processor
    assert " (family " in processor and processor in assumed_table().origin


def test_table_has_the_rows_of_all_data_sets_that_were_measured():
    def measured(name, status, *rows):
        return MeasuredRow(name, "cost of a sample", status, {"rows": [asdict(row) for row in rows]})

    rows = measured("input_cost", MEASURED, *ROWS[:2]), measured("input_cost_2", MEASURED, *ROWS[2:])
    table = table_in(example(*rows, measured("input_cost_3", FAILED, *ROWS[:1])), "measured.json", "here")
    assert table.rows == ROWS and table.origin == "here"


@pytest.mark.parametrize("records", [[], [{"short": 256}], 3, ["x"], [asdict(replace(ROWS[0], microseconds=0.0))]])
def test_damaged_speeds_are_refused(records):
    row = MeasuredRow("input_cost", "cost of a sample", MEASURED, {"rows": records})
    with pytest.raises(ConfigError, match="measured.json: no table of speeds"):
        table_in(example(row), "measured.json", "here")
