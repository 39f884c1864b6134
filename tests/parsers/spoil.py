"""Strategies for damaged documents: bytes and JSON after a disk error, a kill, an edit or an attack."""

import copy
import json

from hypothesis import strategies as st

#: Scalars that valid files rarely hold: other types, extreme numbers, hostile strings.
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, float("nan"), float("inf")]),
    st.sampled_from(["", "0", "²", "a/../../b", "/etc/passwd", "..", "\x00", "\ud800", "\x1b[2J", "${oc.env:HOME}"]),
    st.text(max_size=6),
)
VALUES = st.recursive(
    SCALARS,
    lambda more: st.lists(more, max_size=3) | st.dictionaries(st.text(max_size=4), more, max_size=3),
    max_leaves=4,
)
#: Nested too deeply for a recursive parser.
DEEP = b"[" * 100_000


@st.composite
def spoiled(draw, good: bytes) -> bytes:
    """``good`` after up to four changes: bytes inserted, deleted, duplicated, overwritten or truncated."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, 16))
        kind = draw(st.sampled_from(["in", "out", "over", "double", "cut"]))
        if kind == "in":
            data[offset:offset] = draw(st.binary(max_size=8))
        elif kind == "out":
            del data[offset : offset + size]
        elif kind == "over":
            piece = draw(st.binary(min_size=1, max_size=8))
            data[offset : offset + len(piece)] = piece
        elif kind == "double":
            data[offset:offset] = data[offset : offset + size]
        else:
            del data[offset:]
    return bytes(data)


def places(value, path=()):
    """Paths of all parts of a JSON value; the path of the value itself comes first."""
    yield path
    if isinstance(value, dict):
        items = value.items()
    else:
        items = enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def changed(draw, good):
    """A JSON value with one to three of its parts replaced, removed or added."""
    value = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        *above, last = path
        parent = value
        for key in above:
            parent = parent[key]
        kind = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
        if kind == "replace":
            parent[last] = draw(VALUES)
        elif kind == "drop":
            del parent[last]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=4))] = draw(VALUES)
        else:
            parent.insert(last, draw(VALUES))
    return value


def texts(good):
    """The bytes of a JSON file derived from ``good``: with changed parts, or damaged so that it may be invalid JSON."""
    return changed(good).map(lambda value: json.dumps(value).encode()) | spoiled(json.dumps(good).encode())
