"""Folders of the files in which the ranks of an attempt publish their addresses, on a local disk."""

import tempfile
from pathlib import Path

from flip.files import deletion
from flip.runs import temporary_folders
from flip.runs.rundir import RunDir


def make_store(run: RunDir, n: int) -> Path:
    """Create the folder of the ranks' store, with mode 0700, on a local disk, because its file is locked at every
    access.

    If this supervisor is killed, the next one deletes the folder, or a later attempt
    (``temporary_folders.delete_left``).
    """
    folder = Path(tempfile.mkdtemp(prefix="flip-store-"))
    try:
        temporary_folders.claim(folder, run, n)
    except OSError:
        deletion.discard_own_folder(folder)
        raise
    return folder
