"""What tests with a real Slurm share."""

import os

import pytest

from flip.exitcodes import ConfigError
from tools.onebox import daemons


def require(accounting: bool = False) -> None:
    """Skip where Slurm's packages are missing; fail there with FLIP_REQUIRE_SLURM=1, as CI has it."""
    try:
        daemons.missing(accounting)
    except ConfigError as error:
        if os.environ.get("FLIP_REQUIRE_SLURM") == "1":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
