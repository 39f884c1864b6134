"""The version of this release, which pyproject.toml reads. The host's Python >= 3.6 may read this file, too."""

__version__ = "0.2.0"
