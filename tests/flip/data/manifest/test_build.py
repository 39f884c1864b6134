"""Tests that indexing with several processes, after a stop or in parts gives the manifest of one undisturbed pass."""

import base64
import json
import multiprocessing
import os
import shutil
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from flip.data.chunk_reader import ChunkReader
from flip.data.manifest import build
from flip.data.manifest.build import ChunkTableBuilder, DamagedShards, index, merge, part_folder, sorted_keys
from flip.data.manifest.census import Census, SampleKind
from flip.data.manifest.manifest import write
from flip.data.manifest.scan import Scan, ScanJournal, Shard, scan_shard
from flip.data.storage.base import ObjectStat
from flip.runs.errors import ConfigError, DataError, PermissionDenied
from tests.flip.data.manifest.test_manifest import write_tar
from tests.synthetic import caption, make_dataset


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), samples=61, shards=7, size=16, chunk=8)


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "data")


@pytest.fixture
def reference(folder, tmp_path):
    """The files of the manifest that an undisturbed pass writes."""
    return contents(index(shards(folder), tmp_path / "whole", 8).folder)


@pytest.fixture
def scanned(monkeypatch):
    """The keys of the shards that this process scans, in order. Grows during the test."""
    keys = []

    def recording_scan(key, *rest):
        keys.append(key)
        return scan_shard(key, *rest)

    monkeypatch.setattr(build, "scan_shard", recording_scan)
    return keys


def shards(folder):
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop(Exception):
    pass


def stop_after(count):
    def progress(done, total, text):
        if text.startswith(f"{count} of"):
            raise Stop

    return progress


def journal_of_stopped_index(folder, out, count):
    """Stop the index after ``count`` shards. Return the file of its journal."""
    with pytest.raises(Stop):
        index(shards(folder), out, 8, stop_after(count))
    (journal,) = part_folder(out).iterdir()
    return journal


def test_index_with_several_workers_equals_single_process(folder, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_BYTES_PER_PROCESS", 1 << 10)
    process_names = set()
    manifest = index(
        shards(folder), tmp_path / "m", 8,
        lambda *_: process_names.update(process.name for process in multiprocessing.active_children()), workers=3,
    )  # fmt: skip
    assert process_names >= {"index-0", "index-1", "index-2"}
    assert contents(manifest.folder) == reference and not (tmp_path / "m.part").exists()


def test_index_resumes_without_rescanning_finished_shards(folder, reference, tmp_path, scanned):
    journal = journal_of_stopped_index(folder, tmp_path / "m", 3)
    assert scanned == shards(folder)[:3] and len(journal.read_bytes().splitlines()) == 3
    reports = []
    del scanned[:]
    manifest = index(shards(folder), tmp_path / "m", 8, lambda *progress: reports.append(progress))
    assert scanned == shards(folder)[3:] and contents(manifest.folder) == reference
    sizes = [os.stat(shard).st_size for shard in shards(folder)]
    assert reports[0] == (sum(sizes[:3]), sum(sizes), "3 of 7 shards")
    assert reports[-1] == (sum(sizes), sum(sizes), "7 of 7 shards") and not journal.parent.exists()


def test_index_rescans_shard_with_changed_content_or_mtime(folder, tmp_path, scanned):
    journal_of_stopped_index(folder, tmp_path / "m", 3)
    first, second, third = shards(folder)[:3]
    write_tar(first, [("a.txt", b"1"), ("b.txt", b"2")])
    os.utime(second, ns=(1, 1))
    del scanned[:]
    manifest = index(shards(folder), tmp_path / "m", 8)
    assert scanned == [first, second, *shards(folder)[3:]] and manifest.shards[0, 0] == 2
    assert manifest.digest == index(shards(folder), tmp_path / "again", 8).digest


def spoil(line):
    """Change an array in a line of the journal. Its checksum no longer matches."""
    facts = json.loads(line[9:])
    facts["arrays"]["crcs"][1] = base64.b64encode(bytes(4 * facts["samples"])).decode()
    return line[:9] + json.dumps(facts).encode() + b"\n"


@pytest.mark.parametrize(
    "damage, lost",
    [
        (lambda lines: [lines[0], lines[1][:-30]], 1),
        (lambda lines: [lines[0][: len(lines[0]) // 2] + lines[1]], 2),
        (lambda lines: [spoil(lines[0]), lines[1]], 1),
        (lambda lines: [lines[0], b"\0" * 600 + b"\n", lines[1]], 0),
        (lambda lines: [b"\n", b"{}\n", b"ffffffff {}\n", *lines], 0),
        (lambda lines: [], 2),
    ],
)
def test_index_rescans_shards_of_damaged_journal_lines(folder, reference, tmp_path, scanned, damage, lost):
    journal = journal_of_stopped_index(folder, tmp_path / "m", 2)
    journal.write_bytes(b"".join(damage(journal.read_bytes().splitlines(keepends=True))))
    del scanned[:]
    manifest = index(shards(folder), tmp_path / "m", 8)
    assert len(scanned) == 5 + lost and contents(manifest.folder) == reference


def test_index_ignores_journal_with_other_scan_fields(folder, tmp_path, scanned):
    """A journal of another release may lack a field of Scan or hold a field that Scan lacks."""
    journal = journal_of_stopped_index(folder, tmp_path / "m", 2)
    text = journal.read_bytes().splitlines()[0][9:].replace(b'"crcs"', b'"sums"')
    journal.write_bytes(b"%08x %s\n" % (zlib.crc32(text), text))
    del scanned[:]
    index(shards(folder), tmp_path / "m", 8)
    assert len(scanned) == 7


def test_scan_journal_returns_scan_only_for_same_etag(tmp_path):
    census = Census(Counter({SampleKind(("\udc80", "jpg"), ("jpg",), True): 2}), Counter({"why": 3}))
    scan = Scan(*np.array([[1, 2], [3, 4], [0, 0]], dtype=np.uint32), np.zeros(2, dtype=np.uint8), census)
    before, after = (Shard("s3://b/\udc80.tar", ObjectStat(1536, etag)) for etag in ("one", "two"))
    journal = ScanJournal(tmp_path / "part")
    journal.start()
    journal.add(before, scan)
    journal.close()
    reopened = ScanJournal(tmp_path / "part")
    assert before in reopened and after not in reopened and reopened.samples(before) == 2
    *arrays, counts = reopened.read(before)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(arrays, scan[:-1], strict=True))
    assert counts == census
    (path,) = (tmp_path / "part").iterdir()
    path.write_bytes(path.read_bytes().replace(b"one", b"two"))
    with pytest.raises(DataError, match="changed or removed meanwhile"):
        reopened.read(before)
    (tmp_path / "part" / "notes.txt").write_text("mine")
    reopened.remove()
    assert [entry.name for entry in (tmp_path / "part").iterdir()] == ["notes.txt"]


def test_index_reports_damaged_shards_together_and_can_skip_them(folder, tmp_path, scanned):
    for number in (1, 2, 4, 5):
        with open(shards(folder)[number], "r+b") as file:
            file.truncate(700)
    with pytest.raises(
        DamagedShards, match="4 of 7 shards cannot be indexed: .*00001.tar: not a whole tar: .*; and 1 more"
    ) as error:
        index(shards(folder), tmp_path / "m", 8)
    assert list(error.value.errors) == [shards(folder)[i] for i in (1, 2, 4, 5)] and error.value.code == 65
    assert str(tmp_path / "m.part") in error.value.remedy and not (tmp_path / "m").exists()
    for number in (1, 2):
        shutil.copy(tmp_path / "data" / "00000.tar", shards(folder)[number])
    del scanned[:]
    results = build.scan_shards(shards(folder), tmp_path / "m", skip_damaged=True)
    assert len(scanned) == 4 and results.reused == 3 and list(results.damaged) == [shards(folder)[i] for i in (4, 5)]
    manifest = merge(results, tmp_path / "m", 8)
    assert manifest.keys == [shards(folder)[i] for i in (0, 1, 2, 3, 6)]
    assert manifest.settings["left_out"][1] == {
        "shard": shards(folder)[5],
        "reason": "not a whole tar: member of 313 bytes runs past the end; its header is at byte 0",
    }
    assert manifest.digest == index(manifest.keys, tmp_path / "those", 8).digest


def test_index_reports_missing_shard_before_reading_others(folder, tmp_path, scanned):
    missing = [str(folder / f"{i}.tar") for i in range(2)]
    with pytest.raises(
        DamagedShards, match=f"2 of 9 shards .*: {missing[0]}: the shard is missing; {missing[1]}: the shard is missing"
    ):
        index([*shards(folder), *missing], tmp_path / "m")
    assert not scanned and not (tmp_path / "m.part").exists()
    results = build.scan_shards([*missing, *shards(folder)], tmp_path / "m", skip_damaged=True)
    assert len(results.shards) == 7 and list(results.damaged) == missing
    with pytest.raises(DamagedShards, match="2 of 2 shards .*: the shard is missing"):
        merge(build.scan_shards(missing, tmp_path / "none", skip_damaged=True), tmp_path / "none")


def test_index_stops_at_other_errors_and_preserves_finished_scans(folder, tmp_path, monkeypatch):
    def denying_scan(key, *rest):
        if key == shards(folder)[2]:
            raise PermissionDenied("may not be read", key)
        return scan_shard(key, *rest)

    monkeypatch.setattr(build, "scan_shard", denying_scan)
    with pytest.raises(PermissionDenied):
        index(shards(folder), tmp_path / "m")
    monkeypatch.undo()
    assert build.scan_shards(shards(folder), tmp_path / "m").reused == 2
    with pytest.raises(ConfigError, match=r"1 \.\. 61"):
        index(shards(folder), tmp_path / "m", 62)
    assert build.scan_shards(shards(folder), tmp_path / "m").reused == 7


def test_chunk_table_builder_keeps_one_number_per_chunk():
    """Those of all samples of LAION-2B would need gigabytes."""
    zeros = np.zeros(100_000, np.uint32)
    census = Census(Counter(), Counter())
    scan = Scan(zeros, zeros, zeros[:1], zeros.astype(np.uint8), census)
    builder = ChunkTableBuilder(1000)
    tracemalloc.start()
    try:
        builder.add(scan)
        assert tracemalloc.get_traced_memory()[0] < zeros.nbytes / 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("old, chunk", [(1, 8), (2, 1), (2, 8), (3, 4), (3, 25), (6, 20), (6, 52)])
def test_merge_with_added_shards_equals_index_of_all_shards(folder, tmp_path, scanned, old, chunk):
    """Six shards hold 52 samples, one shard holds 8. In chunks of 20, the last chunk holds 12 samples of two shards.
    In chunks of 52, or of 8 with one shard, the last chunk is full."""
    old_manifest = index(shards(folder)[:old], tmp_path / "old", chunk)
    del scanned[:]
    results = build.scan_shards(shards(folder)[old:], tmp_path / "new")
    new = merge(results, tmp_path / "new", old=old_manifest)
    assert scanned == shards(folder)[old:], "merge reads no old shard"
    assert contents(new.folder) == contents(index(shards(folder), tmp_path / "all", chunk).folder)


def test_merge_with_added_shards_preserves_ids_of_old_samples(folder, tmp_path):
    late = shards(folder)[:2]
    early = shards(folder)[2:]
    manifest = index(early, tmp_path / "m", 4)
    old = write(
        tmp_path / "old", manifest, manifest.checksums, {3: "bad"}, {"left_out": [{"shard": late[0], "reason": "cut"}]}
    )
    new = merge(build.scan_shards(late, tmp_path / "new"), tmp_path / "new", old=old)
    assert new.keys == [*early, *late] and new.exceptions == {3: "bad"} and new.settings == {}
    assert [new.locate(id) for id in range(old.samples)] == [old.locate(id) for id in range(old.samples)]
    texts = [bytes(s["txt"]).decode() for j in range(new.chunks) for s in ChunkReader().read_chunk(new, j)]
    assert texts == [caption(i) for i in (*range(17, 61), *range(17))]
    with pytest.raises(ConfigError, match="in the old manifest already.*00003.tar"):
        sorted_keys([late[0], early[1]], old.keys)


@pytest.mark.parametrize("names", [["a\nb"], ["a", "z\n"], ["a", "a"]])
def test_sorted_keys_rejects_line_breaks_and_repeated_names(names):
    with pytest.raises(ConfigError, match="named twice, or its name holds a line break"):
        sorted_keys(names)


@pytest.mark.parametrize("when", ["asking", 0, 3, 6, "merging"])
def test_index_stops_if_concurrent_index_writes_manifest_first(folder, reference, tmp_path, monkeypatch, when):
    """The process that finishes first removes all scans. The other processes then find its manifest."""
    out = tmp_path / "m"
    keys = shards(folder)
    scanned = []

    def run_concurrent_index():
        monkeypatch.undo()
        index(keys, out, 8)

    def racing_scan(key, *rest):
        if key == keys[when]:
            run_concurrent_index()
        scanned.append(key)
        return scan_shard(key, *rest)

    def racing_stat(key, stat=build.file_stat):
        if key == keys[6]:
            run_concurrent_index()
        return stat(key)

    if when == "asking":
        monkeypatch.setattr(build, "file_stat", racing_stat)
    elif when != "merging":
        monkeypatch.setattr(build, "scan_shard", racing_scan)
    with pytest.raises(ConfigError, match="m: there is a manifest already"):
        if when == "merging":
            results = build.scan_shards(keys, out)
            run_concurrent_index()
            merge(results, out, 8)
        index(keys, out, 8)
    assert scanned == ([] if isinstance(when, str) else keys[: when + 1]), "the index stops at the next shard"
    assert contents(out) == reference and not part_folder(out).exists()


def test_scan_journal_reports_lost_scans_and_recreates_lost_folder(folder, tmp_path, monkeypatch):
    """Scans may vanish although no manifest is visible: a user deletes them, or a file system shows the manifest late.
    The folder may also vanish right after its creation."""
    results = build.scan_shards(shards(folder), tmp_path / "m")
    shutil.rmtree(part_folder(tmp_path / "m"))
    with pytest.raises(DataError, match=r"jsonl: it was changed or removed meanwhile\. Give the same command again"):
        merge(results, tmp_path / "m")
    journal = ScanJournal(tmp_path / "part")
    created = []
    mkdir = Path.mkdir

    def mkdir_that_loses_first_folder(path, *rest, **options):
        mkdir(path, *rest, **options)
        created.append(path)
        if len(created) == 1:
            ScanJournal(path).close()

    monkeypatch.setattr(Path, "mkdir", mkdir_that_loses_first_folder)
    journal.start()
    assert len(created) == 2 and len(list((tmp_path / "part").iterdir())) == 1


def test_index_reports_unwritable_output_before_reading_shards(folder, tmp_path, scanned):
    (tmp_path / "m.part").write_text("a file")
    with pytest.raises(FileExistsError):
        index(shards(folder), tmp_path / "m")
    assert not scanned
