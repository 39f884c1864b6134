"""What a run tells: one clean curve over attempts, and a status that only the holder writes."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flip import monitor
from flip.rundir import RunDir, read_json


@pytest.fixture
def run(tmp_path):
    return RunDir(tmp_path / "sweep" / "run")


def record(step, loss):
    return {
        "step": step, "samples": step * 8, "stage": "pretrain", "loss": loss, "accuracy": 0.5, "lr": 0.1,
        "logit_scale": 14.3, "grad_norm": None, "samples_per_second": 4.0, "data_wait": 0.1, "mfu": 0.2, "replaced": 0,
    }  # fmt: skip


def attempt(run, begin, steps, loss):
    n = run.begin_attempt({})
    told = monitor.Monitor(run, n, total=80, steps=10, seconds=0.0)
    told.begin(begin)
    for step in steps:
        told.step(record(step, loss))
    return told


def test_steps_done_again_stand_once_in_the_curve(run):
    attempt(run, 0, (1, 2, 3, 4), loss=1.0).close("stopped")
    attempt(run, 16, (3, 4, 5), loss=2.0).close("complete")
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (8, 1.0), (16, 1.0), (24, 2.0), (32, 2.0), (40, 2.0),
    ]  # fmt: skip
    assert [(line["step"], line["loss"]) for line in run.metric_lines()] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_status_is_the_newest_attempts(run):
    old = attempt(run, 0, (1, 2), loss=1.0)
    assert read_json(run.status)["eta_seconds"] == (80 - 16) / 4
    new = attempt(run, 16, (), loss=1.0)
    old.close("stopped")
    status = read_json(run.status)
    assert (status["attempt"], status["phase"], status["samples"]) == (2, "training", 16)
    new.close("complete")
    assert read_json(run.status)["phase"] == "complete"


def test_an_evaluation_is_kept_with_its_place(run):
    told = attempt(run, 0, (1,), loss=1.0)
    told.evaluation("pretrain", 8, 12.5, [{"name": "val", "top1": 0.25}])
    kept = read_json(run.eval / "pretrain-8.json")
    assert (kept["stage"], kept["samples"], kept["seconds"], kept["evaluations"][0]["top1"]) == (
        "pretrain",
        8,
        12.5,
        0.25,
    )


def test_the_peak_is_a_rate():
    assert 1e8 < monitor.measure_peak(torch.device("cpu"), torch.float32, seconds=0.05) < 1e15
