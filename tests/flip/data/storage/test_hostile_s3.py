"""Tests the S3 client against a server on loopback whose replies have no end, arrive a byte at a time, or redirect."""

import gzip
import itertools
import re
import socket
import threading
import time

import pytest

from flip.data.storage import retry, s3
from flip.data.storage.base import RequestError
from flip.data.storage.client import StorageClient
from flip.data.storage.obstore_storage import ObstoreStorage
from flip.data.storage.retry import RetryPolicy
from flip.data.storage.s3_session import REPLY_LIMIT
from flip.runs.errors import DataError, StorageError

MOST_SENT = 64 << 20
"""Bytes after which the server ends a reply: a client without limits takes them all."""
BUFFERS = 24 << 20
"""More than sockets and libraries hold of a reply that the client no longer reads."""
ASKED = 1 << 20
KEY = "s3://bucket/0.tar"


class HostileServer:
    """Answers each request by ``reply(head)``, an iterable of bytes, on one connection a request."""

    def __init__(self):
        self.reply = None
        self.sent = []
        """Bytes of each reply that the network took."""
        self.requests = []
        self._ended = False
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def stop(self):
        self._ended = True
        self._socket.close()

    def _serve(self):
        while not self._ended:
            try:
                connection = self._socket.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection):
        with connection, connection.makefile("rb") as file:
            head = b"".join(iter(file.readline, b"\r\n"))
            if b"100-continue" in head.lower():
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            if length := re.search(rb"(?i)content-length: *(\d+)", head):
                file.read(int(length[1]))
            self.requests.append(head)
            self.sent.append(0)
            number = len(self.sent) - 1
            try:
                for piece in self.reply(head):
                    connection.sendall(piece)
                    self.sent[number] += len(piece)
                    if self._ended or self.sent[number] > MOST_SENT:
                        return
            except OSError:  # the client has closed the connection
                return


@pytest.fixture
def server(monkeypatch):
    server = HostileServer()
    for name, value in {
        "AWS_ENDPOINT_URL": server.address, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "of-the-test",
        "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


def client(timeout=5.0, deadline=0.0, remote=None):
    return StorageClient(retry_policy=RetryPolicy(deadline=deadline, timeout=timeout), remote=remote)


def chunked(status, *headers):
    lines = [f"HTTP/1.1 {status} X", "connection: close", "transfer-encoding: chunked", 'etag: "a"', *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def endless(head, piece):
    """A chunked body of equal pieces without end."""
    yield head
    for _ in itertools.count():
        yield b"%x\r\n%s\r\n" % (len(piece), piece)


def drip(head, piece=b"x"):
    """Bytes that arrive too seldom for a reply, and often enough for the time limit of a single read."""
    yield head
    for _ in range(150):
        time.sleep(0.2)
        yield piece


RANGE = f"content-range: bytes 0-{ASKED - 1}/{1 << 40}"


@pytest.mark.parametrize("storage", [s3.S3Storage, ObstoreStorage], ids=["s3fs", "obstore"])
@pytest.mark.parametrize("length", ["", f"content-length: {1 << 40}"], ids=["chunked", "too-long"])
def test_read_stops_after_the_bytes_that_it_asked_for(server, storage, length):
    head = chunked(206, RANGE)
    if length:
        head = head.replace(b"transfer-encoding: chunked", length.encode())
    server.reply = lambda request: endless(head, bytes(1 << 16))
    reader = client(remote=storage(5.0))
    with pytest.raises(StorageError):
        reader.read(KEY, 0, ASKED)
    assert max(server.sent) < ASKED + BUFFERS and sum(reader.counters.retries.values()) == 1


@pytest.mark.parametrize("status", [403, 500])
def test_endless_body_of_an_error_is_not_read(server, status):
    server.reply = lambda head: endless(chunked(status), b"<Error>" + b"x" * (1 << 16))
    with pytest.raises(StorageError, match=f"more than {REPLY_LIMIT:,} bytes"):
        client().read(KEY, 0, ASKED)
    assert max(server.sent) < REPLY_LIMIT + BUFFERS


def test_endless_page_of_a_listing_is_not_read(server):
    server.reply = lambda head: endless(chunked(200), b"<Contents><Key>a</Key></Contents>" * 1000)
    with pytest.raises(StorageError, match=f"more than {REPLY_LIMIT:,} bytes"):
        client().list("s3://bucket/")
    assert max(server.sent) < REPLY_LIMIT + BUFFERS


def page(head, token):
    """A page of a listing that goes on at ``token``."""
    keys = f"<Contents><Key>{token}.tar</Key><Size>1</Size></Contents>"
    more = f"<IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
    body = f"<ListBucketResult>{keys}{more}</ListBucketResult>".encode()
    yield b"HTTP/1.1 200 X\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def token_of(head):
    match = re.search(rb"continuation-token=(\d+)", head)
    return int(match[1]) if match else 0


@pytest.mark.parametrize("length", [1, 3])
def test_repeated_continuation_token_ends_a_listing(server, length):
    server.reply = lambda head: page(head, 1 + token_of(head) % length)
    with pytest.raises(StorageError, match="the listing repeats a continuation token"):
        client().list("s3://bucket/")
    assert len(server.requests) == length + 1


def test_listing_without_end_is_refused(server, monkeypatch):
    monkeypatch.setattr(s3, "MOST_PAGES", 5)
    server.reply = lambda head: page(head, 1 + token_of(head))
    with pytest.raises(DataError, match="the listing has more than") as error:
        client().list("s3://bucket/")
    assert error.value.code == 65 and len(server.requests) == 5


def test_number_of_parts_has_a_limit(server):
    """A list of 10^12 sizes would take the memory of the machine."""
    server.reply = lambda head: [
        b'HTTP/1.1 206 X\r\nconnection: close\r\netag: "a-2"\r\ncontent-length: 9\r\nx-amz-mp-parts-count: %d\r\n\r\n'
        % 10**12
    ]
    reader = client()
    assert reader.parts(KEY, reader.stat(KEY)) == []


@pytest.fixture
def other_host():
    """A server that no setting names: any request to it was redirected."""
    server = HostileServer()
    server.reply = lambda head: [b"HTTP/1.1 404 X\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"]
    yield server
    server.stop()


REQUESTS = {
    "get": lambda storage: storage.get(KEY, 0, 3).result(),
    "head": lambda storage: storage.stat(KEY),
    "list": lambda storage: list(storage.list("s3://bucket/")),
    "put": lambda storage: storage.put(KEY, b"weights"),
}


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_redirect_is_not_followed(server, other_host, monkeypatch, request_name, status):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-of-the-test")
    location = f"{other_host.address}/bucket/0.tar?key=value"
    server.reply = lambda head: [
        f"HTTP/1.1 {status} X\r\nconnection: close\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n".encode()
    ]
    with pytest.raises(RequestError, match=f"{status}, .*{other_host.address}/bucket/0.tar; .*not followed") as error:
        REQUESTS[request_name](s3.S3Storage(5.0))
    assert error.value.kind == "redirect" and not other_host.requests
    assert len(server.requests) == 1 and b"token-of-the-test" in server.requests[0]


@pytest.mark.parametrize("storage", [s3.S3Storage, ObstoreStorage])
def test_login_page_is_a_wrong_setting(server, other_host, storage):
    """obstore follows the redirect to the page, which is no range."""
    other_host.reply = lambda head: [
        b"HTTP/1.1 200 X\r\nconnection: close\r\ncontent-length: 19\r\n\r\n<html>log in</html>"
    ]
    server.reply = lambda head: [
        f"HTTP/1.1 302 X\r\nconnection: close\r\nlocation: {other_host.address}/login\r\n".encode(),
        b"content-length: 0\r\n\r\n",
    ]
    with pytest.raises(RequestError, match="302, the server redirects the request to .*/login") as error:
        storage(5.0).get(KEY, 0, 1024).result()
    assert error.value.kind == "redirect"
    assert retry.ACTION_BY_KIND[error.value.kind] is retry.RetryAction.SETTINGS, "exit code 78, at once"


@pytest.mark.parametrize("storage", [s3.S3Storage, ObstoreStorage])
def test_range_that_a_proxy_compresses_is_named(server, storage):
    body = gzip.compress(bytes(1024))
    server.reply = lambda head: [
        b'HTTP/1.1 206 X\r\nconnection: close\r\netag: "a"\r\ncontent-encoding: gzip\r\n',
        b"content-range: bytes 0-1023/4096\r\ncontent-length: %d\r\n\r\n" % len(body),
        body,
    ]
    with pytest.raises(RequestError, match="of 1024, compressed on their way .content-encoding: gzip.") as error:
        storage(5.0).get(KEY, 0, 1024).result()
    assert error.value.kind == "range" and "proxy" in error.value.remedy


@pytest.mark.parametrize("start", [0, 1024])
@pytest.mark.parametrize("storage", [s3.S3Storage, ObstoreStorage])
def test_empty_reply_is_no_ignored_range(server, storage, start):
    server.reply = lambda head: [b'HTTP/1.1 200 X\r\nconnection: close\r\netag: "a"\r\ncontent-length: 0\r\n\r\n']
    with pytest.raises(RequestError, match="an empty reply without a range came for bytes") as error:
        storage(5.0).get(KEY, start, start + 1024).result()
    assert error.value.kind == "short"


@pytest.mark.parametrize("status", [301, 307])
@pytest.mark.parametrize("has_location", [False, True])
def test_redirect_to_a_region_repeats_the_request_at_the_endpoint(server, other_host, status, has_location):
    """AWS names the region of the bucket. botocore signs the request again, for that region."""

    def reply(head):
        if b"/eu-south-9/s3/" in head:
            start = 'HTTP/1.1 206 X\r\nconnection: close\r\netag: "a"\r\ncontent-range: bytes 0-2/3\r\n'
            return [f"{start}content-length: 3\r\n\r\nabc".encode()]
        headers = "x-amz-bucket-region: eu-south-9\r\n"
        if has_location:
            headers += f"location: {other_host.address}/bucket/0.tar\r\n"
        return [f"HTTP/1.1 {status} X\r\nconnection: close\r\n{headers}content-length: 0\r\n\r\n".encode()]

    server.reply = reply
    assert s3.S3Storage(5.0).get(KEY, 0, 3).result() == (b"abc", "a")
    assert len(server.requests) == 2 and not other_host.requests


@pytest.mark.long
@pytest.mark.parametrize(
    "reply",
    [
        lambda head: drip(b"HTTP/1.1 200 X\r\n", b"a: b\r\n"),
        lambda head: drip(b"HTTP/1.1 403 X\r\ncontent-length: 1000000\r\n\r\n"),
        lambda head: drip(chunked(206, RANGE.replace(str(ASKED - 1), "999")) + b"3e8\r\n"),
    ],
    ids=["headers", "error", "body"],
)
def test_reply_that_drips_is_a_stall(server, reply):
    server.reply = reply
    reader = client(timeout=0.5, deadline=0.1)
    with pytest.raises(StorageError):
        reader.read(KEY, 0, 1000)
    assert reader.counters.retries["stall"] == reader.counters.requests >= 1
