"""Tests the chunk cache of a node: batches are equal with it, without it and after damage to its files."""

import contextlib
import logging
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from mmap import PAGESIZE
from pathlib import Path

import pytest
import torch

from flip.data.chunk_reader import ChunkCache, ChunkReader
from flip.data.manifest.manifest import Manifest
from flip.data.storage.base import LocalStorage
from tests.flip.data.loading import BATCH, loader

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def manifest(original):
    return Manifest.load(original)


def take(source, count=6):
    batches = source.batches(0, BATCH, "0.5")
    try:
        return [next(batches) for _ in range(count)], source.counters()
    finally:
        batches.close()


def same(actual, expected):
    names = ("patches", "keep_indices", "tokens", "ids")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for a, b in zip(actual, expected, strict=True) for n in names)


def cached_files(folder):
    return sorted(path for path in folder.glob("flip-chunks-*/*/*"))


def chunk_pieces(manifest, j):
    pieces = []
    for key, start, stop, _ in manifest.chunk_reads(j):
        pieces.append(Path(key).read_bytes()[start:stop])
    return pieces


def fill(cache, manifest, chunks):
    for j in chunks:
        cache.put(manifest, j, chunk_pieces(manifest, j))


@pytest.fixture(scope="module")
def expected(original):
    return take(loader(original))[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_equal_with_empty_filled_or_damaged_chunk_cache(original, tmp_path, expected, workers):
    folder = tmp_path / "node"
    batches, before = take(loader(original, workers=workers, cache=str(folder)))
    assert same(batches, expected) and before.cache_misses > 0 == before.cache_failures
    batches, after = take(loader(original, workers=workers, cache=str(folder)))
    assert same(batches, expected) and after.cache_hits > 50 and after.requests < before.requests / 5
    for number, path in enumerate(cached_files(folder)):
        data = path.read_bytes()
        path.write_bytes([data[:-1], b"", data[:512] + b"\1" + data[513:], data + b"\0"][number % 4])
    batches, poisoned = take(loader(original, workers=workers, cache=str(folder)))
    assert same(batches, expected) and poisoned.cache_failures > 50 and poisoned.requests > 50


def test_chunk_cache_replaces_damaged_chunk(manifest, tmp_path):
    cache = ChunkCache(tmp_path, 10**9)
    reader = ChunkReader(cache=cache)
    texts = [bytes(sample["txt"]) for sample in reader.read_chunk(manifest, 3)]
    (path,) = cached_files(tmp_path)
    good = path.read_bytes()
    assert good == b"".join(chunk_pieces(manifest, 3))
    path.write_bytes(good[:-1] + b"\1")
    assert cache.get(manifest, 3) is None and not cached_files(tmp_path), "cache.get deletes a damaged chunk"
    cache.put(manifest, 3, [good[:-1], b"\1"])
    for _ in range(2):
        assert [bytes(sample["txt"]) for sample in reader.read_chunk(manifest, 3)] == texts
        assert path.read_bytes() == good
    counters = reader.counters
    assert (counters.cache_hits, counters.cache_misses, counters.cache_failures) == (1, 3, 2)


def test_chunk_cache_restores_chunk_across_two_shards(manifest, tmp_path):
    j = next(j for j in range(manifest.chunks) if len(manifest.chunk_reads(j)) == 2)
    reader = ChunkReader(cache=ChunkCache(tmp_path, 10**9))
    first, again = (reader.read_chunk(manifest, j) for _ in range(2))
    assert [s.keys() for s in first] == [s.keys() for s in again] and reader.counters.cache_hits == 1
    assert [bytes(v) for s in first for v in s.values()] == [bytes(v) for s in again for v in s.values()]


def test_chunk_cache_evicts_oldest_files_within_size_limit(manifest, tmp_path):
    sizes = [sum(map(len, chunk_pieces(manifest, j))) for j in range(30)]
    cache = ChunkCache(tmp_path, sum(sizes[:10]))
    fill(cache, manifest, range(10))
    assert len(cached_files(tmp_path)) == 10
    for age, j in enumerate((4, 7, 0)):  # 4 is the oldest
        path = next(path for path in cached_files(tmp_path) if path.name == str(j))
        os.utime(path, (1000 + age, 1000 + age))
    temporary = cached_files(tmp_path)[0].with_name("99.tmp.1.1")  # left by a killed process
    temporary.write_bytes(bytes(100))
    os.utime(temporary, (999, 999))
    fill(cache, manifest, [10])
    names = {path.name for path in cached_files(tmp_path)}
    assert not {"4", "99.tmp.1.1"} & names and {"1", "10"} <= names
    fill(cache, manifest, range(11, 30))
    assert 0.7 * sum(sizes[:10]) < sum(path.stat().st_size for path in cached_files(tmp_path)) <= sum(sizes[:10])
    fill(ChunkCache(tmp_path, sizes[0] - 1), manifest, [0])
    assert "0" not in {path.name for path in cached_files(tmp_path)}, "the cache stores no chunk above its size limit"


def test_chunk_cache_evicts_only_its_own_files(manifest, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1").write_bytes(bytes(10**6))
    fill(ChunkCache(tmp_path, 30_000), manifest, range(30))
    assert cached_files(tmp_path) and (tmp_path / "mine" / "1").stat().st_size == 10**6
    for name in ("notes.txt", "1.tmp.txt", "-1"):
        (cached_files(tmp_path)[0].parent / name).write_bytes(bytes(10**6))
    folder = cached_files(tmp_path)[0].parent
    (folder.parent / "size").unlink()  # the sizes are counted again
    fill(ChunkCache(tmp_path, 20_000), manifest, range(30))
    assert {"notes.txt", "1.tmp.txt", "-1"} <= set(os.listdir(folder)) and len(os.listdir(folder)) > 3


def test_chunk_cache_eviction_follows_no_links(manifest, tmp_path):
    """Regression test: eviction deleted files in any folder that a link in the cache pointed to."""
    target = tmp_path / "others"
    cache = tmp_path / "cache"
    target.mkdir()
    for name in ("1", "2"):
        (target / name).write_bytes(bytes(10**6))
    folder = cache / f"flip-chunks-{os.geteuid()}"
    folder.mkdir(parents=True)
    (folder / manifest.digest).mkdir()
    (folder / "digest").symlink_to(target)
    (folder / manifest.digest / "99").symlink_to(target / "1")
    fill(ChunkCache(cache, 30_000), manifest, range(30))
    assert sorted(path.name for path in target.iterdir()) == ["1", "2"] and len(cached_files(cache)) > 1
    assert (folder.stat().st_mode & 0o777) == 0o700, "only the owner can write to the folder"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_chunk_cache_rejects_folder_of_other_user(manifest, tmp_path, caplog):
    folder = tmp_path / f"flip-chunks-{os.geteuid()}"
    folder.mkdir()
    os.chown(folder, 12345, -1)
    cache = ChunkCache(tmp_path, 10**9)
    fill(cache, manifest, range(3))
    assert cache.get(manifest, 0) is None and cache.failures == 4 and not list(folder.iterdir())
    assert "remove it or choose another place" in caplog.text


@pytest.mark.long
def test_chunk_cache_is_shared_by_processes_within_size_limit(original, manifest, tmp_path):
    """Four processes with too little space for all chunks read correct data and together stay within the limit."""
    script = (
        "import sys; from flip.data.chunk_reader import ChunkCache; from flip.data.manifest.manifest import Manifest\n"
        "from flip.data.chunk_reader import ChunkReader as Reader\n"
        f"manifest, cache = Manifest.load({str(original)!r}), ChunkCache({str(tmp_path)!r}, 100_000)\n"
        "reader, plain = Reader(cache=cache), Reader()\n"
        "for j in [*range(60), *range(20, 60), *range(60, 0, -1)]:\n"
        "    for a, b in zip(reader.read_chunk(manifest, j), plain.read_chunk(manifest, j), strict=True):\n"
        "        assert {n: bytes(v) for n, v in a.items()} == {n: bytes(v) for n, v in b.items()}\n"
        "assert cache.hits > 0 == cache.failures, (cache.hits, cache.failures)\n"
    )
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in running:
        assert process.wait(120) == 0, process.stderr.read()
    assert 50_000 < sum(path.stat().st_size for path in cached_files(tmp_path)) <= 100_000
    assert all(path.name.isdecimal() for path in cached_files(tmp_path)), "no temporary file remains"


@contextlib.contextmanager
def file_size_limit(size):
    """Limit files of this process to ``size`` bytes, which fails like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_chunk_reader_continues_if_cache_disk_is_full(manifest, tmp_path, caplog):
    cache = ChunkCache(tmp_path, 10**9)
    reader = ChunkReader(cache=cache)
    with caplog.at_level(logging.WARNING, "flip.data"), file_size_limit(512):
        for j in range(5):
            assert len(reader.read_chunk(manifest, j)) == manifest.chunk
    assert reader.counters.cache_failures == 5 and not cached_files(tmp_path)
    assert len(caplog.records) == 1 and "too large" in caplog.records[0].getMessage()
    reader.read_chunk(manifest, 0)
    assert len(cached_files(tmp_path)) == 1, "the cache stores chunks again after the disk has space"


def test_full_disk_leaves_size_of_chunk_cache_known(manifest, tmp_path, monkeypatch):
    """Else each chunk would list the whole cache, under a lock."""
    cache = ChunkCache(tmp_path, 10**9)
    reader = ChunkReader(cache=cache)
    reader.read_chunk(manifest, 0)
    monkeypatch.setattr(cache, "_evict", None)
    with file_size_limit(0):
        reader.read_chunk(manifest, 1)
    reader.read_chunk(manifest, 2)
    assert reader.counters.cache_failures == 1 and len(cached_files(tmp_path)) == 2


def test_chunk_with_wrong_checksum_is_read_again_from_disk(manifest, monkeypatch):
    """A page in this machine's memory may be damaged, not the file."""
    get = LocalStorage._get
    reads = []
    dropped = []

    def damaged_once(storage, key, start, stop):
        reply = get(storage, key, start, stop)
        reads.append((start, stop))
        if len(reads) > 1:
            return reply
        return reply._replace(data=bytes(len(reply.data)))

    monkeypatch.setattr(LocalStorage, "_get", damaged_once)
    monkeypatch.setattr(os, "posix_fadvise", lambda handle, start, size, how: dropped.append((start, start + size)))
    ((_, start, stop, _),) = manifest.chunk_ranges(0)
    assert len(ChunkReader().read_chunk(manifest, 0)) == manifest.chunk
    ((first, last),) = dropped
    assert reads == [(start, stop)] * 2 and first <= start < stop <= last and not (first | last) % PAGESIZE


def test_chunk_reader_continues_if_cache_path_is_a_file(manifest, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    reader = ChunkReader(cache=ChunkCache(tmp_path / "file", 10**9))
    assert len(reader.read_chunk(manifest, 0)) == manifest.chunk and reader.counters.cache_failures > 0


def test_chunk_cache_is_shared_by_threads(manifest, tmp_path):
    reader = ChunkReader(cache=ChunkCache(tmp_path, 60_000))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda j: len(reader.read_chunk(manifest, j % 40)), range(400)))
    assert set(read) == {manifest.chunk}
    counters = reader.counters
    assert counters.cache_hits + counters.cache_misses == 400 and counters.cache_failures == 0
    shutil.rmtree(tmp_path / f"flip-chunks-{os.geteuid()}")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda j: fill(ChunkCache(tmp_path, 10**9), manifest, [j]), range(100)))
    recorded = int((tmp_path / f"flip-chunks-{os.geteuid()}" / "size").read_text())
    assert recorded == sum(path.stat().st_size for path in cached_files(tmp_path))
    shutil.rmtree(tmp_path / f"flip-chunks-{os.geteuid()}")
    assert len(reader.read_chunk(manifest, 0)) == manifest.chunk and len(cached_files(tmp_path)) == 1
