"""Tests of TimeBreakdown, which splits the training time into parts, and of BottleneckDetector's verdict."""

import pytest

from flip.monitoring import collector
from flip.monitoring.collector import LINES, PARTS, BottleneckDetector, TimeBreakdown


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    instance = Clock()
    monkeypatch.setattr(collector, "time", instance)
    return instance


def test_time_breakdown_counts_each_second_once(clock):
    window = TimeBreakdown()
    for _ in range(4):
        window.add(samples=16, waited=0.5, seconds=2.0)
    window.add_paused("checkpoint", 3.0)
    window.add_paused("evaluation", 4.0)
    clock.now += 20.0
    shares = window.shares(communication=0.25)
    seconds = {part: 20 * share for part, share in shares.items()}
    assert list(shares) == list(PARTS) and sum(shares.values()) == pytest.approx(1)
    assert seconds == pytest.approx({
        "data_wait": 2.0, "compute": 4.5, "communication": 1.5, "checkpoint": 3.0, "evaluation": 4.0, "other": 5.0,
    })  # fmt: skip


def test_time_breakdown_has_no_communication_share_if_not_measured(clock):
    window = TimeBreakdown()
    window.add(samples=16, waited=0.0, seconds=2.0)
    clock.now += 2.0
    shares = window.shares(communication=None)
    assert shares["communication"] is None and shares["compute"] == pytest.approx(1)
    assert BottleneckDetector(1).update(shares)[0].startswith("compute-bound")


def breakdown(**shares):
    complete = dict.fromkeys(PARTS, 0.0) | shares
    return complete | {"compute": 1 - sum(shares.values())}


def test_bottleneck_verdict_names_largest_part_and_remedy():
    assert BottleneckDetector(2).update(breakdown(data_wait=0.41, checkpoint=0.2)) == (
        "input-bound: data-wait is 41 % of the time; more data.workers (now 2), smaller stored images, or data.cache",
        True,
    )
    message, _ = BottleneckDetector(2).update(breakdown(communication=0.3))
    assert message.startswith("communication-bound: communication is 30 % of the")
    assert "checkpoint.minutes" in BottleneckDetector(2).update(breakdown(checkpoint=0.2, other=0.1))[0]
    assert BottleneckDetector(2).update(breakdown(data_wait=0.09)) == (
        "compute-bound: 91 % of the time is arithmetic",
        True,
    )
    for part in PARTS[2:]:
        assert BottleneckDetector(2).update(breakdown(**{part: 0.5}))[0].count(";") == 1


def test_bottleneck_verdict_changes_only_after_lasting_slowdown():
    detector = BottleneckDetector(2)
    results = [detector.update(breakdown(data_wait=0.02)) for _ in range(LINES)]
    results += [detector.update(breakdown(data_wait=0.8)), detector.update(breakdown(data_wait=0.02))]
    assert [changed for _, changed in results] == [True] + [False] * (LINES + 1) and detector.bound == "compute"
    changes = [detector.update(breakdown(data_wait=0.8))[1] for _ in range(LINES)]
    assert changes.count(True) == 1 and detector.bound == "data_wait"
