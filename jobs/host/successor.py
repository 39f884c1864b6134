"""A new job in place of one that Slurm does not requeue: the same batch script, submitted again from the exit trap.

Slurm refuses ``scontrol requeue`` for a job with Requeue=0: JobRequeue=0 and no --requeue, --no-requeue, or a
job_submit plugin of the site that sets it. The successor has the same name, token and array index. It starts when its
predecessor has ended, and only if no attempt has begun in between. Standard library, Python >= 3.6.
"""

import os
import re
import time
from typing import Dict, Iterable, Mapping, Optional

from jobs.host import slurm_cli

#: In the environment of a successor: the attempt of its predecessor.
FOLLOWS = "FLIP_FOLLOWS"


def superseded(newest: int, environ: Mapping[str, str]) -> bool:
    """Whether an attempt has begun since this job was submitted as a successor; ``newest``: the run's newest."""
    follows = slurm_cli.parse_int(environ.get(FOLLOWS, ""))
    return follows is not None and not slurm_cli.restart_count(environ) and newest > follows


def submit(
    job: str,
    restarts: int,
    attempt: Optional[int],
    delay: float = 0.0,
    exclude: Iterable[str] = (),
    patience: float = slurm_cli.RETRY_SECONDS,
) -> str:
    """Submit a successor of our job, to start after ``delay`` seconds and without nodes ``exclude``; what happened, in
    words. ``attempt``: the one that ends now; None: not known.

    A controller that does not answer is asked again for ``patience`` seconds. Raises SlurmUnavailable where it refuses.
    """
    end, wait = time.time() + patience, 1.0
    while True:
        try:
            return _submit(job, restarts, attempt, delay, exclude)
        except slurm_cli.SlurmUnavailable:
            state = slurm_cli.job_state(job, restarts)
            if state == "CANCELLED":
                return "left alone: it is CANCELLED"
            if state is not None or time.time() + wait > end:  # Slurm answers, so it was a refusal
                raise
        time.sleep(wait)
        wait = min(60.0, 2 * wait)


def _submit(job: str, restarts: int, attempt: Optional[int], delay: float, exclude: Iterable[str]) -> str:
    name, index = os.environ.get("SLURM_JOB_NAME", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    row = slurm_cli.queue([name]).get((name, slurm_cli.parse_int(index) or 0))
    if row is not None and row.id != job:
        return "left alone: job %s continues its run" % row.id
    fields = slurm_cli.fields_of(slurm_cli.call("scontrol", "show", "job", job))
    script = slurm_cli.call("scontrol", "write", "batch_script", job, "-")
    script = re.sub(r"(?m)^#SBATCH --hold\s*$", "#", script)  # its canary has passed
    words = ["--dependency=afterany:" + os.environ["SLURM_JOB_ID"]]
    words += ["--array=" + index] if index else []
    words += ["--begin=now+%d" % round(delay)] if delay >= 1 else []
    present = fields.get("ExcNodeList", "(null)")
    excluded = ([] if present == "(null)" else [present]) + sorted(exclude)
    words += ["--exclude=" + ",".join(excluded)] if excluded else []
    away = re.match(r"away:([0-9]+):%d:([0-9]+)$" % restarts, fields.get("Comment", ""))
    words += ["--comment=away:%s:-1:%s" % away.groups()] if away else []  # see jobs/host/slurm_cli.py
    id_ = slurm_cli.call("sbatch", "--parsable", *words, text=script, env=_environment(attempt)).strip()
    return "requeue is disabled for this job; submitted its successor %s" % id_.partition(";")[0]


def _environment(attempt: Optional[int]) -> Dict[str, str]:
    """What our own job was given when it began, without what belongs to that job. The batch shell is our parent: what
    its script has loaded and exported since is not in /proc."""
    try:
        with open("/proc/%d/environ" % os.getppid(), "rb") as file:
            pairs = [os.fsdecode(line).partition("=") for line in file.read().split(b"\0") if line]
        given = {name: value for name, _, value in pairs}
    except OSError:
        given = {}
    if given.get("SLURM_JOB_ID") != os.environ.get("SLURM_JOB_ID"):  # it was killed: our parent is another process
        given = {name: value for name, value in os.environ.items() if name not in ("FLIP_RUN", "FLIP_ATTEMPT")}
    kept = {name: value for name, value in given.items() if name == "SLURM_CONF" or not name.startswith("SLURM")}
    return dict(kept, **({FOLLOWS: str(attempt)} if attempt is not None else {}))
