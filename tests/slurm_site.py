"""Requirements of tests that use a real Slurm."""

import os
import shutil
from typing import NoReturn

import pytest

from flip.runs.errors import ConfigError
from tools.sandbox import daemons


def require(accounting: bool = False) -> None:
    """Skip the test if Slurm's packages are missing. Fail it if FLIP_REQUIRE_SLURM=1, which CI sets."""
    try:
        daemons.require_packages(accounting)
    except ConfigError as error:
        lacking(str(error))


def require_shellcheck() -> str:
    """Return the path of shellcheck. Skip or fail the test as ``require`` does if it is missing."""
    return shutil.which("shellcheck") or lacking("shellcheck is missing: apt-get install shellcheck")


def lacking(reason: str) -> NoReturn:
    """Skip the test, or fail it if FLIP_REQUIRE_SLURM=1."""
    if os.environ.get("FLIP_REQUIRE_SLURM") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
