"""Tests that the ranks of an evaluation job end if one of them fails."""

import os
import subprocess
import sys

import pytest

from flip.config.schema import Compute
from flip.evaluation.request import EvaluationRequest
from flip.runs.rundir import RunDir

pytestmark = pytest.mark.long

RANK = """
import functools, os, sys, threading
from pathlib import Path
from flip.common.shutdown import StopFlag
from flip.evaluation import evaluation_job
from flip.runs.errors import DataError
from flip.runs.rundir import RunDir

class Evaluation:
    def __init__(self, run, attempt, request, world, watchdog, flag):
        self.rank = world.rank

    def run(self):
        if self.rank == 1:
            raise DataError("cannot be decoded", "image")
        threading.Event().wait()  # as in a collective of NCCL, which does not notice that a rank has ended

evaluation_job.Evaluation = Evaluation
evaluation_job.PeerWatcher = functools.partial(evaluation_job.PeerWatcher, seconds=0.1)
try:
    evaluation_job.evaluate(RunDir(Path(sys.argv[1])), 1, StopFlag(), lambda cause, what: print(cause, flush=True))
except DataError:
    os._exit(1)  # as jobs.runtime.rank_process: the interpreter may abort while threads of torch run
"""


def test_rank_of_evaluation_ends_if_peer_fails(tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    compute = Compute(device="cpu", precision="fp32", attention="sdpa", threads=1)
    EvaluationRequest("subject", compute).write(run)
    shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "FLIP_STORE": str(tmp_path / "store")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, run.path], env={**shared, "RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        assert [rank.communicate()[0] for rank in ranks] == ["peer_lost\n", ""]
        assert [rank.returncode for rank in ranks] == [70, 1]
    finally:
        for rank in ranks:
            rank.kill()
