"""Tests that the names in CONTRIBUTING.md are defined in the files that it gives for them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLACE = re.compile(r"((?:`\w+`(?:, | and | or )?)+) in `((?:\w+/)+\w+\.py)`")
"""Names, and the file in which they are."""
NAMED = [(name, file) for names, file in PLACE.findall(PAGE) for name in re.findall(r"`(\w+)`", names)]
PLACES = sorted({(name, file) for name, file in NAMED if "NAME" not in file})


def is_defined(name, file):
    """Whether a file has a function, class, constant, key or field of this name."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.search(rf"^\s*(?:(?:async )?def|class) {name}\b|^\s*{name}\b[^=\n]*[:=]", text, re.MULTILINE) is not None


@pytest.mark.parametrize("name, file", PLACES)
def test_file_to_change_defines_the_name(name, file):
    assert is_defined(name, file)


def test_table_has_the_places_of_each_kind_of_change():
    assert len(PLACES) > 20
    assert not is_defined("NO_SUCH_TABLE", "flip/runs/errors.py")


@pytest.mark.parametrize("file", sorted(set(re.findall(r"`((?:tests|jobs|flip|tools)/[\w/]+\.py)`", PAGE))))
def test_named_file_exists(file):
    assert (ROOT / file).is_file() or "NAME" in file
