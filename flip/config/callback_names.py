"""The entries of ``monitor.callbacks``, FILE.py:Class, and the rules for the classes that they name. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from flip.runs.errors import ConfigError

FOLDER = "callbacks"
"""Folder of a code snapshot that holds the copies of the files."""

EVERY = 100
"""Steps between two calls of a class without the attribute ``every``."""

ARGUMENTS = {
    "start": 1, "start_stage": 1, "before_step": 1, "step": 1, "save": 1, "evaluate": 1, "stop": 1, "end": 3,
    "combine": 1,
}  # fmt: skip
"""Public methods that a class may have -> number of their arguments, without ``self``."""

VALUE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
"""The name of a value."""

_ENTRY = re.compile(r"((?:[A-Za-z0-9_][\w-]*/)*[A-Za-z0-9_][\w-]*\.py):([A-Za-z_]\w*)", re.ASCII)


class CallbackName(NamedTuple):
    """``file``: its path relative to the folder of the sweep file; ``cls``: the name of a class in it."""

    file: str
    cls: str


def parse(entries: Sequence[str]) -> list[CallbackName]:
    """The names in ``monitor.callbacks``. Raises ConfigError if one has another form, or two classes the same name."""
    names = list[CallbackName]()
    for entry in entries:
        match = _ENTRY.fullmatch(entry)
        if match is None:
            remedy = "Name a file in the folder of the sweep file, or below it, and a class: my_metric.py:GradNoise."
            raise ConfigError("monitor.callbacks: needs FILE.py:Class", value=entry, remedy=remedy)
        name = CallbackName(*match.groups())
        if any(name.cls == other.cls for other in names):
            remedy = "The class is the prefix of its values: rename one of the two."
            raise ConfigError("monitor.callbacks: two classes have this name", value=name.cls, remedy=remedy)
        names.append(name)
    return names
