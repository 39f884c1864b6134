"""Saves checkpoints as one user: python -m tests.security.save_checkpoints RUN_DIR URL S ...

Starts an attempt, and keeps one checkpoint. An empty URL: in the run directory. Exits with the code of an error of
ours.
"""

import logging
import sys

from flip.config import schema
from flip.distributed import parallel
from flip.runs.errors import FlipError
from flip.runs.rundir import RunDir
from tests.harness import copied_runs


def main(path: str, url: str, *positions: str) -> int:
    logging.basicConfig(stream=sys.stderr)
    world = parallel.start(schema.Compute(device="cpu", threads=1, deterministic="no"))
    try:
        copied_runs.save(RunDir(path), world, url, *map(int, positions), keep=1, resume=False)
    except FlipError as error:
        print(error, file=sys.stderr)
        return error.code
    finally:
        parallel.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
