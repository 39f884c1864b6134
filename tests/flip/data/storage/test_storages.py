"""Tests the table of storages, and reads over fsspec: memory, files, and file systems that fail."""

import os
import time

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from flip.data.storage.client import StorageClient
from flip.data.storage.fsspec_storage import FsspecStorage
from flip.data.storage.retry import RetryPolicy
from flip.data.storage.storages import STORAGES, open_storage
from flip.runs.addresses import SCHEMES, SHARDS, Scheme, why_refused
from flip.runs.errors import ConfigError, DataError, PermissionDenied, StorageError

DATA = bytes(range(256)) * 40
NO_STORAGE = {
    "cached", "blockcache", "filecache", "simplecache", "reference", "dir", "tar", "zip", "libarchive", "generic",
    "async_wrapper", "asyncwrapper", "asynclocal", "arrow_hdfs", "data", "local", "git", "github", "gist", "dask",
    "dvc", "jlab", "jupyter", "pyscript", "wandb", "adl", "box", "dropbox", "gdrive", "s3a", "tosfs",
}  # fmt: skip
"""Schemes of fsspec that read other file systems, this machine's, or code; retired, interactive ones; second names."""


def client(**policy):
    return StorageClient(retry_policy=RetryPolicy(**({"deadline": 2.0, "first": 0.01} | policy)))


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    files = fsspec.filesystem("memory")
    files.pipe_file("/set/a.tar", DATA)
    return files


def serve(monkeypatch, file_system):
    """Let ``faulty://`` name a file system."""
    monkeypatch.setitem(SCHEMES, "faulty", Scheme("faults", holds=(SHARDS,)))
    monkeypatch.setattr("flip.data.storage.base.SHARD_PREFIXES", ("faulty://",))
    fsspec.register_implementation("faulty", file_system, clobber=True)


class Faulty(MemoryFileSystem):
    """Raises or returns what ``replies`` holds, then reads as it should."""

    protocol = "faulty"
    cachable = False
    replies: list = []
    requests: list = []

    def cat_file(self, path, start=None, end=None, **more):
        self.requests.append((start, end))
        reply = self.replies.pop(0) if self.replies else DATA[start:end]
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, float):
            time.sleep(reply)
            return DATA[start:end]
        return reply

    def info(self, path, **more):
        return {"name": path, "size": len(DATA), "type": "file", "etag": '"one"'}


@pytest.fixture
def faulty(monkeypatch):
    serve(monkeypatch, Faulty)
    monkeypatch.setattr(Faulty, "replies", [])
    monkeypatch.setattr(Faulty, "requests", [])
    return Faulty


def test_every_scheme_of_fsspec_is_a_row_or_no_storage():
    assert set(known_implementations) - set(SCHEMES) == NO_STORAGE & set(known_implementations)
    assert not NO_STORAGE & set(SCHEMES) and set(STORAGES) <= set(SCHEMES)
    for scheme in ("reference", "simplecache", "filecache", "zip", "github"):
        assert "is not admitted" in why_refused(f"{scheme}://a/b")
    assert type(open_storage("gs://b/c", 1.0)) is FsspecStorage and type(open_storage("/a", 1.0)) is FsspecStorage


def test_memory_is_read_by_exact_ranges_and_its_version(memory):
    key = "memory://set/a.tar"
    reader = client()
    stat = reader.stat(key)
    assert stat.size == len(DATA) and stat.etag.startswith(f"{len(DATA)}@")
    assert reader.list("memory://set/") == {key: stat} == reader.list("memory://set/a")
    assert reader.read(key, 7, 1000, stat.etag) == DATA[7:1000]
    with pytest.raises(DataError, match=f"ends at byte {len(DATA)}, needed were {len(DATA) + 1}"):
        reader.read(key, 0, len(DATA) + 1)
    with pytest.raises(DataError, match="is missing .*the memory of one process") as error:
        reader.stat("memory://set/b.tar")
    assert error.value.code == 65


def test_object_that_changed_is_named_after_reconnecting(memory):
    reader = client()
    key = "memory://set/a.tar"
    etag = reader.stat(key).etag
    assert reader.read(key, 0, 9, etag) == DATA[:9]
    time.sleep(0.001)
    memory.pipe_file("/set/a.tar", DATA[::-1])
    # The caller compares a checksum, and reconnects if it differs.
    assert reader.read(key, 0, 9, etag) == DATA[::-1][:9]
    reader._storage(key).reconnect()
    with pytest.raises(DataError, match="its ETag is .*, indexed was ") as error:
        reader.read(key, 0, 9, etag)
    assert error.value.code == 65


def test_files_over_fsspec_equal_those_of_the_local_reader(tmp_path):
    path = tmp_path / "a b.tar"
    path.write_bytes(DATA)
    storage = FsspecStorage()
    key = f"file://{path}"
    for start, stop in ((0, 1), (5, 600), (0, len(DATA))):
        assert storage.get(key, start, stop).result().data == client().read(str(path), start, stop)
    assert storage.get(key, 0, 1).result().etag == storage.stat(key).etag
    with pytest.raises(DataError, match="ends at byte"):
        storage.get(key, 0, len(DATA) + 1).result()


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (DATA[5:90], "short"),
        (DATA[5:200], "short"),
        (OSError(5, "broken"), "io"),
        (ConnectionResetError("reset"), "connection"),
        (RuntimeError("of a package"), "connection"),
        (TimeoutError("late"), "stall"),
        (0.2, "stall"),
        (PermissionError("no"), "denied"),
        (type("AuthenticationException", (Exception,), {})("no"), "denied"),
        (type("HttpError", (Exception,), {"code": 503})("busy"), "slowdown"),
        (type("HttpError", (OSError,), {"status_code": 500})("server"), "server"),
    ],
)
def test_fault_is_retried_and_counted(faulty, reply, kind, monkeypatch):
    monkeypatch.setattr(FsspecStorage, "_limit", lambda self, size: -0.9 if kind == "stall" else 5.0)
    reader = client()
    Faulty.replies.append(reply)
    assert reader.read("faulty://a", 5, 100, "one") == DATA[5:100]
    assert [name for name, count in reader.counters.retries.items() if count] == [kind]
    assert Faulty.requests == [(5, 100), (5, 100)]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (FileNotFoundError("gone"), DataError),
        (IsADirectoryError("folder"), DataError),
        (type("HttpError", (Exception,), {"code": 404})("gone"), DataError),
        (type("HttpError", (Exception,), {"code": 412})("other"), DataError),
        (OSError(5, "broken"), StorageError),
    ],
)
def test_fault_that_lasts_ends_with_its_exit_code(faulty, error, raised):
    Faulty.replies.extend([error] * 1000)
    with pytest.raises(raised) as caught:
        client(deadline=0.2).read("faulty://a", 5, 100, "one")
    assert caught.value.code == {DataError: 65, StorageError: 69}[raised]


def test_denied_first_access_names_the_storage(faulty, monkeypatch):
    monkeypatch.setattr("flip.data.storage.retry.FIRST_ACCESS", 0.05)
    Faulty.replies.extend([PermissionError("403")] * 1000)
    reader = client()
    with pytest.raises(PermissionDenied, match="Check the credentials of faults") as caught:
        reader._with_retries("faulty://a", lambda storage: storage.get("faulty://a", 0, 9))
    assert caught.value.code == 77


def test_changed_object_is_refused(faulty):
    with pytest.raises(DataError, match="its ETag is one, indexed was two"):
        client().read("faulty://a", 0, 9, "two")


def test_file_system_that_reads_ahead_fetches_only_what_was_asked(monkeypatch):
    """Most synchronous file systems of fsspec fetch 5 MB for each opened file."""
    fetched = []

    class File(AbstractBufferedFile):
        def _fetch_range(self, start, end):
            fetched.append((start, end))
            return DATA[start:end]

    class Ahead(AbstractFileSystem):
        cachable = False

        def info(self, path, **more):
            return {"name": path, "size": len(DATA), "type": "file"}

        def _open(self, path, mode="rb", block_size=None, **more):
            return File(self, path, mode, size=len(DATA), **{k: v for k, v in more.items() if k == "cache_type"})

    serve(monkeypatch, Ahead)
    assert client().read("faulty://a", 5, 100) == DATA[5:100] and fetched == [(5, 100)]


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("az", "adlfs"), ("sftp", "paramiko")])
def test_missing_package_is_named(scheme, package, monkeypatch):
    def refuse(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", refuse)
    with pytest.raises(ConfigError, match=f"{scheme}:// needs the package {package}.*pip install {package}") as error:
        client().stat(f"{scheme}://a/b")
    assert error.value.code == 78


def test_process_that_was_forked_opens_its_own_file_system(memory, monkeypatch):
    storage = FsspecStorage()
    storage.stat("memory://set/a.tar")
    (before,) = storage._file_systems.values()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    storage.stat("memory://set/a.tar")
    (after,) = storage._file_systems.values()
    assert after is not before
