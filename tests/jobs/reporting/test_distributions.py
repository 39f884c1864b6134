"""Tests of Student's t and F against published quantiles."""

import pytest

from jobs.reporting.distributions import f_tail, incomplete_beta, t_quantile, t_tail

T_975 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 5: 2.5706, 8: 2.3060, 10: 2.2281, 30: 2.0423, 120: 1.9799}
"""97.5 % quantiles, by degrees of freedom."""
F_95 = {(1, 3): 10.128, (2, 6): 5.1433, (3, 7): 4.3468, (10, 10): 2.9782, (1, 120): 3.9201}


def test_t_quantiles_are_those_of_tables() -> None:
    for freedom, value in T_975.items():
        assert t_quantile(freedom) == pytest.approx(value, abs=1e-4)
        assert t_tail(value, freedom) == pytest.approx(0.05, abs=1e-5)
    assert t_quantile(10, 0.99) == pytest.approx(3.1693, abs=1e-4)
    assert t_quantile(18, 1 - 0.05 / 9) == pytest.approx(3.14858, abs=1e-5), "Bonferroni, nine comparisons"


def test_f_tails_are_those_of_tables() -> None:
    for freedoms, value in F_95.items():
        assert f_tail(value, *freedoms) == pytest.approx(0.05, abs=1e-5)
    assert f_tail(0.0, 1, 3) == 1.0 and f_tail(1e9, 1, 3) < 1e-12


def test_incomplete_beta_has_known_values() -> None:
    assert incomplete_beta(1, 1, 0.3) == pytest.approx(0.3)
    assert incomplete_beta(2, 3, 0.4) + incomplete_beta(3, 2, 0.6) == pytest.approx(1)
    assert (incomplete_beta(2, 2, 0), incomplete_beta(2, 2, 1)) == (0, 1)
