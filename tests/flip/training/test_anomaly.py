"""Tests NonFiniteGuard (a skipped step changes no weight or moment on any rank) and LossSpikeDetector."""

import contextlib
import logging
import os

import pytest
import torch
from torch import distributed

from flip.checkpoint import saver
from flip.config import schema
from flip.distributed import parallel
from flip.runs.errors import Diverged
from flip.runs.rundir import RunDir, read_json
from flip.training import grad_cache, parameter_groups
from flip.training.anomaly import MAX_RECORDS, LossSpikeDetector, NonFiniteGuard, TrainedStep
from tests.flip.models.test_clip import tiny
from tests.flip.training.test_grad_cache import batch
from tests.harness.ranks import run_ranks

NAN = float("nan")
INF = float("inf")


class Training:
    """A model under a guard. ``go`` runs a step as the trainer does."""

    def __init__(self, folder, pair=None, rank=0, fields=None, guarded=True, spike=0.0, window=3):
        self.run = RunDir(folder)
        self.pair = tiny() if pair is None else pair
        self.fields = batch() if fields is None else fields
        self.rank = rank
        self.guarded = guarded
        self.optimizer = parameter_groups.build(self.pair.named_parameters(), schema.Optim())
        parameter_groups.set_learning_rate(self.optimizer, schema.Stage(samples=256, batch=64, base_lr=0.01), 64)
        self.guard = NonFiniteGuard(self.run, 3, rank, spike, window)
        self.steps = 0

    def go(self, hurt=lambda pair, loss: loss, name="pretrain"):
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = grad_cache.grad_cache_backward(
            self.pair, self.fields, 1, torch.device("cpu"), contextlib.nullcontext()
        )
        loss = hurt(self.pair, loss)
        self.steps += 1
        if self.guarded:
            ids = torch.arange(4) + 100 * self.rank
            step = TrainedStep(self.steps, 12 * self.steps, name, self.optimizer.param_groups[0]["lr"], ids)
            self.guard.check_step(self.optimizer, step, loss, parameter_groups.gradient_norm(self.pair))
        self.optimizer.step()

    def state(self):
        tensors = saver.model_state(self.pair) | saver.optimizer_state(self.pair, self.optimizer)
        return {name: parallel.local(tensor).clone() for name, tensor in tensors.items()}


def changed(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


def hurt_gradient(value):
    def hurt(pair, loss):
        local = parallel.local(pair.text.blocks[0].mlp.fc1.weight.grad)
        local[-1, -1] = value
        return loss

    return hurt


@pytest.mark.long
@pytest.mark.parametrize(
    "hurt", [lambda _, loss: loss * NAN, lambda _, loss: loss + INF, hurt_gradient(NAN), hurt_gradient(-INF)]
)
def test_guard_skips_non_finite_step_and_raises_diverged(tmp_path, hurt):
    training = Training(tmp_path)
    training.go()
    training.go()
    before = training.state()
    training.go(hurt)  # the guard reads its numbers one step later
    assert changed(before, training.state()) == []
    with pytest.raises(Diverged) as error:
        training.go()
    assert changed(before, training.state()) == []
    assert "step 3, S = 36" in str(error.value) and "anomalies/3-3.0.json" in str(error.value)
    record = read_json(tmp_path / "anomalies" / "3-3.0.json")
    assert (record["kind"], record["step"], record["samples"], record["stage"]) == ("not_finite", 3, 36, "pretrain")
    assert record["ids"] == [0, 1, 2, 3] and record["lr"] > 0 and record["bound"] is None
    assert "nan" in (record["loss"], record["grad_norm"]) or "inf" in (record["loss"], record["grad_norm"])


def test_guard_flush_raises_diverged_once(tmp_path):
    training = Training(tmp_path)
    training.go(hurt_gradient(NAN))
    with pytest.raises(Diverged):
        training.guard.flush()
    training.guard.flush()  # the error is raised only once


@pytest.mark.long
def test_guarded_finite_steps_are_bitwise_equal_to_unguarded(tmp_path):
    guarded = Training(tmp_path)
    bare = Training(tmp_path, guarded=False)
    for _ in range(3):
        guarded.go()
        bare.go()
    guarded.guard.flush()
    assert changed(bare.state(), guarded.state()) == [] and not (tmp_path / "anomalies").exists()


def test_guard_raises_diverged_even_if_record_cannot_be_written(tmp_path):
    (tmp_path / "anomalies").write_text("in the way")
    training = Training(tmp_path)
    training.go(hurt_gradient(NAN))
    with pytest.raises(Diverged):
        training.guard.flush()


def rank_main(rank, size, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), FLIP_STORE=str(folder / "store"))
    compute = schema.Compute(device="cpu", precision="fp32", attention="explicit", threads=1)
    world = parallel.start(compute)
    pair = parallel.apply_parallelism(tiny(), world, compute)
    share = len(batch()[0]) // size
    fields = [field[rank * share : (rank + 1) * share] for field in batch()]
    training = Training(folder, pair, rank, fields)
    report = {}
    training.go()
    before = training.state()
    training.go(hurt_gradient(NAN) if rank == 1 else lambda _, loss: loss)
    report["changed"] = changed(before, training.state())
    try:
        training.go()
    except Diverged as error:
        report["error"] = str(error)
    report["after"] = changed(before, training.state())
    distributed.barrier()
    parallel.stop()
    return report


@pytest.mark.long
def test_guard_stops_both_ranks_if_gradient_of_rank_1_is_nan(tmp_path):
    reports = run_ranks(rank_main, 2, 2, tmp_path)
    for rank in range(2):
        assert reports[rank]["changed"] == reports[rank]["after"] == []
        assert "gradient norm nan" in reports[rank]["error"]
        assert read_json(tmp_path / "anomalies" / f"3-2.{rank}.json")["ids"][0] == 100 * rank


# -- spikes ------------------------------------------------------------------------------------------------------------


def spikes_of(losses, factor=6.0, window=20):
    spikes = LossSpikeDetector(factor, window)
    return [i for i, loss in enumerate(losses) if spikes.update(loss) is not None]


def falling(n, noise=0.02):
    generator = torch.Generator().manual_seed(0)
    return [5 * 0.995**i + noise * float(torch.randn((), generator=generator)) for i in range(n)]


def test_spike_detector_reports_each_jump_once():
    losses = falling(200)
    assert spikes_of(losses) == []
    losses[120:125] = [9.0, 8.0, 7.0, 6.0, 6.0]
    losses[160] = 4.0
    assert spikes_of(losses) == [120, 160]
    assert spikes_of(losses, factor=0.0) == []


def test_spike_detector_ignores_first_losses_and_tiny_jumps():
    assert spikes_of([9.0, *falling(18)]) == []
    assert spikes_of([2.0] * 30 + [2.005]) == [] and spikes_of([2.0] * 30 + [2.2]) == [30]


def test_spike_detector_accepts_persistent_level_as_normal():
    assert spikes_of([2.0] * 30 + [3.0] * 40 + [4.0]) == [30, 70]


def test_guard_records_spike_and_training_continues(tmp_path, caplog):
    training = Training(tmp_path, spike=6.0)
    for _ in range(4):
        training.go()
    with caplog.at_level(logging.WARNING):
        training.go(lambda _, loss: loss + 100)
        training.go()
    record = read_json(tmp_path / "anomalies" / "3-5.0.json")
    assert record["kind"] == "spike" and record["loss"] > 100 > record["bound"] and record["ids"] == [0, 1, 2, 3]
    assert "3-5.0.json" in caplog.text and "a spike" in caplog.text


def test_spike_detection_restarts_with_new_stage(tmp_path):
    training = Training(tmp_path, spike=6.0)
    for _ in range(4):
        training.go()
    for _ in range(2):
        training.go(lambda _, loss: loss + 100, name="unmasked")
    training.guard.flush()
    assert not (tmp_path / "anomalies").exists()


@pytest.mark.long
def test_guard_stops_recording_spikes_at_limit(tmp_path):
    training = Training(tmp_path, spike=6.0)
    training.guard._spike_count = MAX_RECORDS
    for _ in range(4):
        training.go()
    training.go(lambda _, loss: loss + 100)
    training.guard.flush()
    assert not (tmp_path / "anomalies").exists()
