"""What runs inside an evaluation's job, once per rank; causes, exit codes and the rest as in
``jobs.runtime.worker``."""

from __future__ import annotations

import sys
from functools import partial

from flip.distributed import shutdown
from flip.runs.rundir import RunDir
from jobs.runtime import worker


def evaluate(run: RunDir, attempt: int, flag: shutdown.StopFlag) -> tuple[str, str]:
    from flip.evaluation import job

    try:
        job.evaluate(run, attempt, flag, partial(worker.note_hang, run, attempt))
    except job.Stopped as stopped:
        return "stopped", str(stopped)
    return "complete", ""


if __name__ == "__main__":
    from jobs.runtime import evaluator

    worker.leave(worker.main(sys.argv[1], evaluator.evaluate))
