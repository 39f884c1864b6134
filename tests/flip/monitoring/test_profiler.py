"""Tests of Profiler: traces of the requested steps, and the share of time that steps wait for communication."""

import gzip
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from flip.config import schema
from flip.distributed import parallel
from flip.monitoring.profiler import Profiler, exposed_communication_time
from tests.harness.ranks import run_ranks

CPU = torch.device("cpu")


def test_exposed_communication_time_excludes_overlap_with_compute():
    assert exposed_communication_time([], [(0, 9)]) == 0 and exposed_communication_time([(2, 5)], []) == 3
    assert exposed_communication_time([(0, 10), (5, 12)], [(3, 4), (3, 6), (11, 20)]) == 8
    assert exposed_communication_time([(0, 4), (4, 8)], [(0, 8)]) == 0
    assert exposed_communication_time([(1, 2), (4, 6)], [(2, 4), (5, 5)]) == 3


def position(step, batch=8):
    """The training after ``step`` steps."""
    return SimpleNamespace(
        step=step, samples_seen=step * batch, span=SimpleNamespace(stage=SimpleNamespace(batch=batch))
    )


def steps(profiler, count, start=0, batch=8):
    for i in range(count):
        profiler.before_step(position(start // batch + i))
        torch.ones(64, 64) @ torch.ones(64, 64)
        profiler.step(position(start // batch + i + 1))


def test_profiler_traces_requested_steps(tmp_path):
    folder = tmp_path / "traces"
    steps(Profiler(folder, 3, 1, CPU, first=20, steps=2, minutes=10), 8)
    assert mm_events(folder) == 2


def test_profiler_writes_shorter_trace_if_training_ends_within_it(tmp_path):
    folder = tmp_path / "traces"
    profiler = Profiler(folder, 3, 1, CPU, first=20, steps=5, minutes=10)
    steps(profiler, 4)
    assert not folder.exists()
    profiler.stop(position(4))
    assert mm_events(folder) == 2
    profiler.stop(position(4))
    assert len(list(folder.iterdir())) == 1


def mm_events(folder):
    (path,) = folder.iterdir()
    assert path.name == "3-3.json.gz"  # the step with samples 16 .. 23
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


@pytest.mark.parametrize("first, count, start", [(20, 0, 0), (20, 2, 24)])
def test_profiler_writes_no_trace_if_disabled_or_start_has_passed(tmp_path, first, count, start):
    profiler = Profiler(tmp_path / "traces", 3, 1, CPU, first=first, steps=count, minutes=10)
    steps(profiler, 6, start)
    assert not (tmp_path / "traces").exists() and profiler.communication == 0


def rank_main(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", FLIP_STORE=str(folder / "store"))
    parallel.start(schema.Compute(device="cpu", precision="fp32", attention="explicit", threads=1))
    profiler = Profiler(folder, 1, 2, CPU, 0, 0, minutes=10 if rank == 0 else 0)
    shares = []
    for i in range(3):
        shares.append(profiler.communication)
        profiler.before_step(position(i))
        if rank == 1 and i == 1:  # the profiled step; its profiler may take a second to start
            time.sleep(5.0)
        distributed.all_reduce(torch.ones(1000))
        profiler.step(position(i + 1))
    distributed.barrier()
    parallel.stop()
    return shares


@pytest.mark.long
def test_profiler_counts_wait_for_other_rank_as_communication(tmp_path):
    shares = run_ranks(rank_main, 2, tmp_path)
    assert shares[1] == [None, None, None] and shares[0][:2] == [None, None]
    assert 0.75 < shares[0][2] <= 1  # about 0.5 if no rank waits
