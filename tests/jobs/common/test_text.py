"""Tests of ``jobs.common.text``: numbers in words."""

import pytest

from jobs.common import text


@pytest.mark.parametrize(
    "number, words",
    [
        (None, "-"), (0, "0 B"), (999, "999 B"), (999.7, "1 kB"), (1500, "1.5 kB"), (999_600_000, "1 GB"),
        (2.5e12, "2.5 TB"), (999.6e12, "1,000 TB"), (1.234e15, "1,234 TB"),
    ],
)  # fmt: skip
def test_size_uses_next_unit_instead_of_exponent(number, words):
    assert text.size(number) == words


def test_counted_has_singular_of_what_is_rounded_to_one():
    """The page of a study said `1 minutes`."""
    words = [text.counted(number, "minute") for number in (0.2, 0.6, 1, 78.3, 2040)]
    assert words == ["0 minutes", "1 minute", "1 minute", "78 minutes", "2,040 minutes"]


@pytest.mark.parametrize(
    "hours, words",
    [(None, "-"), (0.0123, "0.0123"), (12.34, "12.3"), (999.4, "999"), (999.7, "1,000"), (1790, "1,790")],
)
def test_hours_text_has_no_exponent(hours, words):
    assert text.hours_text(hours) == words
