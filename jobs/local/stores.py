"""Folders of the files in which the ranks of an attempt publish their addresses, on a local disk."""

import contextlib
import tempfile
from pathlib import Path

from flip.files import deletion, ownership
from flip.runs.rundir import OWNER, RunDir, read_json, write_json

_PREFIX = "flip-store-"


def make_store(run: RunDir, n: int) -> Path:
    """Create the folder of the ranks' store, with mode 0700, on a local disk, because its file is locked at every
    access.

    If this supervisor is killed, its record lets the next one delete the folder (``delete_stores``), or a later attempt
    (``jobs.runtime.rank_process``).
    """
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        write_json(folder / OWNER, {"run": str(run.path), "attempt": n})
    except OSError:
        deletion.discard_own_folder(folder)
        raise
    return folder


def delete_stores(run: RunDir, n: int) -> None:
    """Delete the stores of attempts of a run up to n, which have ended. A folder that cannot be deleted stays."""
    for mark in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if not ownership.is_mine(mark) or not ownership.is_mine(mark.parent):
                continue
            owner = read_json(mark) or {}
            if owner["run"] == str(run.path) and owner["attempt"] <= n:
                deletion.discard_own_folder(mark.parent)
