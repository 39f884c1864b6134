"""How properties are searched: in CI few examples, the same each time; by hand as many as you like.

pytest tests/parsers --hypothesis-profile=search    # other examples each time, fifty times as many
"""

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.harness")

#: Folders of fixtures may serve all examples of a test.
SHARED = [HealthCheck.function_scoped_fixture]

settings.register_profile(
    "ci", max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=SHARED
)
settings.register_profile("search", max_examples=5000, deadline=None, suppress_health_check=SHARED)
settings.load_profile("ci")
