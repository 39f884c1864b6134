"""Profiles of hypothesis: how many examples of a property are tried.

- ``ci``: 25, the same each time; the default, and that of ``make check`` and ``make test``.
- ``all``: 100, the same each time; ``make test-all``.
- ``search``: 5,000, others each time; by hand: ``pytest tests/parsers --hypothesis-profile=search``.
"""

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.harness")

#: A fixture of a function, such as a folder, serves all examples of a test.
SHARED = [HealthCheck.function_scoped_fixture]

for name, examples in (("ci", 25), ("all", 100)):
    settings.register_profile(
        name, max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=SHARED
    )
settings.register_profile("search", max_examples=5000, deadline=None, suppress_health_check=SHARED)
settings.load_profile("ci")
