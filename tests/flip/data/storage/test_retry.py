"""Tests retries after each kind of failure on a simulated clock, and how reads resume."""

import errno
import os

import pytest

from flip.data.chunk_reader import ChunkReader
from flip.data.storage.base import ObjectStat, RangeResponse, RequestError, completed_future, run_once
from flip.data.storage.retry import (
    ACTION_BY_KIND,
    FIRST_ACCESS,
    Clock,
    ConcurrencyLimiter,
    ErrorWording,
    RetryAction,
    RetryPolicy,
    RetryState,
)
from flip.runs.errors import DataError, PermissionDenied, StorageError


class Time:
    """A clock that only sleeping advances; every random pause has its upper bound."""

    def __init__(self):
        self.t = 0.0
        self.pauses = []
        self.clock = Clock(lambda: self.t, self.sleep, lambda low, high: high)

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.t += seconds


def attempts(time, granted=True, **patience):
    return RetryState(RetryPolicy(**patience), lambda: granted, time.clock)


def test_retry_pauses_double_to_bound_until_deadline():
    time = Time()
    state = attempts(time)
    with pytest.raises(StorageError, match="reading failed for 600 s, at last with: 503 SlowDown") as error:
        while True:
            state.failed("s3://b/k", RequestError("slowdown", "503 SlowDown"))
    assert error.value.code == 69 and 570 < time.t <= 600
    assert time.pauses[:4] == [0.1, 0.2, 0.4, 0.8] and set(time.pauses[9:]) == {30.0}


def test_retry_pauses_have_full_jitter():
    drawn = []
    clock = Clock(lambda: 0.0, lambda seconds: None, lambda low, high: drawn.append((low, high)) or low)
    RetryState(RetryPolicy(), lambda: True, clock).failed("k", RequestError("server", "500"))
    assert drawn == [(0, 0.1)]


def test_request_is_repeated_until_success_with_new_connections_where_needed():
    time = Time()
    kinds = ["server", "expired", "checksum", "stall"]
    events = []

    def request():
        events.append("request")
        if kinds:
            raise RequestError(kinds.pop(0), "failed")
        return "data"

    assert attempts(time).until_success("s3://b/k", request, lambda: events.append("reconnect")) == "data"
    again = ["request", "reconnect"]
    assert events == ["request", *again, *again, "request", "request"] and time.pauses == [0.1, 0.2, 0.4, 0.8]


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind, action in ACTION_BY_KIND.items()
        if action in (RetryAction.AGAIN, RetryAction.SLOWER, RetryAction.RECONNECT)
    ],
)
def test_retry_repeats_request_after_transient_error(kind):
    time = Time()
    assert attempts(time).failed("k", RequestError(kind, "")) is ACTION_BY_KIND[kind] and time.pauses


@pytest.mark.parametrize("kind, text", [("missing", "the shard is missing"), ("changed", "not the one")])
def test_retry_raises_permanent_error_without_pause(kind, text):
    time = Time()
    with pytest.raises(DataError, match=text):
        attempts(time).failed("k", RequestError(kind, ""))
    assert not time.pauses


@pytest.mark.parametrize("kind", ["changed", "refused"])
def test_permanent_error_while_reading_names_object_and_remedy_of_its_wording(kind):
    """A refused read of a checkpoint must not advise to index shards."""
    wording = ErrorWording(thing="a file of the checkpoint", remedy="Check checkpoint.url.")
    state = RetryState(RetryPolicy(), lambda: True, Time().clock, wording)
    with pytest.raises(DataError, match="reading a file of the checkpoint was refused: 416.*Check checkpoint.url"):
        while True:
            state.failed("s3://b/k", RequestError(kind, "416"))


def test_denied_request_is_retried_longer_after_earlier_success():
    """The service that gives credentials may fail once, so that the first denial is not final."""
    time = Time()
    first = attempts(time, granted=False)
    later = attempts(Time(), deadline=60)
    assert first.failed("k", RequestError("denied", "403")) is RetryAction.RECONNECT
    with pytest.raises(PermissionDenied):
        while True:
            first.failed("k", RequestError("denied", "403"))
    assert FIRST_ACCESS <= sum(time.pauses) < 60
    with pytest.raises(StorageError):
        while True:
            assert later.failed("k", RequestError("denied", "403")) is RetryAction.RECONNECT


@pytest.mark.parametrize("granted, error", [(True, StorageError), (False, PermissionDenied)])
def test_denied_request_fails_without_pause_if_deadline_is_shorter(granted, error):
    time = Time()
    with pytest.raises(error):
        attempts(time, granted, deadline=0.05).failed("k", RequestError("denied", "403"))
    assert not time.pauses


@pytest.mark.parametrize("granted, error", [(True, DataError), (False, PermissionDenied)])
def test_refused_request_fails_after_three_retries(granted, error):
    time = Time()
    state = attempts(time, granted)
    with pytest.raises(error):
        while True:
            state.failed("k", RequestError("refused", "400"))
    assert len(time.pauses) == 3


def test_concurrency_limiter_halves_and_grows_once_per_window():
    gate = ConcurrencyLimiter(8)
    tickets = [gate.enter() for _ in range(8)]
    for ticket in tickets:
        gate.leave(ticket, "slowdown")
    assert gate.cap == 4
    for expected in (4, 4, 4, 5, 5, 5, 5, 5, 6):
        gate.leave(gate.enter())
        assert gate.cap == expected
    for _ in range(9):
        gate.leave(gate.enter(), "slowdown")
    assert gate.cap == 1
    gate.leave(gate.enter(), "server")
    for _ in range(100):
        gate.leave(gate.enter())
    assert gate.cap == 8


class Script:
    """A storage that returns or raises the given answers in order."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []
        self.renewed = 0

    def get(self, key, start, stop):
        self.requests.append((start, stop))
        return completed_future(self.answer)

    def answer(self):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stat(self, key):
        return ObjectStat(1, "")

    def list(self, prefix, each=run_once):
        while self.answers:
            yield each(self.answer)

    def reconnect(self):
        self.renewed += 1


def read(script, etag=""):
    reader = ChunkReader(remote=script, clock=Time().clock)
    return reader.read("s3://b/k", 10, 20, etag), reader.counters


def test_read_resumes_after_last_received_byte():
    script = Script(
        RequestError("connection", "", b"abc", "E"),
        RequestError("stall", ""),
        RequestError("stall", "", b"d", "E"),
        RangeResponse(b"efghij", "E"),
    )
    data, counters = read(script)
    assert data == b"abcdefghij" and script.requests == [(10, 20), (13, 20), (13, 20), (14, 20)]
    assert (counters.resumed, counters.bytes, counters.requests) == (4, 10, 4)


@pytest.mark.parametrize("etag", ["F", ""])
def test_read_restarts_if_etag_changes_or_disappears(etag):
    rest = RangeResponse(b"defghij", etag)
    script = Script(RequestError("connection", "", b"abc", "E"), rest, RangeResponse(b"ABCDEFGHIJ", etag))
    assert read(script)[0] == b"ABCDEFGHIJ" and script.requests[2] == (10, 20)


def test_read_restarts_if_object_has_no_etag():
    script = Script(RequestError("connection", "", b"abc", ""), RangeResponse(b"ABCDEFGHIJ", ""))
    assert read(script)[0] == b"ABCDEFGHIJ" and script.requests == [(10, 20), (10, 20)]


@pytest.mark.parametrize("answer", [RangeResponse(b"0123456789", "F"), RequestError("connection", "", b"0", "F")])
def test_read_rejects_etag_other_than_indexed(answer):
    with pytest.raises(DataError, match="its ETag is F, indexed was E"):
        read(Script(answer), "E")


def test_expired_credentials_cause_single_reconnect():
    script = Script(RequestError("expired", ""), RangeResponse(b"0123456789", ""))
    assert read(script)[0] == b"0123456789" and script.renewed == 1


def test_listing_gives_each_page_its_own_deadline():
    """Listing a bucket of 100,000 objects takes minutes, and any page may fail."""
    time = Time()
    patience = RetryPolicy(deadline=60.0)
    pages = [(f"s3://b/{number}", ObjectStat(1, "")) for number in range(300)]

    class Slow(Script):
        def answer(self):
            time.t += 0.5
            return super().answer()

    faults = {page: [RequestError("slowdown", "503")] for page in pages[99::100]}
    script = Slow(*(answer for page in pages for answer in [*faults.get(page, []), page]))
    assert ChunkReader(remote=script, clock=time.clock, retry_policy=patience).list("s3://b/") == dict(sorted(pages))
    assert not script.answers and len(time.pauses) == 3


@pytest.mark.parametrize(
    "call, code, served, error",
    [
        ("open", errno.EIO, False, StorageError),
        ("open", errno.ESTALE, True, StorageError),
        ("pread", errno.EIO, True, StorageError),
        ("open", errno.EACCES, False, PermissionDenied),
        ("open", errno.EACCES, True, StorageError),  # a ticket of Kerberos has run out
        ("open", errno.ENOENT, True, DataError),
    ],
)
def test_failed_read_of_local_file_is_retried_unless_file_is_missing(tmp_path, monkeypatch, call, code, served, error):
    path = tmp_path / "0.tar"
    time = Time()
    path.write_bytes(bytes(1024))
    reader = ChunkReader(clock=time.clock)
    if served:
        reader.read(str(path), 0, 512)

    def fail(*_, **__):
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patch, pytest.raises(error, match=r"0\.tar"):
        patch.setattr(os, call, fail)
        reader.read(str(path), 0, 512)
    assert bool(time.pauses) is (error is not DataError)
    assert len(reader.read(str(path), 0, 512)) == 512


@pytest.mark.parametrize("absent_is_outage, error", [(True, StorageError), (False, DataError)])
def test_file_system_that_is_not_mounted_is_an_outage_of_training(tmp_path, absent_is_outage, error):
    """Its folder is missing, too. The run starts again on another node or later; a command names what is missing."""
    reader = ChunkReader(retry_policy=RetryPolicy(absent_is_outage=absent_is_outage), clock=Time().clock)
    with pytest.raises(error, match=r"0\.tar"):
        reader.read(str(tmp_path / "mount" / "0.tar"), 0, 512)
