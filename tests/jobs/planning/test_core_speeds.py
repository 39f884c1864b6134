"""Tests of the table of speeds of a core: which rows answer a question, and the file that holds measured rows."""

import datetime
from dataclasses import replace

import pytest

from flip.config.yaml_io import dump_yaml
from flip.runs.errors import ConfigError
from jobs.planning import core_speeds
from jobs.planning.core_speeds import FIXED_COST, Images, SpeedRow, SpeedTable, assumed_table

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


def written(folder, content):
    path = folder / "speeds.yaml"
    path.write_text(dump_yaml(content))
    return core_speeds.read_table(str(path))


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


def test_file_of_speeds_is_read_and_names_its_origin(tmp_path):
    row = SpeedRow(256, False, 224, 0.5, False, 600.0)
    table = written(tmp_path, core_speeds.file_content([row], "a processor"))
    assert [row.microseconds for row in table.rows] == [600]
    today = datetime.date.today().isoformat()
    assert table.origin == f"speeds of a core in {tmp_path / 'speeds.yaml'}, measured {today} on a processor"


def test_file_of_speeds_names_the_processors_of_all_its_rows(tmp_path):
    rows = [SpeedRow(256, False, 224, 0.5, False, 600.0), SpeedRow(256, False, 224, 0.75, False, 550.0)]
    old = SpeedTable([replace(row, microseconds=700.0) for row in rows], "here", "an old one")
    table = written(tmp_path, core_speeds.file_content(rows[:1], "a new one", old))
    assert [row.microseconds for row in table.rows] == [600, 700] and table.processor == "an old one and a new one"
    again = core_speeds.file_content(rows[:1], "a new one", table)
    assert again["processor"] == "an old one and a new one"
    assert core_speeds.file_content(rows, "a new one", table)["processor"] == "a new one", "no old row is left"


def test_plans_name_the_processor_of_the_assumed_table():
    table = assumed_table()
    assert " (family " in table.processor and table.processor in table.origin


@pytest.mark.parametrize("text", ["rows: []", "rows: [{short: 256}]", "date: x", "rows: 3", "rows: [x]"])
def test_damaged_file_of_speeds_is_refused(tmp_path, text):
    (tmp_path / "speeds.yaml").write_text(f"processor: p\n{text}\n")
    with pytest.raises(ConfigError, match="no table of speeds"):
        core_speeds.read_table(str(tmp_path / "speeds.yaml"))
