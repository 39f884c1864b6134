"""A program as process 1 of a PID namespace of its own, as in a container."""

import functools
import subprocess
from pathlib import Path

from tests.harness.common import wait_until

UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@functools.cache
def why_no_namespace():
    """Why this user can create no PID namespace; empty if that works."""
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True, text=True).stderr.strip()
    except OSError as error:
        return str(error)


def first_process_of(unshare):
    """Process 1 of the namespace of a started ``UNSHARE``, by its number outside."""
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
    wait_until(children.read_text, "process 1")
    return int(children.read_text().split()[0])
