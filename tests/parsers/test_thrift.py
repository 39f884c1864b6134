"""Tests that any bytes are a struct of Thrift's compact protocol or a ThriftError, in time that grows with them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flip.data.parquet import thrift

NUMBER = b"\x15\x08"  # field 1 of type I32, the value 4


def test_numbers_structs_and_lists_are_values():
    inner = NUMBER + b"\x18\x02ab" + b"\x00"  # field 2 is a text of two bytes, which is skipped
    data = NUMBER + b"\x1c" + inner + b"\x19\x2c" + inner + inner + b"\x11" + b"\x00"
    fields, end = thrift.struct(b"??" + data, 2)
    value = {(1, thrift.I32): 4, (2, thrift.BINARY): None}
    assert end == 2 + len(data)
    assert fields == {(1, thrift.I32): 4, (2, thrift.STRUCT): value, (3, thrift.LIST): [value, value], (4, 1): True}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "runs past the end"),
        (NUMBER, "runs past the end"),
        (b"\x15" + b"\xff" * 10 + b"\x00", "more than 64 bits"),
        (NUMBER + b"\x05\x02\x08\x00", "field 1 stands twice"),
        (b"\x1b\x00", "a field of type 11"),
        (b"\x1c" * 100_000, "nested more than 16 deep"),
        (b"\x19" + b"\x19" * 100_000, "nested more than 16 deep"),
        (b"\x19\xf8\xff\xff\xff\xff\x07" + b"\x7f" * 100, "runs past the end"),  # 2^31 texts
        (b"\x19\xf3\xff\xff\xff\xff\x07\x00", "a list runs past the end"),  # 2^31 bytes
    ],
)
def test_damaged_structs_are_refused(data, why):
    with pytest.raises(thrift.ThriftError, match=why):
        thrift.struct(data, 0)


def test_a_struct_before_the_file_is_refused():
    with pytest.raises(thrift.ThriftError, match="before the file"):
        thrift.struct(NUMBER + b"\x00", -3)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_struct_or_an_error(data):
    try:
        _, end = thrift.struct(data, 0)
        assert 0 < end <= len(data)
    except thrift.ThriftError:
        pass
