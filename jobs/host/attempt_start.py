"""The start of an attempt of a job on its first node: whether one may start, its record, its logs.

Standard library, Python >= 3.6.
"""

import os
from typing import Any, Dict, Optional

from flip.files.creation import RefusedPath
from flip.runs import attempts
from flip.runs.errors import CAUSES
from flip.runs.restart_policy import EndFacts
from flip.runs.rundir import RunDir, read_record
from jobs.host import own_job, requeue
from jobs.host.job_nodes import JobNodes


def reason_to_be_idle(run: RunDir, token: Optional[str], record: Dict[str, Any]) -> str:
    """Why no attempt starts; empty if one may. ``token``: of the submission; ``record``: job.json."""
    if token is not None and record.get("token") != token:
        return "it was submitted again since, as another job"
    if requeue.superseded(run, os.environ):
        return "another job has continued it"
    if run.is_complete():
        return "it is complete"
    if read_record(run.cancel) is not None:  # opened, not stat: NFS caches for a while that a file is absent
        return attempts.cancel_reason(run)
    return ""


def start_record(nodes: JobNodes, count: int) -> Dict[str, str]:
    """Where an attempt on ``count`` of the nodes runs, for its start.json."""
    names = {"restarts": "SLURM_RESTART_COUNT", "nodes": "SLURM_JOB_NODELIST"}
    values = {key: os.environ[name] for key, name in names.items() if name in os.environ}
    return dict(values, world=str(count * nodes.ranks_per_node), job=own_job.own_job(os.environ))


def open_logs(run: RunDir, n: int) -> None:
    """Prepare the logs of the attempt n that was won. It stays the same one if this is tried again."""
    try:
        run.open_logs(n)
    except RefusedPath as error:
        end = EndFacts(CAUSES["permission"], None)
        attempts.end_attempt(run, n, end, met={"permission": str(error)})
        raise
