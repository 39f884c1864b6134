"""Tests that a scan of a shard in pieces of any size equals a scan of the complete shard."""

import hashlib
import tarfile
import zlib
from itertools import pairwise

import numpy as np
import pytest

from flip.data.manifest import tar
from flip.data.manifest.census import APPLE_DOUBLE, SampleKind
from flip.data.manifest.scan import scan_tar
from flip.data.storage.checksums import ETag
from tests.flip.data.manifest.test_manifest import write_tar
from tests.flip.data.test_damage import AROUND, WHOLE, Spots


def pieces(data, size):
    return [data[offset : offset + size] for offset in range(0, len(data), size)]


def judge(samples, _):
    """Drops about half of the samples, chosen by their keys."""
    return np.array([zlib.crc32(sample.key.encode()) % 2 for sample in samples], dtype=np.uint8)


@pytest.mark.long
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_scan_tar_is_independent_of_piece_size(tmp_path, format):
    deep = "k" * (90 if format == tarfile.USTAR_FORMAT else 150)
    members = [("__meta__/x.txt", b"before"), ("a.txt", b"1"), ("a.png", bytes(range(256)) * 9), ("nodot", b"between")]
    members += [("b.txt", b""), (f"{deep}.txt", b"2" * 513), (f"{deep}.png", b"3"), ("c.txt", b"4")]
    write_tar(tmp_path / "x.tar", members, format)
    data = (tmp_path / "x.tar").read_bytes()
    samples = list(tar.samples(memoryview(data), strict=True))
    borders = [0, *(sample.start for sample in samples[1:]), samples[-1].end]
    parts = [data[a:b] for a, b in zip(borders, borders[1:], strict=False)]
    for size in (1, 100, 512, 700, 1024, 2560, 5000, len(data) - 1, len(data)):
        scan = scan_tar(pieces(data, size))
        assert scan.crcs.tolist() == [zlib.crc32(part) for part in parts], size
        assert scan.starts.tolist() == [border // 512 for border in borders[:-1]] and scan.end == borders[-1]
        assert {field.dtype for field in scan[:3]} == {np.dtype(np.uint32)} and not scan.dropped.any()
        assert all(map(np.array_equal, scan_tar(pieces(data, size), judge), scan_tar([data], judge))), size


@pytest.mark.parametrize("name", [name for name in (*WHOLE, *AROUND) if name not in ("empty", "missing")])
def test_scan_tar_reports_damage_alike_for_any_piece_size(original, name):
    data = {**WHOLE, **AROUND}[name](Spots((original / "00002.tar").read_bytes()))
    with pytest.raises(tar.InvalidTar) as expected:
        scan_tar([data])
    for size in (512, 3000, 20_000):
        with pytest.raises(tar.InvalidTar) as error:
            scan_tar(pieces(data, size))
        assert str(error.value) == str(expected.value), size


def test_scan_tar_of_archive_without_samples_is_empty(tmp_path):
    write_tar(tmp_path / "x.tar", [("__meta__/x.txt", b"1"), ("README", b"2")])
    data = (tmp_path / "x.tar").read_bytes()
    for size in (512, len(data)):
        scan = scan_tar(pieces(data, size))
        assert len(scan.crcs) == 0 and scan.end == 0 and scan.census.skipped.total() == 2


@pytest.mark.parametrize("size", [512, 10_240, 1 << 20])
def test_scan_tar_rejects_archive_of_zeros(size):
    """This includes the archive that tar writes for no files: it looks like a file whose content was lost."""
    for piece in (512, 700, size):
        with pytest.raises(tar.InvalidTar, match="zeros alone, without a single member at byte 0"):
            scan_tar(pieces(bytes(size), piece))


def test_scan_tar_census_counts_only_selected_samples(tmp_path):
    members = [("__meta__/x.txt", b"before"), ("._a.txt", b""), ("a.txt", b"1"), ("a.png", b"2"), ("nodot", b"x")]
    members += [
        ("b.png", b"3"),
        ("c.png", b"4"),
        ("c.txt", b""),
        ("b.txt", b"5"),
        ("d/._e.png", b"6"),
        ("d/e.png", b"7"),
    ]
    members += [("d/__x__/f.TXT", b"8"), ("last", b"9")]
    write_tar(tmp_path / "x.tar", members)
    data = (tmp_path / "x.tar").read_bytes()
    for size in (512, 1024, 5000, len(data)):
        census = scan_tar(pieces(data, size)).census
        assert census.kinds == {
            SampleKind(("png", "txt")): 1,
            SampleKind(("png",), (), True): 1,
            SampleKind(("txt",), (), True): 1,
            SampleKind(("png", "txt"), ("txt",)): 1,
            APPLE_DOUBLE: 1,
            SampleKind(("png",)): 1,
            SampleKind(("txt",)): 1,
        }
        assert census.skipped == {
            "meta files of webdataset": 1, "AppleDouble files": 1, "names without key and extension": 2
        }  # fmt: skip
        empty = scan_tar(pieces(data, size), lambda samples, _: np.ones(len(samples), dtype=np.uint8)).census
        assert not empty.kinds and empty.skipped == census.skipped


@pytest.mark.parametrize("step", [1, 3, 10, 100])
def test_etag_matches_multipart_and_single_part_md5(step):
    data = bytes(range(40))
    for parts in ([7, 7, 7, 7, 7, 5], [40], [1, 38, 1], [10, 10, 20]):
        borders = [sum(parts[:n]) for n in range(len(parts) + 1)]
        digests = [hashlib.md5(data[a:b]).digest() for a, b in pairwise(borders)]
        etag = ETag(parts)
        for piece in pieces(data, step):
            # The ETag is complete only after the last piece.
            assert etag.value() != f"{hashlib.md5(b''.join(digests)).hexdigest()}-{len(parts)}"
            etag.update(piece)
        assert etag.value() == f"{hashlib.md5(b''.join(digests)).hexdigest()}-{len(parts)}"
    etag = ETag()
    texts = set()
    for piece in pieces(data, step):
        etag.update(piece)
        texts.add(etag.value())
    assert etag.value() == hashlib.md5(data).hexdigest() and len(texts) == len(pieces(data, step))
