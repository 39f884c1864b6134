"""Tests that a seed determines the faults of a storm."""

import pytest

from tests.storm.deal import GAP, RUNS, TAIL, deal
from tests.storm.faults import COMMON, EVERY


@pytest.mark.parametrize("count", [1, 12, len(COMMON), 100])
def test_deal_is_deterministic_and_gives_runs_suitable_faults(count):
    dealt = deal(7, count)
    assert dealt == deal(7, count) != deal(8, count)
    strikes = [strike for run in dealt.strikes.values() for strike in run]
    kinds = {strike.kind for strike in strikes}
    assert len(strikes) == count and len(kinds) == (count if count <= len(COMMON) else len(EVERY))
    assert all(EVERY[strike.kind].fits(RUNS[strike.run]) for strike in strikes)
    for run, run_strikes in dealt.strikes.items():
        steps = [strike.step for strike in run_strikes]
        assert steps == sorted(steps) and all(step < sum(dealt.steps[run]) - TAIL + GAP for step in steps)
        assert len(run_strikes) <= 2 * count / len(RUNS) + 1
