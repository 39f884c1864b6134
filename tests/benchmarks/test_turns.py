"""Pipelines take turns: while one works, the others stand still with all their threads."""

import threading
import time

import pytest

from benchmarks import served, turns

pytestmark = pytest.mark.long

NAP, TURNS = 0.2, 10


def busy(name):
    """Batches of one sample that each take a while, beside a thread that counts on."""
    if name == "fails":
        yield 1
        raise ValueError("its second turn")
    count, over = [0], threading.Event()

    def beside():
        while not over.wait(0.01):
            count[0] += 1

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        for _ in range(TURNS):
            begin = time.monotonic()
            while time.monotonic() < begin + NAP:
                pass
            before = count[0]
            yield 1
            assert count[0] <= before + 2, "it went on while another worked"
    finally:
        over.set()
        thread.join()


@pytest.fixture
def processes():
    with served.alone() as one, served.alone() as two:
        yield {"one": one, "two": two}


def test_each_has_its_own_clock(processes):
    begin = time.monotonic()
    found = turns.passes(processes, busy, TURNS)
    took = time.monotonic() - begin
    assert list(found) == ["one", "two"]
    seconds = [(TURNS - turns.BEFORE) / each.rate for each in found.values()]
    assert sum(seconds) < took and min(seconds) >= (TURNS - turns.BEFORE) * NAP, "no time belongs to both"
    assert all(0 < each.cpu <= 1.05e6 / each.rate for each in found.values())


def test_one_that_fails_leaves_none_behind(processes):
    with pytest.raises(ValueError, match="its second turn"):
        turns.passes({"one": processes["one"], "fails": processes["two"]}, busy, TURNS)
