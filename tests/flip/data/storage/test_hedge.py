"""Tests the second request that is sent if the first is late: its result, counters and limits."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from flip.data.chunk_reader import ChunkReader
from flip.data.storage import retry
from flip.data.storage.base import RangeResponse, RequestError, completed_future
from flip.data.storage.retry import LONG, SHARE, HedgePolicy, RetryPolicy
from tests.flip.data.storage.test_retry import Time

GOOD = RangeResponse(b"0123456789", "E")


class Slow:
    """A storage whose requests the test answers: each request calls ``then`` with all futures so far."""

    def __init__(self, then):
        self.then = then
        self.sent = []

    def get(self, key, start, stop):
        self.sent.append(Future())
        self.then(self.sent)
        return self.sent[-1]

    def reconnect(self):
        pass


def reading(then, late=None, hedge=0.01):
    """A reader of a ``Slow`` storage. ``late``: called instead of waiting for a response; the request is late then."""
    time = Time()
    reader = ChunkReader(retry_policy=RetryPolicy(hedge=hedge), clock=time.clock, remote=Slow(then))
    reader.pauses = time.pauses
    reader._ever_succeeded = True
    if late:
        reader._hedge.is_late = lambda answer, long=False: not answer.done() and (late(answer), True)[1]
    return reader


def read(reader):
    data = reader.read("s3://b/k", 10, 20)
    assert reader._gate._busy == 0, "the limiter counts no open request"
    return data


def counts(reader):
    counters = reader.counters
    return counters.requests, counters.hedged, counters.hedges_won, counters.bytes


def test_hedge_uses_second_response_if_first_request_hangs():
    reader = reading(lambda sent: sent[1].set_result(GOOD) if len(sent) == 2 else None)
    assert read(reader) == GOOD.data and counts(reader) == (2, 1, 1, 10)
    assert reader._storages["s3"].sent[0].cancelled() and not any(reader.counters.retries.values())


def test_hedge_uses_first_response_if_it_comes_before_second():
    reader = reading(lambda sent: sent[0].set_result(GOOD) if len(sent) == 2 else None)
    assert read(reader) == GOOD.data and counts(reader) == (2, 1, 0, 10) and reader._storages["s3"].sent[1].cancelled()


@pytest.mark.parametrize("failing", [0, 1])
def test_hedge_uses_remaining_response_if_either_request_fails(failing):
    def then(sent):
        if len(sent) == 2:
            sent[failing].set_exception(RequestError("slowdown", "503", b"0123", "E"))
            sent[1 - failing].set_result(GOOD)

    reader = reading(then)
    assert read(reader) == GOOD.data and not reader.pauses
    assert counts(reader) == (2, 1, 1 - failing, 14) and reader.counters.retries["slowdown"] == 1
    assert reader.counters.cap == 8


def test_hedge_counts_two_failed_requests_as_single_attempt():
    def then(sent):
        if len(sent) == 2:
            sent[1].set_exception(RequestError("server", "500"))
            sent[0].set_exception(RequestError("stall", "", b"0123", "E"))
        if len(sent) == 3:
            sent[2].set_result(RangeResponse(b"456789", "E"))

    reader = reading(then)
    assert read(reader) == GOOD.data and len(reader.pauses) == 1
    counters = reader.counters
    assert (counters.retries["server"], counters.retries["stall"], counters.resumed) == (1, 1, 4)


def answer(late):
    late.set_result(GOOD)


def test_hedge_sends_no_second_request_after_slowdown():
    reader = reading(lambda sent: None, answer)
    reader._gate.leave(reader._gate.enter(), "slowdown")
    assert read(reader) == GOOD.data and counts(reader) == (1, 0, 0, 10)


@pytest.mark.parametrize("used_up", [False, True])
def test_hedge_covers_first_request_of_process_after_long_delay(used_up):
    """This holds even if the share of second requests is used up. The long delay covers the creation of the client."""
    waits = []
    reader = reading(lambda sent: sent[1].set_result(GOOD) if len(sent) == 2 else None)
    reader._hedge.is_late = lambda answer, long=False: waits.append(long) or True
    reader._ever_succeeded = False
    reader._counters.hedged = 3 * used_up
    reader._counters.requests = 0
    assert read(reader) == GOOD.data and reader._ever_succeeded and reader.counters.hedges_won == 1
    assert waits == [True] * (1 + used_up)


def test_hedge_exceeds_share_after_long_delay():
    waits = []
    reader = reading(lambda sent: sent[1].set_result(GOOD) if len(sent) == 2 else None)
    reader._hedge.is_late = lambda answer, long=False: waits.append(long) or True
    reader._counters.hedged = 1
    reader._counters.requests = 3
    assert read(reader) == GOOD.data and waits == [False, True] and reader.counters.hedges_won == 1


def test_hedge_sends_no_second_request_if_concurrency_is_exhausted():
    reader = reading(lambda sent: None, answer)
    for _ in range(reader.retry_policy.requests - 1):
        reader._gate.enter()
    assert reader.read("s3://b/k", 10, 20) == GOOD.data and counts(reader) == (1, 0, 0, 10)


def test_hedge_share_bounds_second_requests_if_all_are_late():
    reader = reading(lambda sent: None, answer)
    for n in range(1, 200):
        read(reader)
        requests, hedged, *_ = counts(reader)
        assert hedged <= 1 + SHARE * requests and requests == n + hedged
    assert hedged == 11


def test_hedge_policy_reports_no_lateness_if_disabled_or_answered():
    assert HedgePolicy(0.0).is_late(Future()) is False
    assert HedgePolicy(1.0).is_late(completed_future(lambda: 1)) is False


def test_hedge_policy_long_delay_multiplies_usual_delay(monkeypatch):
    waited = []
    monkeypatch.setattr(retry, "wait", lambda answers, seconds: waited.append(seconds) or SimpleNamespace(done=()))
    assert HedgePolicy(2.0).is_late(Future())
    assert HedgePolicy(2.0).is_late(Future(), long=True)
    assert waited == [2.0, 2.0 * LONG]


def test_hedge_policy_delay_follows_quantile_of_recent_durations():
    policy = HedgePolicy(1.0)
    assert policy.delay == 1.0
    for _ in range(100):
        policy.record(0.2)
    assert policy.delay == 1.0
    for _ in range(20):
        policy.record(7.0)
    assert policy.delay == 7.0, "more than a twentieth of the requests took 7 s"
    for _ in range(200):
        policy.record(0.2)
    assert policy.delay == 1.0, "old durations no longer count"
