"""What a batch script calls on the host, outside the trainer: before the ranks start, and from its exit trap.

    python3 jobs/requeue.py begin RUN_DIR            prints the attempt's number n
    python3 jobs/requeue.py end RUN_DIR --code C     decides, records, requeues; prints the decision as one line of JSON

Standard library, Python >= 3.6: whatever Python the host has. The order in ``end`` matters: after a requeue the batch
shell may be killed at once, so the end is written and synced before it.
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if False:  # names for annotations only: Python 3.6 runs this file too
    from typing import Any, Dict, Optional  # noqa: F401

    from jobs.policy import Decision  # noqa: F401

EXAMPLES = """examples:
  python3 jobs/requeue.py begin runs/masking/mask50
  python3 jobs/requeue.py end runs/masking/mask50 --code 75
"""


def main(arguments=None):
    # type: (Any) -> int
    parser = argparse.ArgumentParser(
        description="Begin or end an attempt of a run, on the host.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["begin", "end"])
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("--attempt", type=int, help="the number that begin printed (end; default: the newest)")
    parser.add_argument("--code", type=int, help="exit code of the attempt (end)")
    parser.add_argument("--state", help="the scheduler's words for the job, where the caller knows them (end)")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # preemption without grace would cut the decision off
    from flip.exitcodes import FlipError

    try:
        return begin(args.run) if args.what == "begin" else end(args.run, args.attempt, args.code, args.state)
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code


def begin(path):
    # type: (str) -> int
    from flip.exitcodes import CAUSES
    from flip.rundir import RunDir
    from jobs import ledger

    run = RunDir(path)
    ledger.settle(run)
    verdict = ledger.standing(run)
    if verdict is not None and verdict["action"] == "stop":
        print("%s: not started: %s" % (run.path, verdict["reason"]), file=sys.stderr)
        return CAUSES.get(verdict["cause"], CAUSES["crash"])
    print(ledger.begin(run, {"job": os.environ.get("SLURM_JOB_ID", "")}))
    return 0


def end(path, n, code, state):
    # type: (str, Optional[int], Optional[int], Optional[str]) -> int
    from flip.exitcodes import ConfigError
    from flip.rundir import RunDir
    from jobs import ledger

    run = RunDir(path)
    n = run.newest_attempt() if n is None else n
    if n not in run.attempt_numbers():
        raise ConfigError("no such attempt", str(run.path), n, "It is won by `jobs/requeue.py begin`.")
    decision = ledger.end(run, n, code, state)
    print(json.dumps(decision._asdict(), sort_keys=True), flush=True)
    if decision.action == "requeue":
        requeue_job(decision)
    return 0


def requeue_job(decision):
    # type: (Decision) -> None
    """Start the batch job again through its scheduler. Outside of one there is nothing to start: ConfigError."""
    from flip.exitcodes import ConfigError

    raise ConfigError(
        "not a batch job: nothing to requeue",
        "jobs/requeue.py",
        decision.cause,
        "The end is recorded; local runs go on by `python jobs/submit.py`.",
    )


if __name__ == "__main__":
    sys.exit(main())
