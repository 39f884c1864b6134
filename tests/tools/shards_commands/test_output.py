"""Tests how the shards commands print numbers."""

import pytest

from tools.shards_commands.output import number


@pytest.mark.parametrize(
    "value, text", [(10_000.0, "10,000"), (1_234_567.8, "1,234,568"), (12.3456, "12.35"), (1e-7, "1e-07"), (7, "7")]
)
def test_number_writes_large_floats_without_exponent(value, text):
    assert number(value) == text
