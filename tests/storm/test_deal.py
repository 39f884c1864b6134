"""Tests that a seed determines the faults of a storm."""

from pathlib import Path

import pytest

from tests.storm.deal import GAP, RUNS, TAIL, deal, first_kinds, kinds_of
from tests.storm.faults import AGENTS, COMMON, EVERY, FOREIGN, HOME


def test_readme_names_number_of_kinds_of_each_site():
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    home, foreign, agents = (len(kinds_of(site)) for site in (HOME, FOREIGN, AGENTS))
    assert f"There are {home} kinds ({foreign} on the foreign site, {agents} on the site of agents)" in text


@pytest.mark.parametrize("count", [1, 12, len(COMMON), 100])
@pytest.mark.parametrize("site", [HOME, FOREIGN, AGENTS])
def test_deal_is_deterministic_and_gives_runs_suitable_faults(count, site):
    dealt = deal(7, count, site)
    assert dealt == deal(7, count, site) != deal(8, count, site)
    strikes = [strike for run in dealt.strikes.values() for strike in run]
    kinds = {strike.kind for strike in strikes}
    first = sum(map(len, first_kinds(site)))
    every = len(kinds_of(site))
    assert len(strikes) == count and len(kinds) == (count if count <= first else every)
    assert all(EVERY[strike.kind].fits(RUNS[strike.run]) and site in EVERY[strike.kind].sites for strike in strikes)
    for run, run_strikes in dealt.strikes.items():
        steps = [strike.step for strike in run_strikes]
        assert steps == sorted(steps) and all(step < sum(dealt.steps[run]) - TAIL + GAP for step in steps)
        assert len(run_strikes) <= 2 * count / len(RUNS) + 1
