"""What follows a failure, by its class, on a simulated clock."""

import pytest

from flip.data.chunk_reader import ChunkReader
from flip.data.storage.base import ObjectStat, RangeResponse, RequestError, completed_future, run_once
from flip.data.storage.retry import ACTION_BY_KIND, Clock, ConcurrencyLimiter, RetryAction, RetryPolicy, RetryState
from flip.runs.errors import DataError, PermissionDenied, StorageError


class Time:
    """A clock that sleeping moves, and the longest of every pause."""

    def __init__(self):
        self.t, self.pauses = 0.0, []
        self.clock = Clock(lambda: self.t, self.sleep, lambda low, high: high)

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.t += seconds


def attempts(time, granted=True, **patience):
    return RetryState(RetryPolicy(**patience), lambda: granted, time.clock)


def test_pauses_double_to_a_bound_until_the_deadline():
    time = Time()
    one = attempts(time)
    with pytest.raises(StorageError, match="reading failed for 600 s, at last with: 503 SlowDown") as error:
        while True:
            one.failed("s3://b/k", RequestError("slowdown", "503 SlowDown"))
    assert error.value.code == 69 and 570 < time.t <= 600
    assert time.pauses[:4] == [0.1, 0.2, 0.4, 0.8] and set(time.pauses[9:]) == {30.0}


def test_pauses_are_jittered_down_to_nothing():
    drawn = []
    clock = Clock(lambda: 0.0, lambda seconds: None, lambda low, high: drawn.append((low, high)) or low)
    RetryState(RetryPolicy(), lambda: True, clock).failed("k", RequestError("server", "500"))
    assert drawn == [(0, 0.1)]


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind, do in ACTION_BY_KIND.items()
        if do in (RetryAction.AGAIN, RetryAction.SLOWER, RetryAction.RECONNECT)
    ],
)
def test_what_may_pass_is_tried_again(kind):
    time = Time()
    assert attempts(time).failed("k", RequestError(kind, "")) is ACTION_BY_KIND[kind] and time.pauses


@pytest.mark.parametrize("kind, text", [("missing", "the shard is missing"), ("changed", "not the one")])
def test_what_cannot_pass_is_not(kind, text):
    time = Time()
    with pytest.raises(DataError, match=text):
        attempts(time).failed("k", RequestError(kind, ""))
    assert not time.pauses


def test_denied():
    first, later = attempts(Time(), granted=False), attempts(Time(), deadline=60)
    assert first.failed("k", RequestError("denied", "403")) is RetryAction.RECONNECT
    with pytest.raises(PermissionDenied):
        first.failed("k", RequestError("denied", "403"))
    with pytest.raises(StorageError):
        while True:
            assert later.failed("k", RequestError("denied", "403")) is RetryAction.RECONNECT


@pytest.mark.parametrize("granted, error", [(True, StorageError), (False, PermissionDenied)])
def test_denied_once_and_no_time_left(granted, error):
    time = Time()
    with pytest.raises(error):
        attempts(time, granted, deadline=0.05).failed("k", RequestError("denied", "403"))
    assert not time.pauses


@pytest.mark.parametrize("granted, error", [(True, DataError), (False, PermissionDenied)])
def test_refused_a_few_times_is_refused(granted, error):
    time = Time()
    one = attempts(time, granted)
    with pytest.raises(error):
        while True:
            one.failed("k", RequestError("refused", "400"))
    assert len(time.pauses) == 3


def test_gate_halves_once_a_window_and_grows_by_one_a_window():
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
    """A storage that gives the prepared answers, in turn."""

    def __init__(self, *answers):
        self.answers, self.asked, self.renewed = list(answers), [], 0

    def get(self, key, start, stop):
        self.asked.append((start, stop))
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


def test_a_read_goes_on_from_the_byte_reached():
    script = Script(
        RequestError("connection", "", b"abc", "E"),
        RequestError("stall", ""),
        RequestError("stall", "", b"d", "E"),
        RangeResponse(b"efghij", "E"),
    )
    found, counters = read(script)
    assert found == b"abcdefghij" and script.asked == [(10, 20), (13, 20), (13, 20), (14, 20)]
    assert (counters.resumed, counters.bytes, counters.requests) == (4, 10, 4)


@pytest.mark.parametrize("etag", ["F", ""])
def test_it_does_not_go_on_with_another_object(etag):
    rest = RangeResponse(b"defghij", etag)
    script = Script(RequestError("connection", "", b"abc", "E"), rest, RangeResponse(b"ABCDEFGHIJ", etag))
    assert read(script)[0] == b"ABCDEFGHIJ" and script.asked[2] == (10, 20)


def test_bytes_of_an_object_without_an_etag_are_asked_for_again():
    script = Script(RequestError("connection", "", b"abc", ""), RangeResponse(b"ABCDEFGHIJ", ""))
    assert read(script)[0] == b"ABCDEFGHIJ" and script.asked == [(10, 20), (10, 20)]


@pytest.mark.parametrize("answer", [RangeResponse(b"0123456789", "F"), RequestError("connection", "", b"0", "F")])
def test_another_etag_than_indexed_is_another_shard(answer):
    with pytest.raises(DataError, match="its ETag is F, indexed was E"):
        read(Script(answer), "E")


def test_expired_credentials_need_a_new_client():
    script = Script(RequestError("expired", ""), RangeResponse(b"0123456789", ""))
    assert read(script)[0] == b"0123456789" and script.renewed == 1


def test_each_page_of_a_listing_has_its_own_deadline():
    """A bucket of a hundred thousand objects takes minutes to list, and may meet a fault on any page."""
    time, patience = Time(), RetryPolicy(deadline=60.0)
    pages = [(f"s3://b/{number}", ObjectStat(1, "")) for number in range(300)]

    class Slow(Script):
        def answer(self):
            time.t += 0.5
            return super().answer()

    faults = {page: [RequestError("slowdown", "503")] for page in pages[99::100]}
    script = Slow(*(answer for page in pages for answer in [*faults.get(page, []), page]))
    assert ChunkReader(remote=script, clock=time.clock, retry_policy=patience).list("s3://b/") == dict(sorted(pages))
    assert not script.answers and len(time.pauses) == 3
