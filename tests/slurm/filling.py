"""A rank process whose first attempt fills the disk of its run and fails with an error that does not name the cause.

The file ``filler`` takes the space. Later attempts complete the run at once.
"""

import os
import sys

from flip.runs.rundir import write_json
from jobs.runtime import rank_process


def work(run, attempt, flag):
    if attempt == 1:
        try:
            with open(run.path / "filler", "ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError as error:
            raise RuntimeError("writer failed") from error
    if os.environ["RANK"] == "0":
        write_json(run.result, {"run": run.name, "attempt": attempt})
    return "complete", ""


if __name__ == "__main__":
    rank_process.exit_process(rank_process.main(sys.argv[1], work))
