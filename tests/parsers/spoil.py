"""Documents that were good once: what a disk, a kill, an editor or an enemy makes of bytes and of JSON."""

import copy
import json

from hypothesis import strategies as st

#: JSON values that files of ours do not hold where these may come to stand.
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
#: Nested deeper than a parser that calls itself can follow.
DEEP = b"[" * 100_000


@st.composite
def spoiled(draw, good: bytes) -> bytes:
    """``good`` after up to four changes: bytes put in, taken out, doubled, overwritten; the end cut off."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        size = draw(st.integers(0, 16))
        kind = draw(st.sampled_from(["in", "out", "over", "double", "cut"]))
        if kind == "in":
            data[at:at] = draw(st.binary(max_size=8))
        elif kind == "out":
            del data[at : at + size]
        elif kind == "over":
            piece = draw(st.binary(min_size=1, max_size=8))
            data[at : at + len(piece)] = piece
        elif kind == "double":
            data[at:at] = data[at : at + size]
        else:
            del data[at:]
    return bytes(data)


def places(value, path=()):
    """Paths of all parts of a JSON value, itself first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def changed(draw, good):
    """A JSON value with one to three of its parts replaced, taken out, or put in."""
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
    """The bytes of a JSON file that began as ``good``: parts are others, or it is no JSON any more."""
    return changed(good).map(lambda value: json.dumps(value).encode()) | spoiled(json.dumps(good).encode())
