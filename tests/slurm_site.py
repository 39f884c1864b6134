"""What tests with a real Slurm share."""

import os
import shutil
from typing import NoReturn

import pytest

from flip.runs.errors import ConfigError
from tools.sandbox import daemons


def require(accounting: bool = False) -> None:
    """Skip where Slurm's packages are missing; fail there with FLIP_REQUIRE_SLURM=1, as CI has it."""
    try:
        daemons.require_packages(accounting)
    except ConfigError as error:
        _lacking(str(error))


def require_shellcheck() -> str:
    """Its path; where there is none, as ``require``."""
    return shutil.which("shellcheck") or _lacking("shellcheck is missing: apt-get install shellcheck")


def _lacking(what: str) -> NoReturn:
    if os.environ.get("FLIP_REQUIRE_SLURM") == "1":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)
