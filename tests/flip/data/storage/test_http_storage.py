"""Tests reads from a web server on loopback: exact ranges, versions, faults, and training from it."""

import asyncio
import socket
from types import SimpleNamespace

import pytest
import torch
from yarl import URL

from flip.data.manifest.build import index
from flip.data.manifest.manifest import Manifest
from flip.data.storage import http_storage
from flip.data.storage.base import RequestError
from flip.data.storage.client import StorageClient
from flip.data.storage.retry import RetryPolicy
from flip.runs.errors import ConfigError, DataError, PermissionDenied, StorageError
from tests.flip.data.loading import BATCH, CHUNK, SAMPLES, loader
from tests.harness.web_server import WebServer
from tests.synthetic import make_dataset, make_tokenizer
from tools.commands.shards import main

DATA = bytes(range(256)) * 4000
END = len(DATA)


def client(**policy):
    return StorageClient(retry_policy=RetryPolicy(**({"deadline": 20.0, "timeout": 10.0, "first": 0.01} | policy)))


@pytest.fixture
def web(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.tar").write_bytes(DATA)
    (tmp_path / "web" / "empty.tar").write_bytes(b"")
    server = WebServer(tmp_path / "web")
    yield server
    server.stop()


def test_range_is_exact_and_one_request(web):
    reader = client()
    key = f"{web.address}/a.tar"
    stat = reader.stat(key)
    assert stat.size == END and len(stat.etag) == 32 and reader.stat(f"{web.address}/empty.tar").size == 0
    web.requests.clear()
    web.sent = 0
    for start, stop in ((0, 1), (1000, 700_000), (END - 1, END), (0, END)):
        assert reader.read(key, start, stop, stat.etag) == DATA[start:stop]
    assert [asked for _, asked in web.requests] == [
        "bytes=0-0", "bytes=1000-699999", f"bytes={END - 1}-{END - 1}", f"bytes=0-{END - 1}",
    ]  # fmt: skip
    assert web.sent == 1 + 699_000 + 1 + END


def test_version_is_the_etag_or_size_and_time(web):
    web.etags = False
    stat = client().stat(f"{web.address}/a.tar")
    assert stat.etag.startswith(f"{END}@") and stat.etag.endswith("GMT")
    assert client().read(f"{web.address}/a.tar", 5, 9, stat.etag) == DATA[5:9]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("short", "connection"), ("stall", "stall"), ("redirect", ""), ("other", "range"), ("whole", "range"),
        ("packed", "range"), (500, "server"), (503, "slowdown"), (429, "slowdown"), (403, "denied"), (401, "denied"),
        (400, "refused"),
    ],
)  # fmt: skip
def test_fault_after_a_success_is_retried(web, fault, kind):
    reader = client(timeout=0.5 if fault == "stall" else 10.0)
    key = f"{web.address}/a.tar"
    etag = reader.stat(key).etag
    web.plan = [fault]
    assert reader.read(key, 1000, 900_000, etag) == DATA[1000:900_000]
    assert [name for name, count in reader.counters.retries.items() if count] == list(filter(None, [kind]))
    assert (reader.counters.resumed > 0) == (fault in ("short", "stall"))


@pytest.mark.parametrize(
    ("fault", "raised", "code", "text"),
    [
        (404, DataError, 65, "the shard is missing"),
        (416, DataError, 65, "not the one that was indexed"),
        (403, PermissionDenied, 77, "Check the credentials of a web server"),
        ("whole", ConfigError, 78, "server ignores the start of a range"),
        ("packed", ConfigError, 78, "compressed on their way"),
        ("redirect", ConfigError, 78, "redirects again and again"),
        (500, StorageError, 69, "reading failed for 0.5 s"),
        ("short", StorageError, 69, "reading failed for 0.5 s"),
    ],
)
def test_fault_that_lasts_ends_with_its_exit_code(web, fault, raised, code, text, monkeypatch):
    monkeypatch.setattr("flip.data.storage.retry.FIRST_ACCESS", 0.1)
    web.always = fault
    with pytest.raises(raised, match=text) as error:
        client(deadline=0.5).read(f"{web.address}/a.tar", 1000, 2000)
    assert error.value.code == code


def test_server_that_is_away_ends_with_69():
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    with pytest.raises(StorageError) as error:
        client(deadline=0.3).read(f"http://127.0.0.1:{port}/a.tar", 0, 9)
    assert error.value.code == 69


def test_file_that_changed_or_is_shorter_is_refused(web):
    reader = client()
    key = f"{web.address}/a.tar"
    etag = reader.stat(key).etag
    (web.folder / "a.tar").write_bytes(DATA[::-1])
    with pytest.raises(DataError, match="its ETag is .*, indexed was"):
        reader.read(key, 0, 9, etag)
    with pytest.raises(DataError, match=f"ends at byte {END}, needed were {END + 1}") as error:
        reader.read(key, 0, END + 1)
    assert error.value.code == 65


@pytest.mark.parametrize(
    ("way", "refused"),
    [(["https", "http"], True), (["https", "http", "https"], True), (["http", "https"], False), (["https"], False)],
)
def test_redirect_from_https_to_http_is_refused(way, refused):
    replies = [SimpleNamespace(url=URL(f"{scheme}://h/a"), status=206, headers={}) for scheme in way]
    reply = SimpleNamespace(history=replies[:-1], **vars(replies[-1]))
    if not refused:
        http_storage._refuse(reply)
        return
    with pytest.raises(RequestError, match="from https to http") as error:
        http_storage._refuse(reply)
    assert error.value.kind == "redirect"


def test_body_without_end_is_cut(web):
    """A server could send more than was asked for."""

    class Endless:
        async def read(self, count):
            return b"x" * count

    with pytest.raises(RequestError, match="more than the 9 bytes"):
        asyncio.run(http_storage.receive(Endless(), 0, 9, 5.0, "", (), lambda error: error))


def test_web_servers_are_read_by_names_and_braces(web, tmp_path, capsys):
    dataset = make_dataset(web.folder / "set", 60, 3, size=16, chunk=4)
    for pattern, code in (("set/{00000..00002}.tar", 0), ("set/*.tar", 78), ("set/00000.tar?download=true", 0)):
        out = tmp_path / f"manifest{len(pattern)}"
        assert main(["index", f"{web.address}/{pattern}", "--out", str(out), "--json"]) == code
    assert "a web server has no listing" in capsys.readouterr().err
    whole = Manifest.load(tmp_path / "manifest22")
    local = Manifest.load(dataset)
    assert whole.samples == local.samples and all(whole.etags)
    moved = tmp_path / "moved"
    assert main(["move", str(dataset), "--to", f"{web.address}/set", "--out", str(moved)]) == 0
    assert Manifest.load(moved).keys == whole.keys and Manifest.load(moved).digest == local.digest
    web.always = 403
    assert main(["verify", str(moved)]) == 77


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_tokenizer(root / "tokenizer.json")
    return make_dataset(root / "shards", SAMPLES, 5, size=32, classes=7, chunk=CHUNK)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_over_http_with_faults_equal_those_of_files(original, tmp_path, workers):
    web = WebServer(original)
    keys = [f"{web.address}/{path.name}" for path in sorted(original.glob("*.tar"))]
    manifest = index(keys, tmp_path / "manifest", chunk=CHUNK)
    source = loader(original, folder=manifest.folder, workers=workers, deadline=60.0)
    batches = source.batches(0, BATCH, "0.5")
    expected = loader(original).batches(0, BATCH, "0.5")
    for step in range(4):
        first = next(batches)
        if step == 0:
            web.plan = ["short", 503, 500, "other", 403, "whole"] * 2
        second = next(expected)
        for name in ("patches", "keep_indices", "tokens", "ids"):
            assert torch.equal(getattr(first, name), getattr(second, name)), name
    batches.close()
    web.stop()
    assert not web.plan
