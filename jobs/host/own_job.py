"""The batch job that this process belongs to: its number, the state in which it ends, its wall limit."""

from typing import Dict, Mapping, Optional

from flip.runs.restart_policy import UNKNOWN
from flip.runs.wall_limit import TimeUsed
from jobs.host import slurm_cli
from jobs.host.slurm_cli import ENDED, ON_NODES, TRANSITIONAL, WAITING, parse_duration, parse_int, timestamp

LIMIT_POLL_SECONDS = 900.0  # between two queries of a wall limit: administrators change limits of running jobs
UNANSWERED_POLL_SECONDS = 60.0  # until the next query if Slurm does not answer
NEAR_LIMIT_SECONDS = slurm_cli.DEADLINE + UNANSWERED_POLL_SECONDS  # an unanswered query takes so long
SAME_EVENT_SECONDS = 3.0  # between the two times that Slurm records for one event

#: The final state of a job by the reason that Slurm shows while it is COMPLETING.
STATE_BY_REASON = {
    "None": "CANCELLED", "TimeLimit": "TIMEOUT", "NodeDown": "NODE_FAIL", "DeadLine": "DEADLINE",
    "OutOfMemory": "OUT_OF_MEMORY", "JobLaunchFailure": "LAUNCH_FAILED", "NonZeroExitCode": "FAILED",
    "RaisedSignal": "FAILED", "SystemFailure": "FAILED",
}  # fmt: skip

#: Ends of a job by Slurm whose ranks may save for longer than Slurm lets them. A person has not asked for any of them.
ENDS_AROUND_RANKS = ("TIMEOUT", "NODE_FAIL", "PREEMPTED")


def own_job(environ: Mapping[str, str]) -> str:
    """The batch job that this process belongs to, "" outside of one.

    An element of an array by its index: the number of the array is also that of one of its elements, and a requeue by
    it would requeue all.
    """
    if environ.get("SLURM_ARRAY_JOB_ID"):
        return "%s_%s" % (environ["SLURM_ARRAY_JOB_ID"], environ["SLURM_ARRAY_TASK_ID"])
    return environ.get("SLURM_JOB_ID", "")


def restart_count(environ: Mapping[str, str]) -> int:
    """How often Slurm has restarted this job."""
    return int(environ.get("SLURM_RESTART_COUNT") or 0)


def job_state(
    job: str, restarts: int, deadline: float = slurm_cli.DEADLINE, fields_out: Optional[Dict[str, str]] = None
) -> Optional[str]:
    """The state of a job whose script is ending, see ``state_of``; None if Slurm does not answer, UNKNOWN if it does
    not know the job.

    ``restarts``: SLURM_RESTART_COUNT of this start. ``fields_out`` receives the job's fields.
    """
    try:
        fields = slurm_cli.job_fields(job, deadline)
    except slurm_cli.NoSuchJob:
        return UNKNOWN
    except slurm_cli.SlurmUnavailable:
        return None
    if fields_out is not None:
        fields_out.update(fields)
    return state_of(fields, restarts)


def state_of(fields: Mapping[str, str], restarts: int) -> Optional[str]:
    """The state of a job whose script is ending, as ``flip.runs.restart_policy`` reads it, from its fields; UNKNOWN for
    a state or reason that is not known here, None if there is none.

    While a job ends, Slurm prints only COMPLETING. A job that Slurm has requeued has a higher restart count. A job at
    its limit has used up its time. A preempted job was preempted at the time of its end (after a grace period it may
    have been cancelled since). For the others the reason decides. Each was observed on Slurm 24.11
    (tests/slurm/scenarios.json).
    """
    state = fields.get("JobState", "")
    if _restarted(fields, restarts) or state in WAITING:
        return "PENDING"
    if not state:
        return None
    if state == "COMPLETING":
        return _final_state(fields)
    if state in TRANSITIONAL + ON_NODES + ENDED:
        return state
    return UNKNOWN


def _final_state(fields: Mapping[str, str]) -> str:
    """The state that a COMPLETING job will have."""
    reason = fields.get("Reason", "").partition(":")[0]
    if reason == "None" and _limit_passed(fields):
        return "TIMEOUT"
    if reason == "None" and _preempted_at_end(fields):
        return "PREEMPTED"
    return STATE_BY_REASON.get(reason, UNKNOWN)


def _limit_passed(fields: Mapping[str, str]) -> bool:
    elapsed = parse_duration(fields.get("RunTime", ""))
    limit = parse_duration(fields.get("TimeLimit", ""))
    return elapsed is not None and limit is not None and elapsed >= limit


def _preempted_at_end(fields: Mapping[str, str]) -> bool:
    preempted = timestamp(fields.get("PreemptTime", ""))
    ended = timestamp(fields.get("EndTime", ""))
    return bool(preempted and ended and abs(ended - preempted) <= SAME_EVENT_SECONDS)


def _restarted(fields: Mapping[str, str], restarts: int) -> bool:
    return (parse_int(fields.get("Restarts", "")) or 0) > restarts


def end_around_ranks(fields: Mapping[str, str]) -> str:
    """One of ENDS_AROUND_RANKS if Slurm ended a job so that has left its nodes, else ""."""
    state = fields.get("JobState", "")
    if state == "COMPLETING":
        if _limit_passed(fields):
            return "TIMEOUT"
        state = _final_state(fields)
    if state in ENDS_AROUND_RANKS:
        return state
    return ""


def seconds_queued(fields: Mapping[str, str]) -> float:
    """For how long a job could start, but waited in the queue; 0 if unknown."""
    eligible = timestamp(fields.get("EligibleTime", ""))
    start = timestamp(fields.get("StartTime", ""))
    if eligible is None or start is None:
        return 0.0
    return max(0.0, start - eligible)


def time_used(fields: Mapping[str, str]) -> Optional[TimeUsed]:
    """The time that a job has used. ``fields``: of ``scontrol show job``; None if they are empty."""
    if not fields:
        return None
    return TimeUsed(
        elapsed=parse_duration(fields.get("RunTime", "")),
        limit=parse_duration(fields.get("TimeLimit", "")),
        over=fields.get("Reason") == "TimeLimit",  # RunTime is 0 if the job is requeued already
        preempted=timestamp(fields.get("PreemptTime", "")) is not None,
    )
