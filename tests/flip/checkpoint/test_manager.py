"""Tests when CheckpointManager saves and what it restores: decisions that all ranks share, and the interval."""

import json
import math
from dataclasses import replace

import pytest
import torch

from flip.checkpoint import manager
from flip.checkpoint.manager import CheckpointManager, SaveInterval
from flip.checkpoint.saver import model_state, optimizer_state
from flip.common.shutdown import Watchdog
from flip.config import schema
from flip.distributed import parallel
from flip.optimizer_kinds import moments_of
from flip.runs.formats import ORDER_NUMBER
from flip.runs.rundir import RunDir, write_json
from flip.training.parameter_groups import build


@pytest.fixture(scope="module")
def world():
    yield parallel.start(schema.Compute(device="cpu", threads=1, deterministic="no"))
    parallel.stop()


@pytest.mark.parametrize("here, there", [(True, False), (False, True)])
def test_manager_takes_first_commit_flag_from_rank_0(tmp_path, world, monkeypatch, here, there):
    """Saves are collective. The file of the other rank may differ or not exist yet, so rank 0 decides for all."""
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({"first_commit": here})
    saving = CheckpointManager(run, 1, world, schema.Config(), Watchdog(0, print))
    saving.find(lambda restorer: None)
    assert saving.save_after_first_step == here
    monkeypatch.setattr("flip.checkpoint.manager.run_on_first", lambda function, group: there)
    second = CheckpointManager(run, 1, replace(world, rank=1), schema.Config(), Watchdog(0, print))
    monkeypatch.setattr(second.checkpointer.restorer, "newest", lambda: None)
    second.find(lambda restorer: None)
    assert second.save_after_first_step == there


def test_manager_reads_logs_of_older_attempts_on_rank_0_only(tmp_path, world, monkeypatch):
    read = []
    monkeypatch.setattr(
        "flip.checkpoint.manager.uptime_and_interruptions", lambda run, attempt: (read.append(attempt), (0.0, 0))[1]
    )
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    CheckpointManager(run, 1, replace(world, rank=1), schema.Config(), Watchdog(0, print))
    assert read == []
    assert not CheckpointManager(run, 1, world, schema.Config(), Watchdog(0, print)).is_due() and read == [1]


def attempts(run, *lives):
    """Records earlier attempts. ``lives``: (seconds trained, or None if training never started; exit code)."""
    for lived, code in lives:
        n = run.start_attempt({})
        write_json(run.attempt(n) / "end.json", {"code": code})
        if lived is None:
            continue
        write_json(run.attempt(n) / "ready.json", {"samples": 0, "time": 1000.0 * n})
        run.metrics.mkdir(exist_ok=True)
        lines = [json.dumps({"step": k, "samples": 8 * k, "time": 1000.0 * n + t}) for k, t in enumerate((1.0, lived))]
        (run.metrics / f"{n}.jsonl").write_text("\n".join(lines) + '\n{"step": 3, "ti')


def test_interruptions_exclude_clean_stops_and_untrained_attempts(tmp_path):
    run = RunDir(tmp_path / "sweep" / "run")
    attempts(run, (100.0, None), (None, 70), (50.0, 75), (30.0, 70))
    n = run.start_attempt({})
    # A clean stop and an attempt without training are no interruptions.
    assert manager.uptime_and_interruptions(run, n) == (180.0, 2)


def test_young_daly_interval_stays_within_its_bounds():
    assert manager.young_daly_interval(10, 3600 * 8, 1) == pytest.approx(math.sqrt(2 * 10 * 3600 * 8))
    assert manager.young_daly_interval(0.01, 3600, 1) == manager.MIN_SECONDS
    assert manager.young_daly_interval(0.01, 3600, 50) == 200, "four times the duration of a save"
    assert manager.young_daly_interval(100, 1e7, 1) == manager.MAX_SECONDS
    assert manager.young_daly_interval(100, 1e7, 3000) == 12_000


def test_save_interval_shrinks_with_more_interruptions(tmp_path):
    calm = RunDir(tmp_path / "sweep" / "calm")
    stormy = RunDir(tmp_path / "sweep" / "stormy")
    attempts(calm, (3600.0, 70))
    attempts(stormy, *[(600.0, None)] * 100)
    intervals = [SaveInterval(0, run, run.start_attempt({})).seconds(3, 30.0, 1.0) for run in (calm, stormy)]
    expected = [math.sqrt(20 * (86_400 + lived) / (1 + cut)) for lived, cut in ((3600, 1), (60_000, 100))]
    assert intervals == pytest.approx(expected, rel=1e-3) and intervals[1] < intervals[0]
    assert SaveInterval(0, calm, 2).seconds(0, 0, 0) == manager.FIRST
    assert SaveInterval(7, calm, 2).seconds(3, 30.0, 1.0) == 420


@pytest.mark.parametrize("line", [
    "\0\0\0", '{"step": 2, "ti', "[1]", '{"step": 2}', '{"step": 2, "samples": 16, "time": "late"}',
])  # fmt: skip
def test_uptime_skips_damaged_metric_lines(tmp_path, line):
    """Damaged telemetry never stops training. The newest valid line with a time counts; without one the attempt counts
    as 0 seconds."""
    run = RunDir(tmp_path / "sweep" / "run")
    attempts(run, (100.0, None), (50.0, None))
    valid = json.dumps({"step": 1, "samples": 8, "time": 1030.0})
    (run.metrics / "1.jsonl").write_text(f"{valid}\n{line}\n")
    (run.metrics / "2.jsonl").write_text(f"{line}\n")
    assert manager.uptime_and_interruptions(run, run.start_attempt({})) == (30.0, 2)


@pytest.mark.parametrize("text", ["\0\0", "[]", "{}", '{"time": null}'])
def test_uptime_skips_damaged_ready_and_end_records(tmp_path, text):
    run = RunDir(tmp_path / "sweep" / "run")
    attempts(run, (100.0, 75), (50.0, 75))
    (run.attempt(1) / "ready.json").write_text(text)
    (run.attempt(2) / "end.json").write_text(text)
    # An unreadable end counts as an interruption.
    assert manager.uptime_and_interruptions(run, run.start_attempt({})) == (50.0, 1)


def test_manager_restores_weights_and_moments_of_the_stage_of_the_checkpoint(tmp_path, world):
    def built(value):
        model = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(model.weight, value)
        optimizer = build(model.named_parameters(), schema.Optim())
        for moments in (moments_of(optimizer, parameter) for parameter in model.parameters()):
            moments["exp_avg"].fill_(value)
        return model, optimizer

    def unused(restorer):
        raise AssertionError("a run with a checkpoint is not initialised")

    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    saving = CheckpointManager(run, 1, world, schema.Config(), Watchdog(0, print))
    model, optimizer = built(5.0)
    saving.save(model_state(model) | optimizer_state(model, optimizer), "pretrain", 16, order=ORDER_NUMBER)
    saving.wait()
    checkpoints = CheckpointManager(run, 1, world, schema.Config(), Watchdog(0, print))
    assert checkpoints.find(lambda restorer: None).samples_seen == 16
    model, optimizer = built(1.0)
    checkpoints.load_weights(model, unused)
    checkpoints.load_optimizer(model, optimizer, "unmasked")
    assert model.weight[0, 0].item() == 5 and float(moments_of(optimizer, model.weight)["exp_avg"][0, 0]) == 1
    checkpoints.load_optimizer(model, optimizer, "pretrain")
    assert float(moments_of(optimizer, model.weight)["exp_avg"][0, 0]) == 5


def test_manager_initialises_weights_of_run_without_checkpoint(tmp_path, world):
    run = RunDir(tmp_path / "sweep" / "run")
    run.start_attempt({})
    checkpoints = CheckpointManager(run, 1, world, schema.Config(), Watchdog(0, print))
    opened = []
    assert checkpoints.find(lambda restorer: opened.append(restorer)) is None
    checkpoints.load_weights(torch.nn.Linear(3, 2), opened.append)
    assert opened == [checkpoints.checkpointer.restorer] * 2
