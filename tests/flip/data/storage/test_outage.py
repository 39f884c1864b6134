"""Tests reports of storage outages on a simulated clock: while an outage lasts, and when it is over."""

import logging

import pytest

from flip.data.chunk_reader import ChunkReader
from flip.data.storage.base import RangeResponse, RequestError, completed_future
from flip.data.storage.retry import AFTER, Outage, OutageBoard, OutageDetector, RetryPolicy, RetryState
from flip.runs.errors import StorageError
from tests.flip.data.storage.test_retry import Time

FAULT = RequestError("slowdown", "503 SlowDown")


@pytest.fixture
def watched():
    """(clock, reports as (time, outage), detector, attempts of a failing read)."""
    time = Time()
    reports = []
    outages = OutageDetector(lambda outage: reports.append((time.t, outage)), time.clock)
    return time, reports, outages, RetryState(RetryPolicy(), lambda: True, time.clock, outages=outages)


def test_outage_is_reported_on_time_during_long_pauses(watched):
    time, reports, outages, attempts = watched
    while time.t < 60:
        attempts.failed("k", FAULT)
    assert [moment for moment, _ in reports][:2] == [AFTER, 2 * AFTER] and len(reports) >= 4
    assert reports[0][1].seconds == AFTER and not reports[0][1].over
    assert str(reports[0][1]).endswith(f", {reports[0][1].retries} retries, the last: 503 SlowDown")
    time.t = 70.0
    outages.succeeded()
    assert str(reports[-1][1]) == f"storage answers again, after 70 s and {reports[-1][1].retries} retries"
    count = len(reports)
    outages.succeeded()
    assert len(reports) == count


def test_outage_counts_from_start_of_stalled_request(watched):
    time, reports, _, attempts = watched
    time.t = 15.0
    attempts.failed("k", RequestError("stall", "nothing came"))
    assert [(moment, outage.seconds, outage.retries) for moment, outage in reports] == [(15.0, 15.0, 1)]


def test_outage_detector_ignores_failures_between_successes(watched):
    time, reports, outages, attempts = watched
    for _ in range(100):
        attempts.failed("k", FAULT)
        attempts._wait = 3.0
        outages.succeeded()
    assert time.t > 100 and not reports


def test_chunk_reader_reports_outage_and_its_end():
    class Down:
        def get(self, key, start, stop):
            return completed_future(self._get)

        def _get(self):
            if time.t < 30:
                raise FAULT
            return RangeResponse(b"0123456789", "E")

    time = Time()
    reports = []
    reader = ChunkReader(clock=time.clock, remote=Down(), report=reports.append)
    assert reader.read("s3://b/k", 0, 10) == b"0123456789"
    assert [outage.over for outage in reports][-1]
    assert not any(outage.over for outage in reports[:-1])
    assert len(reports) >= 3


def test_outage_logs_single_warning_at_start_and_end(caplog):
    time = Time()
    outages = OutageDetector(clock=time.clock)
    attempts = RetryState(RetryPolicy(deadline=100), lambda: True, time.clock, outages=outages)
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError):
        while True:
            attempts.failed("k", FAULT)
    outages.succeeded()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and lines[0].startswith("storage does not answer since ") and "again, after" in lines[1]


def test_outage_board_merges_outages_of_several_processes(caplog):
    board = OutageBoard()
    shown = []
    board.show = shown.append
    with caplog.at_level(logging.WARNING):
        board.add(Outage(1000.0, 10.0, 5, "503"), 0)
        board.add(Outage(990.0, 11.0, 7, "500"), 1)
        board.add(Outage(1000.0, 20.0, 6, "", over=True), 0)
        board.add(Outage(990.0, 21.0, 8, "", over=True), 1)
    assert [record.getMessage()[:14] for record in caplog.records] == ["storage does n", "storage answer"]
    assert "12 retries, the last: 500" in shown[1] and "7 retries" in shown[2] and shown[3] is None
    board.add(Outage(1000.0, 10.0, 5, "503"), 0)
    board.clear()
    assert shown[-1] is None
