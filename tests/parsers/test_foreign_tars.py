"""Tests that tars of other writers yield the samples that webdataset yields, or that the index refuses them.

GNU tar, bsdtar, Python's tarfile or webdataset writes each case, and some are then damaged. If the index cannot agree
with webdataset, it ends with exit code 65; it never yields other bytes or keys, and never omits a sample.
"""

import bz2
import gzip
import lzma
import os
import shutil
import subprocess
import tarfile
from typing import NamedTuple

import pytest
import webdataset

from tests.parsers.tar_comparison import SAME, assert_same_samples_or_refusal

pytestmark = pytest.mark.usefixtures("unsynced")

BSDTAR = shutil.which("bsdtar")
FORMATS = {
    "gnutar": ("v7", "ustar", "oldgnu", "gnu", "pax"),
    "bsdtar": ("v7tar", "ustar", "gnutar", "paxr", "pax"),
    "tarfile": ("ustar", "gnu", "pax"),
}


class Case(NamedTuple):
    """An archive. ``damage``: change of the archive's bytes; ``options``: further options of the writer."""

    content: str
    writer: str
    format: str
    expected: str = SAME
    options: tuple[str, ...] = ()
    damage: str = ""

    def __str__(self):
        return "-".join(filter(None, (self.content, self.writer, self.format, *self.options, self.damage)))


# -- contents: files in a folder, in the order of the archive ----------------------------------------------------------


def files(folder, *names):
    """Write a file with unique bytes for each name; a name that ends with / is a folder."""
    for number, name in enumerate(names):
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(path if path.endswith(b"/") else os.path.dirname(path), exist_ok=True)
        if not path.endswith(b"/"):
            with open(path, "wb") as file:
                file.write(b"%d %s" % (number, os.fsencode(name)) * (1 + 40 * number % 97))
            os.utime(path, (1_700_000_000, 1_700_000_000))
    return list(names)


def pair(*keys):
    return [f"{key}.{extension}" for key in keys for extension in ("jpg", "txt")]


def links(folder):
    names = files(folder, *pair("a", "b"))
    os.symlink("a.jpg", folder / "c.jpg")
    os.link(folder / "a.txt", folder / "c.txt")
    return [*names, "c.jpg", "c.txt", *files(folder, *pair("d"))]


def first_a_link(folder):
    """Put a hard link first: the first name of a hard-linked file in the archive holds the data."""
    files(folder, "z.jpg")
    os.link(folder / "z.jpg", folder / "a.jpg")
    return ["a.jpg", *files(folder, "a.txt"), "z.jpg", *files(folder, "z.txt")]


def specials(folder):
    os.mkfifo(folder / "b.jpg")
    return [*files(folder, *pair("a")), "b.jpg", *files(folder, "b.txt", *pair("c"))]


def holes(folder):
    names = files(folder, *pair("a", "b"))
    with open(folder / "a.jpg", "wb") as file:
        file.write(b"begin")
        file.seek(1 << 20)
        file.write(b"end")
        file.truncate(3 << 20)
    return names


def empties(folder):
    names = files(folder, *pair("a", "b"))
    for name in ("a.txt", "b.jpg"):
        (folder / name).write_bytes(b"")
    return names


def marked_bad_by_nothing(folder):
    """Write an empty mark: webdataset keeps the sample."""
    names = files(folder, *pair("a"), "b.jpg", "b.__BAD__", *pair("c"))
    (folder / "b.__BAD__").write_bytes(b"")
    return names


def same_data(folder):
    names = files(folder, *pair("a", "b"))
    return [*names, *names]


CONTENTS = {
    "plain": lambda f: files(f, *pair("a", "b", "c")),
    "one_sample": lambda f: files(f, "a.jpg"),
    "folders": lambda f: files(f, "d/", *pair("d/a"), "d/e/", *pair("d/e/a", "d/e.f/a")),
    "folder_with_extension": lambda f: files(f, *pair("a"), "b.jpg/", *pair("b.jpg/c")),
    "names_of_100": lambda f: files(f, *pair("k" * 96, "l" * 96)),
    "names_in_the_prefix": lambda f: files(f, *pair("p" * 120 + "/" + "k" * 60, "q" * 120 + "/" + "k" * 60)),
    "long_names": lambda f: files(f, *pair("p" * 150 + "/" + "q" * 150 + "/" + "k" * 120, "b")),
    "unicode_names": lambda f: files(f, *pair("é", "漢字", "😀/ü", "a")),
    "names_that_are_no_text": lambda f: files(f, *pair("a\udcff\udcfe", "b")),
    "odd_names": lambda f: files(f, *pair("a b", "-x", "#1", "a'b\"", "%20", "a\\b", "[1]*")),
    "dots": lambda f: files(f, "a.jpg", "a.seg.png", "a.txt", "b.tar.gz", "v1.0/a.jpg", "v1.0/a.txt", ".h.jpg"),
    "upper_case": lambda f: files(f, "a.JPG", "a.Txt", "B.jpg", "B.TXT"),
    "no_extension": lambda f: files(f, "README", *pair("a"), "LICENSE", "d/Makefile", *pair("b")),
    "ends_with_a_dot": lambda f: files(f, "a.jpg", "a.", "b."),
    "meta_in_front": lambda f: files(f, "__info__/x.txt", "__meta__", "__a.b__", *pair("a")),
    "meta_below": lambda f: files(f, *pair("d/__x__/a", "d/__x__", "x__y__"), "c.jpg", "d/__z__/q.jpg", "c.txt"),
    "meta_almost": lambda f: files(f, *pair("__x_/a", "_x__/b", "__c", "a__"), "a.__x__", "d.b__"),
    "apple_double": lambda f: files(f, "._a.jpg", "a.jpg", "._a.txt", "a.txt", "d/._b.jpg", "d/b.jpg", "d/b.txt"),
    "apart": lambda f: files(f, "a.jpg", "b.jpg", "a.txt", "b.txt"),
    "line_breaks": lambda f: files(f, *pair("a"), "b.x\nc/d.jpg"),
    "marked_bad": lambda f: files(f, *pair("a"), "b.jpg", "b.__bad__", *pair("c")),
    "marked_bad_by_nothing": marked_bad_by_nothing,
    "links": links,
    "first_a_link": first_a_link,
    "specials": specials,
    "holes": holes,
    "empties": empties,
    "twice": same_data,
    "twice_beside": lambda f: [*files(f, "a.jpg", "a.txt"), "a.jpg"],
    "equal_but_for_case": lambda f: files(f, "a.jpg", "a.JPG", "a.txt"),
}

CANNOT = {
    "names_in_the_prefix": ("v7", "v7tar"),
    "long_names": ("v7", "v7tar", "ustar"),
    "specials": ("v7", "v7tar"),
}
"""Contents -> formats that cannot hold them."""
REFUSED = {
    **{("line_breaks", writer): "a line break" for writer in FORMATS},
    **{("marked_bad", writer): "marked as bad" for writer in FORMATS},
    **{("equal_but_for_case", writer): "holds two members jpg" for writer in FORMATS},
    # GNU tar stores a file once even if it is named twice.
    **{("twice_beside", writer): "holds two members jpg" for writer in ("bsdtar", "tarfile")},
    # bsdtar writes nothing, but exits with 0.
    ("names_of_100", "bsdtar", "v7tar"): "zeros alone",
}

CASES = [
    Case(content, writer, format, REFUSED.get((content, writer, format), REFUSED.get((content, writer), SAME)))
    for content in CONTENTS
    for writer, formats in FORMATS.items()
    for format in formats
    if format not in CANNOT.get(content, ())
]
CASES += [
    Case(content, "webdataset", form)
    for content in ("plain", "names_in_the_prefix", "long_names", "unicode_names", "dots", "empties")
    for form in ("mtime", "fixed")
]
#: Pattern of the error for sparse members, which some options of the writers produce.
SPARSE = "sparse"
CASES += [Case("holes", "gnutar", format, SPARSE, ("-S",)) for format in ("oldgnu", "gnu", "pax")]
CASES += [Case("holes", "gnutar", "pax", SPARSE, ("-S", f"--sparse-version={v}")) for v in ("0.0", "0.1", "1.0")]
CASES += [
    Case("plain", "gnutar", "pax", "a global header that names", ("--pax-option=path=x.jpg",)),
    Case("plain", "gnutar", "pax", SAME, ("--pax-option=comment=x",)),
    Case("plain", "gnutar", "pax", SAME, ("--pax-option=comment:=x",)),
    Case("plain", "gnutar", "pax", SAME, ("--pax-option=exthdr.name=q.jpg",)),
    Case("twice_beside", "gnutar", "pax", "holds two members", ("--pax-option=path:=x.jpg",)),
    Case("plain", "gnutar", "gnu", "type b'V'", ("--label=x",)),
    Case("plain", "gnutar", "pax", SAME, ("--label=x",)),
    Case("plain", "gnutar", "gnu", "incremental", ("--incremental",)),
    Case("folders", "gnutar", "gnu", "incremental", ("--incremental",)),
    Case("folders", "gnutar", "pax", SAME, ("--incremental",)),
    *(Case("plain", "gnutar", form, SAME, ("--owner=+2000000", "--group=+2097151")) for form in FORMATS["gnutar"]),
    *(Case("plain", "gnutar", form, SAME, ("--owner=+3000000000",)) for form in ("oldgnu", "gnu", "pax")),
    *(Case("plain", "gnutar", form, SAME, ("--mtime=1960-01-01 00:00:00.5",)) for form in ("oldgnu", "gnu", "pax")),
    *(Case("plain", "gnutar", form, SAME, ("--blocking-factor=1",)) for form in ("ustar", "gnu", "pax")),
    *(Case("links", "gnutar", form, SAME, ("--dereference", "--hard-dereference")) for form in ("ustar", "gnu", "pax")),
    *(Case("plain", "bsdtar", form, SAME, ("--uid=262143", "--gid=262143")) for form in FORMATS["bsdtar"]),
    *(Case("plain", "bsdtar", form, SAME, ("--uid=2000000000",)) for form in ("gnutar", "pax", "paxr")),
    *(Case("plain", "bsdtar", form, "zeros alone", ("--uid=2000000",)) for form in ("v7tar", "ustar")),
    Case("holes", "bsdtar", "pax", SAME, ("--no-read-sparse",)),
]
#: Damage of an archive -> expected result.
DAMAGES = {
    "concatenated": "data after a zeroed header",
    "one_zero_block": SAME,
    "many_zero_blocks": SAME,
    "no_end_mark": "no end mark",
    "cut_between_members": "no end mark",
    "cut_in_a_header": "header cut off",
    "cut_in_a_member": "runs past the end",
    "cut_in_the_padding": "runs past the end",
    "garbage_after_the_end": "data after a zeroed header",
    "garbage_instead_of_the_end": "not a tar header|header cut off",
    "a_zeroed_header": "data after a zeroed header|an extension header without its member",
    "a_flipped_bit_in_a_name": "not a tar header",
    "a_block_too_many": "not a tar header",
    "a_date_that_is_no_number": "not a number",
    "zeros": "zeros alone",
    "empty": "the shard is empty",
    "gzip": "compressed with gzip",
    "bzip2": "compressed with bzip2",
    "xz": "compressed with xz",
}
CASES += [
    Case("plain", writer, format, expected, (), damage)
    for damage, expected in DAMAGES.items()
    for writer, format in (("gnutar", "gnu"), ("gnutar", "pax"), ("bsdtar", "ustar"), ("tarfile", "pax"))
]


def write(case, folder, archive):
    """Write the archive of a case."""
    names = CONTENTS[case.content](folder)
    if case.writer == "webdataset":
        return write_samples(case, names, folder, archive)
    names = [name.rstrip("/") for name in names]
    if case.writer == "tarfile":
        form = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[case.format]
        with tarfile.open(archive, "w", format=form) as file:
            for name in names:
                file.add(folder / name, name, recursive=False)
        return None
    command = ["tar" if case.writer == "gnutar" else BSDTAR, f"--format={case.format}", "-cf", archive, "-C", folder]
    if case.writer == "gnutar":
        alone = ["--no-recursion", "--verbatim-files-from"]
    else:
        alone = ["-n"]
    listed = b"".join(os.fsencode(name) + b"\0" for name in names)
    return subprocess.run(
        [*command, *case.options, *alone, "--null", "-T", "-"], input=listed, check=True, capture_output=True,
        env=os.environ | {"LC_ALL": "C.UTF-8", "TZ": "UTC"}, timeout=60,
    )  # fmt: skip


def write_samples(case, names, folder, archive):
    with webdataset.TarWriter(str(archive), mtime=0 if case.format == "fixed" else None) as writer:
        samples = {}
        for name in names:
            key, extension = webdataset.tariterators.base_plus_ext(name)
            if key is not None:
                samples.setdefault(key, {"__key__": key})[extension] = (folder / name).read_bytes()
        for sample in samples.values():
            writer.write(sample)


def damaged(data, damage):
    """Return the bytes of an archive after ``damage``."""
    if not damage:
        return data
    headers = [offset for offset in range(0, len(data), 512) if data[offset + 257 : offset + 262] == b"ustar"]
    end = data.rstrip(b"\0")
    end = data[: -(-len(end) // 512) * 512]
    offset = headers[-1]
    if damage == "a_date_that_is_no_number":
        block = bytearray(data[offset : offset + 512])
        block[136:148] = b"yesterday\0\0\0"
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return data[:offset] + bytes(block) + data[offset + 512 :]
    return {
        "concatenated": lambda: data + data,
        "one_zero_block": lambda: end + bytes(512),
        "many_zero_blocks": lambda: end + bytes(1 << 16),
        "no_end_mark": lambda: end,
        "cut_between_members": lambda: data[: headers[2]],
        "cut_in_a_header": lambda: data[: offset + 300],
        "cut_in_a_member": lambda: data[: offset + 512 + 3],
        "cut_in_the_padding": lambda: end[:-1],
        "garbage_after_the_end": lambda: data + b"garbage",
        "garbage_instead_of_the_end": lambda: end + b"garbage" * 300,
        "a_zeroed_header": lambda: data[:offset] + bytes(512) + data[offset + 512 :],
        "a_flipped_bit_in_a_name": lambda: data[: offset + 1] + bytes([data[offset + 1] ^ 1]) + data[offset + 2 :],
        "a_block_too_many": lambda: data[:offset] + b"x" * 512 + data[offset:],
        "zeros": lambda: bytes(len(data)),
        "empty": lambda: b"",
        "gzip": lambda: gzip.compress(data),
        "bzip2": lambda: bz2.compress(data),
        "xz": lambda: lzma.compress(data),
    }[damage]()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_index_matches_webdataset_or_refuses_shard(case, tmp_path):
    if case.writer == "bsdtar" and not BSDTAR:
        if os.environ.get("FLIP_REQUIRE_BSDTAR") == "1":
            stop = pytest.fail
        else:
            stop = pytest.skip
        stop("needs bsdtar: make bsdtar, or Debian's package libarchive-tools")
    archive = tmp_path / "x.tar"
    (tmp_path / "in").mkdir()
    write(case, tmp_path / "in", archive)
    data = archive.read_bytes()
    archive.write_bytes(damaged(data, case.damage))
    expected = case.expected
    if case.content == "holes" and not expected and b"GNU.sparse" in data:  # bsdtar, if the file system reports holes
        expected = SPARSE
    assert_same_samples_or_refusal(archive, expected, tmp_path / "m")


def test_cases_are_unique_and_at_least_118():
    assert len(set(map(str, CASES))) == len(CASES) >= 118
