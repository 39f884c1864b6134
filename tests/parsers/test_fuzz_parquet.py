"""Tests seeds of ``fuzz_parquet`` that failed once: errors of pyarrow without a number of the system."""

import pytest

from tests.parsers.fuzz_parquet import mutated
from tests.parsers.test_parquet_images import check

SEEDS = {18: (5, 11, 22, 45, 49, 56, 63, 77, 108, 133, 161, 186, 216, 243)}
"""Number of forms when they were found -> seeds."""


@pytest.mark.parametrize(("forms", "seed"), [(forms, seed) for forms, seeds in SEEDS.items() for seed in seeds])
def test_mutated_file_is_refused_or_read_as_pyarrow_reads_it(tmp_path, forms, seed):
    check(tmp_path / "a.parquet", mutated(seed, forms))
