"""Was a run directory copied from another one, or was it renamed or moved?

Some records name the folder of the run that wrote them (``folder``): job.json, checkpoints/url.json, and owner.json
of the remote folder. If such a record names another folder than the one where it lies, the answer decides whose
processes, jobs and remote files the records name. Standard library, Python >= 3.6.
"""

import os
from typing import Any, Mapping

from flip.runs.ownership import PathLike
from flip.runs.rundir import RunDir


def is_copy(run: RunDir, record: Mapping[str, Any]) -> bool:
    """Whether a record of ``run`` came with a copy of another run directory: what it names belongs to that one.

    A run was renamed or moved only if the parent of the recorded folder can be listed and lacks its name. An original
    that cannot be reached counts as existing. A record without ``folder`` says nothing: not a copy.
    """
    folder = record.get("folder", "")
    return bool(folder) and not _is_same(folder, run.path) and not is_gone(folder)


def is_gone(folder: PathLike) -> bool:
    """Whether a folder certainly does not exist: its parent can be listed and lacks its name."""
    path = os.path.normpath(str(folder))
    if not os.path.isabs(path):
        return False
    try:
        return os.path.basename(path) not in os.listdir(os.path.dirname(path))
    except OSError:
        return False


def original_folder(run: RunDir, job: Mapping[str, Any]) -> str:
    """The folder from which a run directory was copied, by its job.json; "" if it is no copy.

    A submission writes it into the new job.json (``copy_of``), because that names the copy itself as ``folder``.
    """
    if is_copy(run, job):
        return str(job["folder"])
    if "folder" not in job:
        return _original_by_snapshot(run, job)
    return str(job.get("copy_of", ""))


def _original_by_snapshot(run: RunDir, job: Mapping[str, Any]) -> str:
    """``original_folder`` by a job.json of an older version, which names SWEEP/.code/DIGEST, but no ``folder``."""
    code = os.path.normpath(str(job.get("snapshot", "")))
    if not os.path.isabs(code) or os.path.basename(os.path.dirname(code)) != ".code":
        return ""
    folder = os.path.join(os.path.dirname(os.path.dirname(code)), run.name)
    if _is_same(os.path.dirname(folder), run.path.parent) or is_gone(folder):
        return ""
    return folder


def _is_same(folder: PathLike, path: PathLike) -> bool:
    if os.path.normpath(str(folder)) == os.path.normpath(str(path)):
        return True
    try:
        return os.path.samefile(str(folder), str(path))
    except OSError:
        return False
