"""The folder of cached files."""

import os
from pathlib import Path

from flip.runs.errors import ConfigError


def cache_root() -> Path:
    """FLIP_CACHE, by default ~/.cache/flip. Raises ConfigError if the user has no home folder."""
    try:
        return Path(os.environ.get("FLIP_CACHE") or "~/.cache/flip").expanduser().absolute()
    except RuntimeError as error:
        remedy = "Name a folder for cached files: export FLIP_CACHE=FOLDER."
        raise ConfigError("this user's home folder is unknown", remedy=remedy) from error
