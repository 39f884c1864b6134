"""Tests that every test named in docs/complaints.md exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "complaints.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not line.startswith("|--")
][1:]


def test_complaints_rows_have_three_filled_cells():
    assert len(ROWS) > 30 and {len(row) for row in ROWS} == {3} and all(all(row) for row in ROWS)


@pytest.mark.parametrize("named", sorted({row[2] for row in ROWS} - {"not yet"}))
def test_complaints_name_existing_tests(named):
    path, function = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", named).groups()
    assert re.search(rf"^def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
