"""Leaves the current folder, which may hold files of another user, before a library looks for its settings there.

matplotlib reads ``matplotlibrc`` from the current folder, wandb ``wandb/settings`` and ``config-defaults.yaml``, pdb
executes ``.pdbrc``. A command resolves the paths that its user names, then leaves the folder, and only then uses such
a library (``tests/security/test_library_settings.py``). Settings in the user's home folder still count.
Standard library, Python >= 3.6.
"""

import contextlib
import os
from typing import Iterator

#: It belongs to root, and no other user can create files in it.
NEUTRAL = os.sep


def leave() -> None:
    """Leave the current folder for good, also for the processes that are started from now on."""
    os.chdir(NEUTRAL)


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Within the context, the process is outside of its current folder. Relative paths are wrong there."""
    handle = os.open(os.curdir, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(NEUTRAL)
        try:
            yield
        finally:
            os.fchdir(handle)
    finally:
        os.close(handle)
