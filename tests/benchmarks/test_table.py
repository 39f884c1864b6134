"""Tests that RESULTS.md and the figures quoted from it match the files in benchmarks/results/."""

import json
import re

import pytest

from benchmarks import table
from benchmarks.lib import gpu_rows, results
from benchmarks.lib.table_rows import NOT_MEASURED, Row, goal, limited

RESULTS = table.read(table.RESULTS)
ON_GPU = gpu_rows.read(table.RESULTS / "gpu")


def test_results_page_is_up_to_date():
    assert table.PAGE.read_text(encoding="utf-8") == table.page(RESULTS, ON_GPU), "python benchmarks/table.py"


@pytest.mark.parametrize("path", table.quoting(), ids=lambda path: path.name)
def test_quoted_figures_equal_those_of_results(path):
    text = path.read_text(encoding="utf-8")
    assert text == table.filled(text, RESULTS, path), "python benchmarks/table.py"
    assert len(re.findall("<!-- (?:figure|ours|peer) ", text)) == len(table.QUOTED.findall(text))


def test_table_corrects_wrong_readme_figure_and_rejects_unknown_row():
    text = table.quoting()[0].read_text(encoding="utf-8")
    name, what, value = table.QUOTED.search(text).group(3, 4, 5)
    assert any(row.what == what for row in table.rows(RESULTS)[name]) or value == NOT_MEASURED
    wrong = table.QUOTED.sub(r"\g<1>9.99\6", text)
    assert wrong != text and table.filled(wrong, RESULTS, "README.md") == text
    with pytest.raises(SystemExit, match="no row of the table is order: nothing"):
        table.filled("<!-- figure order: nothing -->1<!-- end -->", RESULTS, "README.md")


def test_every_benchmark_script_has_table_rows_and_make_entry():
    scripts = {p.stem for p in (table.ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text("utf-8")}
    assert set(table.ROWS) == scripts - {
        "table",
        "scale",
        "gpu",
        "core_speeds",
        "make_shards",
    }  # these write files of their own
    assert not [name for name, entry in ON_GPU.items() if entry["quick"]]
    assert {path.stem for path in table.RESULTS.glob("*.json")} <= {*table.ROWS, "scale"}
    assert not [name for name, result in RESULTS.items() if result.get("quick")]
    listed = next(line for line in (table.ROOT / "Makefile").read_text().splitlines() if line.startswith("BENCHMARKS"))
    assert set(listed.split(":=")[1].split()) == set(table.ROWS)


def test_results_page_names_command_for_missing_results():
    page = table.page({}, {})
    assert "`make bench ONLY=stream`" in page and page.count("| not run |") == len(gpu_rows.ROWS)
    assert page.count("| not measured | `") == len(table.ROWS)


def test_table_rows_format_figures_and_judge_goals():
    assert goal(0.9, ">=", 0.85) == {"goal": ">= 0.85", "reached": True}
    assert goal(0.8, ">=", 0.85)["reached"] is goal(1.1, "<", 1.0)["reached"] is False
    row = Row("what", "3 s", "4 s", 0.75, (0.7, 1234.4))
    assert row.figure == "0.75 (0.7 to 1,234)" and Row("what", "3 s").figure == "3 s"
    slow = limited("what", {"seconds": 2.5, "least": 2.0, "most": 3.0, "limit": 2})
    assert (slow.figure, slow.goal, slow.reached) == ("2.5 s (2 to 3)", "< 2 s", False)


def test_recovery_of_silent_node_is_measured_beside_the_time_that_slurm_takes():
    silent = {"case": "silent", "seconds": 50, "until_dropped": 43, "beside": {"median": 7}}
    cases = [{"case": "spare", "seconds": 16}, silent, {"case": "requeue", "seconds": 8}]
    spare, silent_row, _ = table.ROWS["recovery"]({"cases": cases})
    assert (spare.goal, spare.reached, spare.ratio) == ("<= 15 s", False, 2.0) and "connections end" in spare.what
    assert (silent_row.own, silent_row.goal, silent_row.reached, silent_row.ratio) == ("7 s", "<= 15 s", True, None)
    assert silent_row.peer == "until Slurm drops it: 43 s"


@pytest.mark.parametrize("path", sorted(table.RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_published_results_can_be_printed(path):
    assert results._lines(json.loads(path.read_text(encoding="utf-8")))


def test_printed_rows_may_lack_values():
    assert results._table([{"case": "a", "least": 1}, {"case": "b", "most": 2.5, "of_parts": {}}], "") == [
        "case  least  most", "   a      1      ", "   b          2.5",
    ]  # fmt: skip
