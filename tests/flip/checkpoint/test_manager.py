"""What all ranks of an attempt must agree on before they save."""

from dataclasses import replace

import pytest
from torch import nn

from flip.checkpoint.manager import Saving
from flip.config import schema
from flip.distributed import parallel
from flip.distributed.watchdog import Watchdog
from flip.runs.rundir import RunDir


@pytest.fixture(scope="module")
def world():
    yield parallel.start(schema.Compute(device="cpu", threads=1, deterministic="no"))
    parallel.stop()


@pytest.mark.parametrize("here, there", [(True, False), (False, True)])
def test_the_first_ranks_start_decides_whether_the_first_step_is_saved(tmp_path, world, monkeypatch, here, there):
    """The other rank's file says something else, or is not there yet: a save is collective."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.begin_attempt({"first_commit": here})
    saving = Saving(run, 1, world, schema.Config(), Watchdog(0, print))
    saving.restore(nn.Identity(), lambda: None)
    assert saving.soon == here
    monkeypatch.setattr("flip.checkpoint.manager.run_on_first", lambda function, group: there)
    second = Saving(run, 1, replace(world, rank=1), schema.Config(), Watchdog(0, print))
    monkeypatch.setattr(second.checkpointer.restorer, "newest", lambda: None)
    second.restore(nn.Identity(), lambda: None)
    assert second.soon == there


def test_the_first_rank_alone_reads_what_older_attempts_logged(tmp_path, world, monkeypatch):
    read = []
    monkeypatch.setattr("flip.checkpoint.interval.observed", lambda run, attempt: (read.append(attempt), (0.0, 0))[1])
    run = RunDir(tmp_path / "sweep" / "run")
    run.begin_attempt({})
    Saving(run, 1, replace(world, rank=1), schema.Config(), Watchdog(0, print))
    assert read == []
    assert not Saving(run, 1, world, schema.Config(), Watchdog(0, print)).due() and read == [1]
