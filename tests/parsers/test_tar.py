"""Fuzz tests of the tar parser: bytes that are no valid archive raise InvalidTar at an offset; nothing hangs."""

import io
import re
import tarfile

import pytest
import webdataset
from hypothesis import example, given
from hypothesis import strategies as st

from flip.data.manifest import tar
from tests.parsers.spoil import spoiled

pytestmark = pytest.mark.timeout(20)

#: webdataset's rule for keys and extensions, and for metadata files of a shard.
KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
META = re.compile(r"__[^/]*__($|/)")
NAMES = st.text(st.sampled_from("ab./_"), min_size=1, max_size=14)
#: Size fields: valid octal numbers, and other content that occurs in archives.
SIZES = st.one_of(
    st.integers(0, 1200).map(lambda n: b"%011o\0" % n),
    st.sampled_from(
        [b"-0000001000\0", b"-1\0", b"+7\0", b"0_1\0", b"\xff" * 12, b"\x80" + b"\0" * 10 + b"\x07", b" " * 12]
    ),
    st.binary(max_size=12),
)
#: Records of a pax header (length, field, value), most of them invalid.
RECORDS = st.one_of(
    st.sampled_from(
        [
            b"16 size=1000000\n",
            b"13 size=-512\n",
            b"9 size=a\n",
            b"13 size=1_0_0",
            b"11 path=a/b\n",
            b"6 =\n",
            b"-5 a=b\n",
        ]
    ),
    st.just(b"1" * 5000 + b" a=b\n"),
    st.just(b"5017 size=" + b"9" * 5006 + b"\n"),
    st.binary(max_size=30),
)
TYPES = st.sampled_from([b"0", b"\0", b"7", b"5", b"1", b"x", b"x", b"g", b"L", b"K", b"S", b"V", b"\xff"])


def header(name, size, kind, magic=b"ustar\x0000", prefix=b""):
    block = name[:100].ljust(100, b"\0") + b"0000644\0" * 3 + size[:12].ljust(12, b"\0") + b"0" * 12 + b" " * 8 + kind
    block = (block + b"\0" * 100 + magic).ljust(345, b"\0") + prefix[:155].ljust(155, b"\0")
    block = block.ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


@st.composite
def plain_archives(draw):
    """Archives as usual writers make them, with a byte or two changed in some."""
    blocks = b""
    for _ in range(draw(st.integers(0, 4))):
        name = draw(
            st.sampled_from([b"a.jpg", b"a.txt", b"b.jpg", b"a.JPG", b"/a.b", b"d/a.jpg", b"d/.x"]) | st.binary()
        )
        for kind in draw(st.sampled_from([b"0", b"x0"])):
            kind = bytes([kind])
            data = draw(RECORDS | st.binary(max_size=20) | st.just(b"20 mtime=1700000000\n"))
            blocks += header(name, b"%011o\0" % len(data), kind) + data.ljust(-len(data) % 512 + len(data), b"\0")
    if blocks and draw(st.booleans()):
        return draw(spoiled(blocks))
    return blocks


@st.composite
def archives(draw):
    blocks = b""
    for _ in range(draw(st.integers(0, 5))):
        data = draw(st.lists(RECORDS, max_size=2).map(b"".join) | st.binary(max_size=20))
        size = draw(st.just(b"%011o\0" % len(data)) | SIZES)
        name = draw(NAMES.map(str.encode) | st.binary(max_size=12))
        blocks += header(name, size, draw(TYPES)) + data.ljust(-len(data) % 512 + len(data), b"\0")
    return blocks + b"\0" * draw(st.sampled_from([0, 512, 1024, 1025]))


def checked_members(data, strict):
    """Return the members, or None for InvalidTar. Check that members and samples lie in the data, in order."""
    try:
        members = list(tar.members(memoryview(data), strict))
        samples = list(tar.samples(memoryview(data), strict))
    except tar.InvalidTar as error:
        assert 0 <= error.offset <= len(data)
        return None
    position = 0
    for member in members:
        assert position <= member.start < member.data <= member.data + member.size <= len(data)
        position = member.data + member.size
    assert all(sample.start < sample.end <= len(data) for sample in samples)
    return members


@given(archives(), st.booleans())
@example(header(b"a.jpg", b"-0000001000", b"0"), False)
@example(header(b"a.jpg", b"00000000014", b"x") + b"12 size=-512".ljust(512, b"\0"), True)
def test_members_and_samples_stay_in_bounds_for_any_headers(data, strict):
    checked_members(data, strict)


@given(plain_archives() | archives())
@example(header(b"/a.jpg", b"%011o\0" % 0, b"0"))
@example(header(b"a.jpg", b"00000000008\0", b"0") + bytes(1024))
@example(header(b"a.jpg", b"%011o\0" % 0, b"0") * 2)
@example(header(b"a.jpg", b"%011o\0" % 0, b"x"))
@example(header(b"a.jpg", b"%011o\0" % 5, b"0"))
@example(header(b"a.jpg", b"%011o\0" % 0, b"0", prefix=b"d"))
@example(
    header(b"a", b"%011o\0" % 14, b"x") + b"14 path=b.jpg\n".ljust(512, b"\0") + header(b"a.b", b"%011o\0" % 0, b"0")
)
@example(header(b"a.jpg", b"%011o\0" % 0, b"0") + header(b"a.b/c.jpg", b"%011o\0" % 0, b"0"))
@example(header(b"a.jpg", b"%011o\0" % 0, b"0") + header(b"a.__b__", b"%011o\0" % 0, b"0"))
def test_plain_samples_are_those_of_samples(data):
    plain = tar._plain_samples(memoryview(data))
    if plain is not None:
        assert plain == list(tar.samples(memoryview(data)))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_usual_shards_are_plain(form):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as file:
        for i in range(6):
            info = tarfile.TarInfo(f"d/{i // 3}.{'abc'[i % 3]}")
            info.size = 700 * i
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
            file.addfile(info, io.BytesIO(bytes(700 * i)))
        end = file.offset
    buffer = memoryview(out.getvalue())[:end]
    samples = tar._plain_samples(buffer)
    assert samples == list(tar.samples(buffer)) and [sample.key for sample in samples] == ["d/0", "d/1"]


def webdataset_samples(data):
    """Return (key, extension -> bytes) of each sample that webdataset yields, or None if it raises an error."""
    files = webdataset.tariterators.tar_file_iterator(io.BytesIO(data))
    files = ({**file, "__url__": ""} for file in files)
    try:
        samples = list(webdataset.tariterators.group_by_keys(files))
    except Exception:  # webdataset documents no specific error
        return None
    return [(s["__key__"], {k: v for k, v in s.items() if k not in ("__key__", "__url__")}) for s in samples]


@given(archives())
@example(header(b"a.jpg/", b"%011o\0" % 0, b"\0") + bytes(1024))
def test_strict_samples_equal_webdataset_unless_rejected(data):
    data += bytes(1024)
    try:
        samples = list(tar.samples(memoryview(data), strict=True))
    except tar.InvalidTar:
        return
    actual = [(s.key, {name: data[start : start + size] for name, (start, size) in s.members.items()}) for s in samples]
    assert actual == (webdataset_samples(data) if any(data[:512]) else [])


@given(st.data(), st.booleans())
def test_members_and_samples_stay_in_bounds_for_any_bytes(data, strict):
    good = header(b"a.jpg", b"%011o\0" % 3, b"0") + b"abc".ljust(512, b"\0") + b"\0" * 1024
    checked_members(data.draw(spoiled(good) | st.binary(max_size=600)), strict)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=90).filter(
            lambda name: name not in (".", "..")
        ),
        st.binary(max_size=700),
        max_size=4,
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_members_return_files_written_by_tarfile(files, form):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    data = out.getvalue()
    for strict in (False, True):
        contents = {
            member.name: data[member.data : member.data + member.size]
            for member in tar.members(memoryview(data), strict)
        }
        assert contents == files


@given(NAMES)
def test_split_follows_webdataset_key_rule(name):
    match = KEY.match(name)
    if match is None or META.match(name):
        expected = None
    else:
        expected = match[1], match[2]
    assert tar.split(name) == expected


def grouped(names):
    """Group neighbours by webdataset's rule into (key, extensions). Return None if a sample repeats an extension."""
    groups = []
    for name in names:
        match = KEY.match(name)
        if match is None or META.match(name) or name.endswith("/"):
            continue
        if not groups or groups[-1][0] != match[1]:
            groups.append((match[1], []))
        if match[2].lower() in groups[-1][1]:
            return None
        groups[-1][1].append(match[2].lower())
    return groups


@given(st.lists(NAMES | st.sampled_from(["a.b", "a.b.a", "a.", "/.b", "a._a_"]), max_size=6))
@example(["/.b"])
@example(["a.b", "a.__b__", "a.b/a.b", "a.a"])
@example(["__a.b", "__a.b__", "__a.a"])
def test_samples_group_neighbours_with_equal_keys(names):
    data = b"".join(header(name.encode(), b"%011o\0" % 0, b"0") for name in names)
    try:
        groups = [(sample.key, list(sample.members)) for sample in tar.samples(memoryview(data))]
    except tar.InvalidTar as error:
        assert "holds two members" in error.reason
        groups = None
    assert groups == grouped(names)


@pytest.mark.parametrize("name", ["a/" * 500_000, "_" * 1_000_000 + "x", "/." * 500_000])
def test_samples_read_megabyte_names_in_linear_time(name):
    data = header(b"", b"%011o\0" % len(name), b"L") + name.encode().ljust(-len(name) % 512 + len(name), b"\0")
    data += header(b"", b"%011o\0" % 0, b"0") + b"\0" * 1024
    assert list(tar.samples(memoryview(data), strict=True)) == []


@pytest.mark.parametrize("rest", [b"x", b"1" * 40, b"12size=-512 "])
def test_samples_reject_pax_header_with_trailing_garbage(rest):
    records = b"12 path=a/b\n" + rest
    data = header(b"", b"%011o\0" % len(records), b"x") + records.ljust(512, b"\0") + header(b"a", b"0" * 11, b"0")
    with pytest.raises(tar.InvalidTar, match="a damaged pax header"):
        list(tar.samples(memoryview(data)))


def test_samples_accept_pax_header_with_many_records():
    records = b"5 =a\n" * (tar.EXTENSION_LIMIT // 5)
    data = header(b"", b"%011o\0" % len(records), b"x") + records.ljust(-len(records) % 512 + len(records), b"\0")
    data += header(b"a.jpg", b"%011o\0" % 0, b"0") + b"\0" * 1024
    assert [sample.key for sample in tar.samples(memoryview(data), strict=True)] == ["a"]
