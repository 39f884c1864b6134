"""Was a run directory copied from another one, or was it renamed or moved?

Some records name the folder of the run that wrote them (``folder``): job.json, checkpoints/url.json, and owner.json
of the remote folder. If job.json names another folder than the one where it lies, the answer decides whose processes
and jobs it names. Remote files do not depend on it: the original of a copy may have been renamed, so a folder that is
gone does not show that this one was moved (``flip.runs.remote_owner``). Standard library, Python >= 3.6.
"""

import os
from typing import Any, Mapping

from flip.files.ownership import PathLike
from flip.runs.rundir import RunDir


def is_copy(run: RunDir, record: Mapping[str, Any]) -> bool:
    """Whether a record of ``run`` came with a copy of another run directory: what it names belongs to that one.

    A run was renamed or moved only if the parent of the recorded folder can be listed and lacks its name. An original
    that cannot be reached counts as existing. A record without ``folder`` shows no copy; who acts on a job.json refuses
    it (``RunDir.read_job``).
    """
    folder = _other_folder(run, record)
    return bool(folder) and not is_gone(folder)


def original_folder(run: RunDir, job: Mapping[str, Any]) -> str:
    """The folder from which a run directory was copied, renamed or moved, by its job.json; "" if there is none.

    A submission writes it into the new job.json (``copy_of``), because that names the new directory as ``folder``.
    """
    return _other_folder(run, job) or str(job.get("copy_of", ""))


def is_gone(folder: PathLike) -> bool:
    """Whether a folder certainly does not exist: its parent can be listed and lacks its name."""
    path = os.path.normpath(str(folder))
    if not os.path.isabs(path):
        return False
    try:
        return os.path.basename(path) not in os.listdir(os.path.dirname(path))
    except OSError:
        return False


def is_same_folder(folder: PathLike, path: PathLike) -> bool:
    """Whether two paths name the same folder: they are equal, or links lead from one to the other."""
    if os.path.normpath(str(folder)) == os.path.normpath(str(path)):
        return True
    try:
        return os.path.samefile(str(folder), str(path))
    except OSError:
        return False


def _other_folder(run: RunDir, record: Mapping[str, Any]) -> str:
    """The folder of the run that wrote a record, if it is another one than ``run``; else ""."""
    folder = str(record.get("folder", ""))
    if not folder or is_same_folder(folder, run.path):
        return ""
    return folder
