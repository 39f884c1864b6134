"""Tests the index and the chunk reader on intact and damaged shards of all common tar formats."""

import errno
import io
import json
import os
import re
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest import tar
from flip.data.manifest.build import index
from flip.data.manifest.manifest import ChunkTable, Manifest, write
from flip.runs.errors import ConfigError, DataError, PermissionDenied, StorageError
from flip.runs.formats import FormatError
from tests.harness.common import no_access
from tests.synthetic import caption, make_dataset


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), samples=61, shards=7, size=16, chunk=8)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "data")


def texts(manifest):
    return [bytes(s["txt"]).decode() for j in range(manifest.chunks) for s in ChunkReader().read_chunk(manifest, j)]


def write_tar(path, members, format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=format) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5 if format == tarfile.PAX_FORMAT else 1
            file.addfile(info, io.BytesIO(data))


def test_chunks_across_shards_hold_every_sample_once(folder):
    manifest = Manifest.load(folder)
    assert texts(manifest) == [caption(i) for i in range(61)]
    assert (manifest.samples, manifest.chunk, manifest.chunks, manifest.tail) == (61, 8, 8, 5)
    assert [len(manifest.chunk_reads(j)) for j in (0, 2, 7)] == [1, 2, 1]
    assert manifest.locate(8) == (str(folder / "00001.tar"), 0)
    assert manifest.locate(60) == (
        str(folder / "00006.tar"),
        8,
    )


def test_manifest_digest_is_independent_of_location(folder, original):
    assert Manifest.load(folder).digest == Manifest.load(original).digest
    elsewhere = index([str(path) for path in folder.glob("*.tar")], folder.parent / "apart", chunk=8)
    assert elsewhere.digest == Manifest.load(original).digest and texts(elsewhere)[60] == caption(60)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda facts: facts.update(version=1), "version: an older version wrote this format"),
        (lambda facts: facts.update(version=5), "version: a newer version wrote this format"),
        (lambda facts: facts.pop("version"), "version: states no format"),
        (lambda facts: facts.pop("files"), "lacks `files`"),
        (lambda facts: facts["files"].pop("etags.txt"), "lacks `files.etags.txt`"),
        (lambda facts: facts.update(version=3), "lacks `files.kept.bits`"),
        (lambda facts: facts["files"].update({"kept.bits": {}}), "lists kept.bits, which is of another format"),
    ],
    ids=["older", "newer", "without", "half", "half of files", "mixed", "mixed file"],
)
def test_manifest_of_another_format_is_refused(folder, change, words):
    facts = json.loads((folder / "manifest.json").read_text())
    change(facts)
    (folder / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(FormatError, match=re.escape(words)) as error:
        Manifest.load(folder)
    assert error.value.code == 78 and "flip shards index" in error.value.remedy


def test_manifest_digest_is_pinned(tmp_path):
    """The digest is part of the identity of a run: a change makes every stored run look changed."""
    write_tar(tmp_path / "x.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("c.txt", b"3")])
    manifest = index([str(tmp_path / "x.tar")], tmp_path / "m", chunk=2)
    assert manifest.digest == "fb757d1e425edd7ee5b1acd7be8aeaf428175945539afe5ac995e27d0ed508fc"


def test_manifest_stores_etags_and_urls_outside_digest(folder, tmp_path):
    local = Manifest.load(folder)
    urls = [f"s3://bucket/a b/{i}.tar" for i in range(7)]
    table = ChunkTable(urls, local.shards, local.chunk, local.offsets, ["", *"123456"])
    manifest = write(tmp_path / "m", table, local.checksums)
    assert manifest.keys == urls and list(manifest.etags) == ["", *"123456"] and manifest.digest == local.digest
    (tmp_path / "m" / "etags.txt").write_text("\n" * 7)
    with pytest.raises(DataError, match="etags.txt"):
        Manifest.load(tmp_path / "m")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_reads_ustar_gnu_and_pax_archives(tmp_path, format):
    deep = "folder.with.dots/" + "d" * 90 + "/" + "k" * (60 if format == tarfile.USTAR_FORMAT else 150)
    members = [("./a.txt", b"1"), ("./a.seg.PNG", b"2" * 513), ("__meta__/x.txt", b"no"), ("nodot", b"no")]
    members += [("b.txt", bytes(1024)), ("b.json", b""), (deep + ".txt", b"3")]
    write_tar(tmp_path / "x.tar", members, format)
    with open(tmp_path / "x.tar", "rb") as file:
        samples = list(tar.samples(memoryview(file.read()), strict=True))
    assert [(s.key, list(s.members)) for s in samples] == [
        ("./a", ["txt", "seg.png"]), ("b", ["txt", "json"]), (deep, ["txt"])
    ]  # fmt: skip
    manifest = index([str(tmp_path / "x.tar")], tmp_path / "m", chunk=1)
    members_read = [ChunkReader().read_chunk(manifest, j)[0] for j in range(3)]
    assert bytes(members_read[0]["seg.png"]) == b"2" * 513
    assert bytes(members_read[1]["txt"]) == bytes(1024)
    assert bytes(members_read[2]["txt"]) == b"3"


def test_tar_samples_reads_base_256_sizes(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.txt", b"hello")])
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[124:136] = b"\x80" + (5).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 256)
    assert list(tar.samples(memoryview(bytes(data)), strict=True))[0].members == {"txt": (512, 5)}


def damaged(name, data):
    member = len(data) // 1024 * 512 + 7
    header = 512 * next(b for b in range(9, len(data) // 512) if data[b * 512 + 257 :][:5] == b"ustar")
    return {
        "cut in a member": data[:member],
        "cut between members": data[:header],
        "cut in a header": data[: header + 100],
        "zeroed header": data[:header] + bytes(512) + data[header + 512 :],
        "garbage header": data[:header] + b"\x7f" * 512 + data[header + 512 :],
        "empty": b"",
        "a web page": b"<html>error</html>" * 100,
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "cut in a member",
        "cut between members",
        "cut in a header",
        "zeroed header",
        "garbage header",
        "empty",
        "a web page",
    ],
)
def test_index_rejects_damaged_tar(folder, name):
    path = folder / "00003.tar"
    path.write_bytes(damaged(name, path.read_bytes()))
    with pytest.raises(DataError, match=r"00003\.tar.*(byte \d+|empty)") as error:
        index([str(p) for p in folder.glob("*.tar")], folder / "m")
    assert error.value.remedy and not (folder / "m" / "manifest.json").exists()


def test_index_rejects_invalid_output_and_shards(folder, tmp_path):
    shard = str(folder / "00000.tar")
    with pytest.raises(ConfigError, match="already"):
        index([shard], folder)
    with pytest.raises(ConfigError, match="twice"):
        index([shard, shard], tmp_path / "m")
    with pytest.raises(ConfigError, match="no shards"):
        index([], tmp_path / "m")
    with pytest.raises(DataError, match="missing"):
        index([str(folder / "00099.tar")], tmp_path / "m")
    write_tar(tmp_path / "none.tar", [("nodot", b"x")])
    with pytest.raises(DataError, match="no samples"):
        index([str(tmp_path / "none.tar")], tmp_path / "m")
    write_tar(tmp_path / "twice.tar", [("a.txt", b"x"), ("a.TXT", b"x")])
    with pytest.raises(DataError, match="two members txt"):
        index([str(tmp_path / "twice.tar")], tmp_path / "m")


@pytest.mark.parametrize("before", [0, 1, 3, 6, 7, 9])
@pytest.mark.parametrize("chunk", [4, 8])
def test_manifest_write_succeeds_for_only_1_of_2_concurrent_writers(folder, tmp_path, monkeypatch, before, chunk):
    """The second writer writes its complete manifest, with the same or another R, while the first writer syncs a file
    or, every second time, the folder."""
    manifest = Manifest.load(folder)
    out = tmp_path / "m"
    calls = []
    other = index(manifest.keys, tmp_path / "other", chunk)
    sync = os.fsync

    def interrupted_fsync(file):
        calls.append(file)
        if len(calls) == before + 1:
            write(out, other, other.checksums, settings={"by": "the other"})
        sync(file)

    monkeypatch.setattr("flip.data.manifest.manifest.os.fsync", interrupted_fsync)
    collides = chunk == 4 and before > 6  # offsets.u32 exists already: the second writer is refused
    with pytest.raises(ConfigError, match="another index writes" if collides else "there is a manifest already"):
        write(out, manifest, manifest.checksums)
    monkeypatch.undo()
    if collides:
        write(out, manifest, manifest.checksums)  # resumes as after a stop
    loaded = Manifest.load(out)
    assert loaded.digest == (manifest if collides else other).digest
    assert loaded.settings == ({} if collides else {"by": "the other"})
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "other").iterdir()}


@pytest.mark.parametrize("left", [1, 4, 6])
def test_index_reuses_only_matching_files_of_interrupted_writer(folder, tmp_path, left):
    """Files of another manifest raise an error that names the files and the remedy."""
    manifest = Manifest.load(folder)
    names = "keys.txt", "etags.txt", "shards.i64", "offsets.u32", "checksums.u32"
    complete = index(manifest.keys, tmp_path / "done", 8)
    for name in (*names, "exceptions.jsonl")[:left]:
        (tmp_path / "m").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "done" / name, tmp_path / "m" / name)
    with pytest.raises(
        ConfigError, match=r"m/keys\.txt: another index writes .* delete keys\.txt, etags\.txt, .* there"
    ):
        index(manifest.keys[1:], tmp_path / "m", 8)
    assert index(manifest.keys, tmp_path / "m", 8).digest == complete.digest


@pytest.mark.parametrize("exceptions, settings", [({3: "x" * 2000}, {}), ({}, {"left_out": "x" * 2000})])
def test_manifest_write_creates_no_file_if_one_would_be_too_large(folder, tmp_path, monkeypatch, exceptions, settings):
    manifest = Manifest.load(folder)
    monkeypatch.setattr("flip.data.manifest.manifest.LIMIT", 2000)
    with pytest.raises(ConfigError, match="at most 2,000 are read"):
        write(tmp_path / "m", manifest, manifest.checksums, exceptions, settings)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_manifest_write_works_on_file_system_without_hard_links(folder, tmp_path, monkeypatch, code):
    manifest = Manifest.load(folder)

    def link(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("flip.data.manifest.manifest.os.link", link)
    assert write(tmp_path / "m", manifest, manifest.checksums).digest == manifest.digest
    with pytest.raises(ConfigError, match="there is a manifest already"):
        write(tmp_path / "m", manifest, manifest.checksums)


@pytest.mark.parametrize("name", ["manifest.json", "keys.txt", "shards.i64", "offsets.u32", "checksums.u32"])
def test_manifest_load_rejects_damaged_or_missing_file(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        Manifest.load(folder)
    assert name in str(error.value) and "flip shards index" in str(error.value)
    (folder / name).unlink()
    for check in (True, False):
        with pytest.raises(DataError, match="no manifest here"):
            Manifest.load(folder, check)


def test_manifest_load_raises_permission_denied_for_unreadable_folder(folder):
    with no_access(folder), pytest.raises(PermissionDenied, match="may not be read"):
        Manifest.load(folder)


def test_chunk_reader_names_samples_and_remedy_for_corrupt_chunk(folder):
    manifest = Manifest.load(folder)
    path, start, _, _ = manifest.chunk_reads(5)[0]
    with open(path, "r+b") as file:
        file.seek(start + 700)
        byte = file.read(1)[0]
        file.seek(start + 700)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(DataError, match=r"samples 40 to 47.*CRC32.*exclude .* --ids 40-47"):
        ChunkReader().read_chunk(manifest, 5)
    ChunkReader().read_chunk(manifest, 3)


def test_chunk_reader_reports_missing_or_truncated_shard(folder):
    manifest = Manifest.load(folder)
    os.truncate(manifest.keys[6], 512 * 9)
    with pytest.raises(DataError, match=r"00006\.tar: the shard ends at byte 4608"):
        ChunkReader().read_chunk(manifest, 7)
    os.unlink(manifest.keys[6])
    with pytest.raises(DataError, match="missing"):
        ChunkReader().read_chunk(manifest, 7)


def test_chunk_reader_retries_other_io_errors_until_deadline(tmp_path):
    reader = ChunkReader(deadline=0.3)
    with pytest.raises(StorageError, match="Is a directory"):
        reader.read(str(tmp_path), 0, 10)
    assert reader.counters.retries["io"] > 1


def test_manifest_checksums_are_crc32_of_chunk_bytes(folder):
    manifest = Manifest.load(folder)
    assert manifest.checksums.dtype == np.uint32 and len(manifest.checksums) == manifest.chunks
    for j, checksum in enumerate(manifest.checksums.tolist()):
        reads = manifest.chunk_reads(j)
        assert checksum == zlib.crc32(b"".join(Path(key).read_bytes()[start:stop] for key, start, stop, _ in reads))


def test_digest_that_is_no_text_is_refused_without_the_check_too(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": None}))
    with pytest.raises(DataError, match="digest"):
        Manifest.load(folder, check=False)
