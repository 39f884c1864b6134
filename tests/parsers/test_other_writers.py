"""Tests that tars of further writers, and of none, yield webdataset's samples, or that the index refuses them.

``foreign_tars.tar.xz`` holds tars of writers that the machines of tests lack (Go, Rust, Java, node, busybox and others,
by ``lab.recordings.tars``); ``hand_made_tars`` writes what no writer at hand makes.
"""

import tarfile
from pathlib import Path

import pytest

from tests.parsers.hand_made_tars import TARS
from tests.parsers.tar_comparison import SAME, assert_same_samples_or_refusal

pytestmark = pytest.mark.usefixtures("unsynced")
RECORDED = Path(__file__).parent / "foreign_tars.tar.xz"
WRITERS = (
    "7zip-gnu", "7zip-pax", "7zip-posix", "busybox-gnu", "cpio-tar", "cpio-ustar", "git-archive", "go-any", "go-gnu",
    "go-pax", "go-ustar", "java-gnu", "java-pax", "node-npm", "node-pax", "node-ustar", "pax-tar", "pax-ustar",
    "perl-ustar", "rust-gnu", "rust-old", "rust-ustar",
)  # fmt: skip
REFUSED = {
    # cpio refuses the members, writes an end mark, and exits with 0.
    "cpio-tar-large_numbers": "zeros alone",
    "cpio-tar-names_in_the_prefix": "zeros alone",
    "cpio-ustar-large_numbers": "zeros alone",
}


@pytest.fixture(scope="module")
def recorded():
    """WRITER-FORMAT -> content -> bytes."""
    archives = {}
    with tarfile.open(RECORDED) as file:
        for member in file:
            writer, _, content = member.name.removesuffix(".tar").rpartition("-")
            archives.setdefault(writer, {})[content] = file.extractfile(member).read()
    return archives


@pytest.mark.parametrize("writer", WRITERS)
def test_index_matches_webdataset_for_recorded_tars(recorded, writer, tmp_path):
    for content, data in recorded[writer].items():
        archive = tmp_path / f"{content}.tar"
        archive.write_bytes(data)
        expected = REFUSED.get(f"{writer}-{content}", SAME)
        assert_same_samples_or_refusal(archive, expected, tmp_path / content)


def test_300_tars_of_22_writers_are_recorded(recorded):
    assert tuple(sorted(recorded)) == WRITERS
    assert sum(map(len, recorded.values())) == 300


@pytest.mark.parametrize("name", TARS)
def test_index_matches_webdataset_or_refuses_hand_made_tar(name, tmp_path):
    data, expected = TARS[name]
    archive = tmp_path / "x.tar"
    archive.write_bytes(data)
    assert_same_samples_or_refusal(archive, expected, tmp_path / "m")
