"""Tests that every test named in docs/promises.md exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "promises.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("|") and not line.startswith("|--")
][1:]


def test_rows_have_two_filled_cells():
    assert len(ROWS) > 30 and {len(row) for row in ROWS} == {2} and all(all(row) for row in ROWS)


@pytest.mark.parametrize("named", sorted({row[1] for row in ROWS}))
def test_rows_name_existing_tests(named):
    path, function = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", named).groups()
    assert re.search(rf"^def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
