"""What starts of a job that cannot write to its run leave with Slurm, in the job's comment, for the next one.

Standard library, Python >= 3.6: the exit trap on the host uses it.
"""

import re
from typing import NamedTuple

from jobs.host import slurm_cli

if False:  # names for annotations only: Python 3.6 runs this file too
    from typing import Optional  # noqa: F401

#: Starts of a job in a row at most that come to nothing, for want of the run's files: two days of them.
STARTS = 100


class Mark(NamedTuple):
    """What starts of a job that could not write to its run leave with the scheduler: ``Comment=away:1:17:5``.

    The second number is the restart that left it; -1: the job's predecessor (jobs/host/successor.py).
    """

    starts: int = 0
    """In a row, all of which came to nothing; a preemption or a start that went well ends the row."""
    attempt: int = 0
    """The one whose end could not be written; 0: none."""


def read(job, restarts, patience=0.0):
    # type: (str, int, float) -> Optional[Mark]
    """What earlier lives of the job left, if they left something; None: nobody says, for so many seconds and more."""
    try:
        text = slurm_cli.insist("scontrol", "show", "job", job, patience=patience)
    except slurm_cli.Unanswered:
        return None
    comment = slurm_cli.fields_of(text).get("Comment", "")
    found = re.match(r"away:([0-9]{1,9}):(-1|[0-9]{1,9}):([0-9]{1,9})$", comment)
    if not found:
        return Mark()
    starts, life, attempt = (int(part) for part in found.groups())
    return Mark(starts if life == restarts - 1 else 0, attempt)


def leave(job, restarts, mark, patience=0.0):
    # type: (str, int, Mark, float) -> None
    """For the next life of the job; before its requeue, after which this one may be killed at once. Silence is waited
    for as with ``read``.
    """
    words = "JobId=" + job, "Comment=away:%d:%d:%d" % (mark.starts, restarts, mark.attempt)
    try:
        slurm_cli.insist("scontrol", "update", *words, patience=patience)
    except slurm_cli.Unanswered:  # a start more than there might be
        pass
