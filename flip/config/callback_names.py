"""The entries of ``monitor.callbacks``, FILE.py:Class, and the rules for the classes that they name. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flip.common import user_classes
from flip.common.user_classes import UserClass
from flip.runs.errors import ConfigError

KEY = "monitor.callbacks"

EVERY = 100
"""Steps between two calls of a class without the attribute ``every``."""

ARGUMENTS = {
    "start": 1, "start_stage": 1, "before_step": 1, "step": 1, "save": 1, "evaluate": 1, "stop": 1, "end": 3,
    "combine": 1,
}  # fmt: skip
"""Public methods that a class may have -> number of their arguments, without ``self``."""

VALUE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
"""The name of a value."""


def parse(entries: Sequence[str]) -> list[UserClass]:
    """The names in ``monitor.callbacks``. Raises ConfigError if one has another form, or two classes the same name."""
    names = list[UserClass]()
    for entry in entries:
        name = user_classes.parse(entry, KEY)
        if any(name.cls == other.cls for other in names):
            remedy = "The class is the prefix of its values: rename one of the two."
            raise ConfigError(f"{KEY}: two classes have this name", value=name.cls, remedy=remedy)
        names.append(name)
    return names
