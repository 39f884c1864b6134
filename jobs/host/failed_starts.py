"""Failed starts of a job, which cannot write to its run: how many in a row, the last one's exit code and node.

They are counted in the comment of the job, ``Comment=away:1:17:5:127:n3``, from one start to the next.
``jobs/slurm/fallback.sh`` writes the same comment.
"""

import re
from typing import Mapping, NamedTuple, Optional, Tuple

from jobs.host import slurm_cli

PREDECESSOR = -1  # in the comment of a successor, in place of the restart count
COMMENT = re.compile(r"away:([0-9]{1,9}):(-1|[0-9]{1,9}):([0-9]{1,9})(?::([0-9]{1,3}):([^:\s|]*))?$")


class FailedStarts(NamedTuple):
    """What the comment of a job says, but for the restart count of the start that wrote it (its second number)."""

    starts: int = 0  # failed starts in a row; a preemption or a good start resets the number
    attempt: int = 0  # the attempt whose end could not be written; 0: none
    code: int = 0  # exit code of the last failed start, and its node; 0 and "": unknown
    node: str = ""

    def comment(self, writer: int) -> str:
        """The comment. ``writer``: restart count of the start that writes it, or PREDECESSOR."""
        return "away:%d:%d:%d:%d:%s" % (self.starts, writer, self.attempt, self.code, self.node)


def before(fields: Mapping[str, str], restarts: int) -> FailedStarts:
    """What the starts of a job before this one left in its comment, by the job's ``fields``."""
    writer, failed = parse_failed_starts(fields.get("Comment", ""))
    if writer != restarts - 1:
        return failed._replace(starts=0)
    return failed


def of_start(fields: Mapping[str, str], restarts: int) -> Optional[FailedStarts]:
    """What this start itself has written into the comment of its job, whose ``fields`` are given; None: nothing."""
    writer, failed = parse_failed_starts(fields.get("Comment", ""))
    if writer != restarts:
        return None
    return failed


def parse_failed_starts(comment: str) -> Tuple[Optional[int], FailedStarts]:
    """(restart count of the start that wrote a job's comment, what it says); (None, FailedStarts()) for any other."""
    match = COMMENT.match(comment)
    if not match:
        return None, FailedStarts()
    starts, writer, attempt, code = (int(part or 0) for part in match.group(1, 2, 3, 4))
    return writer, FailedStarts(starts, attempt, code, match.group(5) or "")


def record_failed_starts(job: str, restarts: int, failed: FailedStarts, patience: float = 0.0) -> None:
    """Write the comment for the next start, before the requeue, after which this process may be killed at once."""
    comment = "Comment=" + failed.comment(restarts)
    try:
        slurm_cli.call_with_retry("scontrol", "update", "JobId=" + job, comment, patience=patience)
    except slurm_cli.SlurmUnavailable:  # one start more than the limit
        pass
