"""Tests of the proofs of a storm on records of attempts."""

from types import SimpleNamespace

import pytest

from flip.runs.rundir import RunDir, write_json
from tests.harness.training_run import BATCH
from tests.storm.proofs import losses


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    checkpoint = SimpleNamespace(background="no")
    storm_run = SimpleNamespace(run=run, done=[], config=SimpleNamespace(checkpoint=checkpoint), trained={})
    storm_run.witnessed = lambda: storm_run.trained
    return storm_run


def attempt(run, code, start, steps):
    """Record an attempt that trained ``steps`` steps from step ``start`` on; it did not start if that is None."""
    n = run.run.start_attempt({})
    if start is not None:
        write_json(run.run.attempt(n) / "ready.json", {"samples": start * BATCH})
    run.trained[n] = {(start + step) * BATCH: () for step in range(steps)}
    write_json(run.run.attempt(n) / "end.json", {"cause": "stopped", "action": "requeue", "code": code})


def test_losses_counts_steps_of_each_attempt_that_the_next_one_repeats(run):
    attempt(run, 70, 0, 14)
    attempt(run, 75, 10, 3)  # a clean stop at step 13, where the first attempt had already been
    attempt(run, 70, None, 0)  # did not start
    attempt(run, 70, 13, 4)
    attempt(run, 70, None, 0)
    attempt(run, 75, 15, 1)
    assert [(loss.attempt, loss.steps, loss.bound) for loss in losses(run)] == [(1, 4, 5), (2, 0, 0), (4, 2, 5)]
