"""What the stand-ins for Slurm's commands print."""

JOB = (
    "JobId=57 ArrayJobId=50 ArrayTaskId=3 JobName=a.b\n   Priority=1\n   JobState={state} Reason={reason}\n"
    "   Requeue=1 Restarts={restarts}\n   RunTime={ran} TimeLimit={limit} TimeMin=N/A\n   ExcNodeList={out}\n"
    "   EndTime=2026-11-25T09:24:14 PreemptTime={preempted}\n   Partition=gpu NumNodes=2\n"
)

NODES = "printf 'n%s|idle\\n' 1 2 3 4 5 6 7 8 9"

USUAL = {"state": "RUNNING", "restarts": 0, "ran": "00:10:00", "limit": "1-00:00:00", "out": "(null)"}


def show(**fields):
    return f"cat <<'X'\n{JOB.format(**{**USUAL, 'reason': 'None', 'preempted': 'None', **fields})}X"
