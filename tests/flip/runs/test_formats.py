"""Tests of the table of formats, of the check that all readers share, and of the page that shows the table."""

import re
from pathlib import Path

import pytest

from flip.runs import formats
from flip.runs.errors import CONFIG
from flip.runs.formats import FORMATS, FormatError
from flip.runs.rundir import load_record, read_lenient, read_record, write_json
from tests.harness.job_records import write_formats

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.file)
def test_every_number_that_is_written_is_read_and_no_other(form):
    for number in form.numbers:
        formats.check(form, {form.key: number}, "there")
    wrong = [
        (min(form.numbers) - 1, "an older version wrote this format"),
        (max(form.numbers) + 1, "a newer version wrote this format"),
        (None, "states no format"),
        (str(form.numbers[0]), "is no number of a format"),
        (True, "is no number of a format"),
    ]
    for number, words in wrong:
        with pytest.raises(FormatError, match=words) as error:
            formats.check(form, {form.key: number}, "/runs/a/file")
        assert error.value.code == CONFIG and "/runs/a/file" in str(error.value) and form.remedy in str(error.value)
    for record in ({}, [], None):
        with pytest.raises(FormatError, match="states no format"):
            formats.check(form, record, "there")


def test_page_shows_every_format_with_its_numbers():
    page = (ROOT / "docs" / "contracts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| `(\w+)` \| ([\d, ]+) \| (.+) \|$", page, re.MULTILINE)
    shown = [
        (file.replace("`", ""), key, tuple(map(int, numbers.split(", "))), holds) for file, key, numbers, holds in rows
    ]
    assert shown == [(form.file.replace("`", ""), form.key, form.numbers, form.holds) for form in FORMATS]


def test_numbers_of_formats_stand_in_one_module():
    """A second constant would let a writer and a reader disagree."""
    for name in ("CONFIG", "RUN", "EVALUATION", "MANIFEST", "ORDER", "EXPORT", "MEASUREMENT", "AGENT"):
        places = [
            path.relative_to(ROOT).as_posix()
            for folder in ("flip", "jobs", "tools", "lab")
            for path in (ROOT / folder).rglob("*.py")
            if re.search(rf"^{name}_NUMBER = ", path.read_text(encoding="utf-8"), re.MULTILINE)
        ]
        assert places == ["flip/runs/formats.py"]


@pytest.mark.parametrize("name", formats.BY_FILE)
def test_readers_of_records_refuse_another_format_and_lists_show_it_as_damaged(tmp_path, name):
    path = tmp_path / name
    write_json(path, {"schema": 99})
    for read in (read_record, load_record):
        with pytest.raises(FormatError, match="a newer version"):
            read(path)
    with pytest.raises(ValueError, match="a newer version"):
        read_record(path)
    assert read_lenient(path) == {}


def test_record_without_a_required_field_is_refused_by_name(tmp_path):
    write_json(tmp_path / "owner.json", {"folder": "/runs/a"})
    with pytest.raises(FormatError, match="owner.json: lacks `id`") as error:
        load_record(tmp_path / "owner.json")
    assert error.value.code == CONFIG and error.value.remedy == formats.RESTORE


def test_code_of_a_run_with_other_messages_is_refused(tmp_path):
    formats.check_code(write_formats(tmp_path))
    place = tmp_path / "flip" / "runs" / "formats.py"
    text = place.read_text()
    for other in ("", text.replace("AGENT_NUMBER = 2", "AGENT_NUMBER = 3"), text.replace("AGENT_NUMBER = 2", "")):
        place.write_text(other)
        with pytest.raises(FormatError, match="other messages of node agents") as error:
            formats.check_code(tmp_path)
        assert f"mv {tmp_path} {tmp_path}.other" in error.value.remedy
    place.unlink()
    with pytest.raises(FormatError, match="other messages of node agents"):
        formats.check_code(tmp_path)
