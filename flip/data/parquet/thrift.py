"""Structs of Thrift's compact protocol, as the headers of a parquet file have them, from untrusted bytes.

A struct is read without its definition: numbers, structs and lists of structs are values, texts and fractions are
skipped. Time and memory grow with the bytes that are read, whatever numbers these state.
"""

from typing import Any

DEPTH_LIMIT = 16
"""Structs and lists inside each other. A footer of today has 8."""

# Types of fields.
TRUE = 1
FALSE = 2
BYTE = 3
I16 = 4
I32 = 5
I64 = 6
DOUBLE = 7
BINARY = 8
LIST = 9
STRUCT = 12

Fields = dict[tuple[int, int], Any]
"""(number, type) -> value; a reader ignores a field that has the number but another type."""


class ThriftError(ValueError):
    """The bytes are not a struct."""


def struct(data: Any, at: int) -> tuple[Fields, int]:
    """The fields of the struct at offset ``at``, and its end.

    Args:
        data: bytes, or anything that is indexed as bytes are, such as a memory map of a file.

    Raises ThriftError if it is damaged.
    """
    if at < 0:
        raise ThriftError("a struct begins before the file")
    try:
        return _struct(data, at, DEPTH_LIMIT)
    except IndexError as error:
        raise ThriftError("a struct runs past the end") from error


def _struct(data: Any, at: int, depth: int) -> tuple[Fields, int]:
    if depth == 0:
        raise ThriftError(f"structs are nested more than {DEPTH_LIMIT} deep")
    fields = Fields()
    number = 0
    while head := data[at]:
        kind = head & 15
        if head >> 4:
            number += head >> 4
            at += 1
        else:
            number, at = _zigzag(data, at + 1)
        if (number, kind) in fields:
            raise ThriftError(f"field {number} stands twice")  # readers disagree on its value
        fields[number, kind], at = _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: Any, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """A value and its end; texts and fractions are skipped, and lists of them are empty."""
    if kind in (TRUE, FALSE):
        return kind == TRUE, at
    if kind in (I16, I32, I64):
        return _zigzag(data, at)
    if kind == BYTE:
        return None, at + 1
    if kind == DOUBLE:
        return None, at + 8
    if kind == BINARY:
        size, at = _varint(data, at)
        return None, at + size
    if kind == STRUCT:
        return _struct(data, at, depth - 1)
    if kind == LIST:
        return _list(data, at, depth - 1)
    raise ThriftError(f"no header has a field of type {kind}")


def _list(data: Any, at: int, depth: int) -> tuple[list[Fields], int]:
    """The structs of a list, and its end. Each item takes a byte at least."""
    if depth == 0:
        raise ThriftError(f"lists are nested more than {DEPTH_LIMIT} deep")
    count = data[at] >> 4
    kind = data[at] & 15
    at += 1
    if count == 15:
        count, at = _varint(data, at)
    if kind in (TRUE, FALSE):
        kind = BYTE
    items = []
    for _ in range(count):
        item, at = _value(data, at, kind, depth)
        if at > len(data):
            raise ThriftError("a list runs past the end")
        if kind == STRUCT:
            items.append(item)
    return items, at


def _varint(data: Any, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ThriftError("a number of more than 64 bits")


def _zigzag(data: Any, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at
