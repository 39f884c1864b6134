"""Tests the training loop: batches, stops, status, evaluation results, and stages."""

import contextlib
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import flip
from flip.checkpoint.manager import CheckpointManager
from flip.common.shutdown import CoordinatedStop, StopFlag, Watchdog
from flip.config.derived import stage_spans
from flip.config.merge import dump
from flip.config.schema import EvaluationSet
from flip.data.decode_counts import DecodeCounts
from flip.distributed import parallel
from flip.evaluation.datasets.catalog import ResolvedDataset
from flip.evaluation.encoding.encoders import ModelEncoder
from flip.evaluation.evaluator import Evaluator
from flip.evaluation.metrics import predictions
from flip.evaluation.metrics.result_files import read_scores
from flip.monitoring.collector import TimeBreakdown
from flip.runs import checkpoint_folder
from flip.runs.errors import StorageError
from flip.runs.rundir import RunDir, read_json
from flip.training.anomaly import NonFiniteGuard, TrainedStep
from flip.training.callbacks import TrainingStopped
from flip.training.metrics_callback import MetricLines
from flip.training.scoring import Scoring
from flip.training.trainer import Trainer, train
from tests.harness.ranks import run_ranks
from tests.harness.training_run import BATCH, configuration
from tests.synthetic import make_dataset, make_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=120, shards=2, chunk=4, classes=4)
    make_tokenizer(folder / "tokenizer.json")
    make_dataset(folder / "train", samples=40, shards=1, classes=4, seed=1)
    return folder


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_trainer_requests_pinned_batches_on_cuda_only(data, tmp_path, monkeypatch, device):
    """Without a GPU, checks only the ``pinned`` argument of the loader. test_gpu.py checks the batches."""

    class LoaderCreated(Exception):
        pass

    def create_loader(*_, pinned, **__):
        raise LoaderCreated(pinned)

    monkeypatch.setattr("flip.training.trainer.Loader", create_loader)
    monkeypatch.setattr("flip.training.trainer.CheckpointManager", lambda *_: None)
    run = RunDir(tmp_path / "sweep" / "run")
    world = parallel.World(0, 1, torch.device(device), None, None)
    with pytest.raises(LoaderCreated) as error:
        Trainer(
            run, run.start_attempt({}), StopFlag(), configuration(data, world=1), world, Watchdog(0, lambda *_: None)
        )
    assert error.value.args == (device == "cuda",)


class Device:
    """An asynchronous device, in seconds of a clock that only it advances: each step takes 4 s from its launch."""

    def __init__(self):
        self.now = 0.0
        self.busy_until = 0.0

    def query(self):
        return self.now >= self.busy_until

    def synchronize(self):
        self.now = max(self.now, self.busy_until)


def test_time_of_the_device_counts_as_training(tmp_path, monkeypatch):
    """Of two steps, launched in 1 s each, the second is not complete when its metric line is written."""
    device = Device()
    numbers = torch.ones(2)
    monkeypatch.setattr("flip.training.trainer.time", SimpleNamespace(perf_counter=lambda: device.now))
    guard = NonFiniteGuard(RunDir(tmp_path), 1, 0, 0.0, 8)
    trainer = SimpleNamespace(guard=guard, seconds=0.0)
    for number in range(2):
        started = device.now
        device.now, busy = device.now + 1, max(device.now, device.busy_until) + 4
        guard.flush()
        device.busy_until = busy
        guard._pending = TrainedStep(number, number, "pretrain", 0.1, torch.arange(1)), numbers, device
        trainer.seconds += device.now - started
    assert guard.is_device_busy and trainer.seconds < 8
    Trainer.wait_for_device(trainer)
    assert not guard.is_device_busy and device.now == trainer.seconds == 8


def test_metric_line_counts_training_time_once(data, tmp_path, monkeypatch):
    """Seconds of steps, of waits for the device in lines, and of those in saves between lines."""
    config = configuration(data, world=1)
    config.monitor.log_every = 2
    world = parallel.World(1, 2, torch.device("cpu"), None, None)
    users = SimpleNamespace(pending=list, reduced=lambda *_: {}, disabled=[])
    lines = MetricLines(RunDir(tmp_path), 1, config, world, None, None, users)
    monkeypatch.setattr("flip.training.metrics_callback.parameter_groups.weight_norms", lambda *_: (0, 0))
    monkeypatch.setattr("flip.training.metrics_callback.grad_cache.mean_text_tokens", lambda *_: 1.0)
    windows = []

    class Collector:
        def reset(self):
            self.window = TimeBreakdown()

        def use_model(self, model):
            pass

        def collect(self, *_):
            windows.append((self.window.samples, round(self.window.seconds, 3), self.window.waited))
            return {}

    lines._collector = Collector()
    at = SimpleNamespace(
        span=stage_spans(config)[0], samples_seen=0, step=0, seconds=100.0, waited=0.25, model=None, gradient_norm=0,
        optimizer=object(), batch=SimpleNamespace(tokens=None), loss=0, accuracy=0, classification_loss=None,
        counters=SimpleNamespace(totals=lambda values: (0, {}, values)), loader=SimpleNamespace(decoded=DecodeCounts),
    )  # fmt: skip

    def wait():
        at.seconds += 0.5

    at.wait_for_device = wait
    lines.start_stage(at)
    for _ in range(4):
        at.samples_seen = at.samples_seen + BATCH
        at.step = at.step + 1
        at.seconds = at.seconds + 1
        lines.step(at)
        at.seconds += 0.125 * (at.step == 2)  # a save waits for the device
    assert windows == [(2 * BATCH, 2.5, 0.5), (2 * BATCH, 2.625, 0.5)]


def test_poll_requests_does_not_access_run_directory():
    """A stall of the shared file system must not stall every rank, so only RunWatcher polls the run directory."""
    trainer = Trainer.__new__(Trainer)
    trainer.world = parallel.World(0, 1, torch.device("cpu"), None, None)
    trainer.flag = StopFlag()
    trainer.checkpoints = SimpleNamespace(has_failed=lambda: False, is_due=lambda: False)
    trainer.run = None
    assert trainer.poll_requests() == (False, False)
    trainer.flag.set("cancelled")
    assert trainer.poll_requests() == (True, False)


def test_scores_are_recorded_with_checkpoint_by_rank_0_of_newest_attempt_only(tmp_path, monkeypatch):
    looked = []
    written = []
    monkeypatch.setattr(
        "flip.runs.checkpoint_folder.summary_at", lambda run, samples: looked.append(samples) or {"samples": samples}
    )
    run = RunDir(tmp_path)
    results = [{"name": "val", "task": "zeroshot", "precision": "fp32", "metric": "top1", "top1": 0.5}]
    predictions = {"val": SimpleNamespace(write=lambda path: written.append(path.name))}
    training = SimpleNamespace(
        span=SimpleNamespace(stage=SimpleNamespace(name="pretrain")), samples_seen=8, seconds=1.0
    )
    attempt = run.start_attempt({})
    for rank, newer, checkpoints in ((1, False, []), (0, False, [8]), (0, True, [8])):
        world = parallel.World(rank, 2, torch.device("cpu"), None, None)
        scoring = Scoring(run, attempt, configuration(tmp_path, world=2), world, None, None, None)
        if newer:
            run.start_attempt({})
        scoring.write(training, scoring.with_checkpoint(training, results), predictions)
        assert looked == checkpoints
    assert written == ["val.predictions.jsonl"]
    (point,) = read_scores(run)
    assert (point.stage, point.samples_seen, point.seconds, point.attempt) == ("pretrain", 8, 1.0, attempt)
    assert point.scores == [results[0] | {"stage": "pretrain", "samples": 8, "commit": {"samples": 8}}]


@pytest.mark.long
def test_train_saves_where_asked_and_after_first_step_of_restart_and_leaves_result_to_newest_attempt(
    data, tmp_path, monkeypatch
):
    config = configuration(data, world=1, samples=(3, 1))
    config.data.workers = config.evaluate.every = config.checkpoint.samples = 0
    config.evaluate.sets = []
    config.checkpoint.keep_at = [2 * BATCH]
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    config.checkpoint.minutes = 60.0
    run.config.write_text(dump(config))
    saved = []
    save = CheckpointManager.save

    def record_save(self, state, stage, samples, **record):
        saved.append(samples)
        save(self, state, stage, samples, **record)

    monkeypatch.setattr(CheckpointManager, "save", record_save)
    n = run.start_attempt({"first_commit": True})
    finish = Trainer.finish
    # the last save must be complete: it would refuse to write for a newer attempt
    monkeypatch.setattr(Trainer, "finish", lambda self: (self.checkpoints.wait(), run.start_attempt({}), finish(self)))
    try:
        train(run, n, StopFlag(), lambda *_: None)
    finally:
        parallel.stop()
    assert saved == [BATCH, 2 * BATCH, 3 * BATCH, 4 * BATCH], "first step, keep_at, ends of the stages"
    assert not run.result.exists(), "a newer attempt writes it"


@pytest.mark.parametrize(
    "error, phase, reason",
    [
        (TrainingStopped("signal SIGUSR2"), "interrupted", "signal SIGUSR2"),
        (TrainingStopped("cancelled"), "cancelled", "cancelled"),
        (StorageError("no space left", "/runs"), "failed", "no space left"),
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
        (None, "complete", ""),
    ],
)
def test_status_records_phase_and_reason_of_attempt_end(data, tmp_path, monkeypatch, error, phase, reason):
    def ends(self):
        if error is not None:
            raise error

    monkeypatch.setattr(Trainer, "run_stages", ends)
    config = configuration(data, world=1)
    config.data.workers = 0
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    run.config.write_text(dump(config))
    try:
        with pytest.raises(type(error)) if error is not None else contextlib.nullcontext():
            train(run, run.start_attempt({}), StopFlag(), lambda *_: None)
    finally:
        parallel.stop()
    status = read_json(run.status)
    assert status["phase"] == phase and reason in status["reason"] and bool(reason) == bool(status["reason"])


@pytest.mark.long
def test_train_scores_and_reports_evaluation_sets_of_every_task(data, tmp_path, caplog):
    """Result file, log, TensorBoard and its hyperparameter table show the same scores: those of the fp32 weights,
    although training is in bf16."""
    config = configuration(data, world=1, samples=(2, 1), precision="bf16")
    manifest = str(data)
    config.data.workers = config.evaluate.every = 0
    config.evaluate.sets = [
        EvaluationSet("named", manifest, classes=f"{manifest}/classes.json"),
        EvaluationSet("paired", manifest, task="retrieval"),
        EvaluationSet("fitted", manifest, task="probe", train=f"{manifest}/train"),
    ]
    config.evaluate.preprocess = "resize_crop"
    config.data.to_rgb = "convert"
    run = RunDir(tmp_path / "sweep" / "run")
    run.path.mkdir(parents=True)
    run.config.write_text(dump(config))
    try:
        with caplog.at_level(logging.INFO, logger="flip"):
            train(run, run.start_attempt({}), StopFlag(), lambda *_: None)
    finally:
        parallel.stop()
    scores = {score["name"]: score for score in read_json(run.result)["evaluations"]}
    assert list(scores) == ["named", "paired-text", "paired-image", "fitted-probe"]
    assert {score["view"] for score in scores.values()} == {f"{config.model.image.size}px-resize_crop-convert"}
    assert [score["n"] for score in scores.values()] == [120, 120, 240, 120], "two captions of every image"
    loaded = flip.load(run.path)
    encoder = ModelEncoder(loaded.model, loaded.tokenizer, config.model.image)
    expected = [
        score
        for item in config.evaluate.sets
        for score in Evaluator(encoder, 64).score(ResolvedDataset.from_config(item))
    ]
    for score in expected:
        assert scores[score["name"]]["precision"] == "fp32"
        assert scores[score["name"]]["predictions"] == score["predictions"], score["name"]
    (predictions_file,) = (run.eval / f"{config.stages[-1].name}-{scores['named']['samples']}").iterdir()
    assert predictions_file.name == "named.predictions.jsonl", "other tasks have no classes"
    assert predictions.read(predictions_file).digest == scores["named"]["predictions"]
    for name, template in {
        "named": "top-1 {:.2%} of 120 images",
        "paired-text": "R@1 {:.2%} of 120 images",
        "paired-image": "R@1 {:.2%} of 240 captions",
        "fitted-probe": "top-1 {:.2%} of 120 images",
    }.items():
        assert f"{name}: {template.format(scores[name]['top1'])}" in caplog.messages
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    tags = {f"scores/{name}_top1" for name in scores}
    assert tags == {tag for tag in events.Tags()["scalars"] if tag.endswith("_top1")}
    utilisation = {tag for tag in events.Tags()["scalars"] if "utilisation" in tag}
    assert utilisation == {"system/matmul_utilisation"}, "a CPU has no datasheet peak"


class SignalledTrainer(Trainer):
    """Sends requests with the statistics, as on GPUs. Only rank 1 gets a signal, in step ``signal_step``."""

    def __init__(self, *args, signal_step):
        super().__init__(*args)
        self.coordinated_stop = CoordinatedStop(self.world.control_group, self.world.size, with_statistics=True)
        self.signal_step = signal_step

    def train_step(self, *args):
        if self.world.rank == 1 and self.step + 1 == self.signal_step:
            self.flag.set("signal SIGTERM")
        return super().train_step(*args)


def signalled_rank(rank, store, cases):
    """Trains as rank ``rank`` of two. Returns the stop reason and step of each (run, configuration, signal_step)."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", FLIP_STORE=store)
    ends = []
    world = parallel.start(cases[0][1].compute)
    for path, config, signal_step in cases:
        watchdog = Watchdog(0, lambda *_: None)
        trainer = SignalledTrainer(RunDir(path), 1, StopFlag(), config, world, watchdog, signal_step=signal_step)
        reason = "complete"
        try:
            trainer.run_stages()
        except TrainingStopped as error:
            reason = str(error)
        trainer.close("interrupted", reason)
        ends.append((reason, trainer.step))
    parallel.stop()
    return ends


@pytest.mark.long
def test_signal_on_rank_1_stops_both_ranks_at_same_saved_step(data, tmp_path):
    """Stages have 4 and 3 steps. Ranks read a request two steps later, or when the stage ends or a save happens."""
    expected = {
        "early": (1, 3),
        "late": (2, 4),
        "last step": (4, 6),
        "end of the run": (6, 7),
        "each step saved": (1, 2),
    }
    cases = []
    for name, (signal_step, _) in expected.items():
        config = configuration(data, world=2, samples=(4, 3))
        config.data.workers = config.evaluate.every = 0
        config.evaluate.sets = []
        config.compute.accumulate = 2
        config.monitor.profile_steps = 100  # more than there are
        if name == "each step saved":
            config.checkpoint.samples = BATCH
        else:
            config.checkpoint.samples = 100 * BATCH
        run = RunDir(tmp_path / "sweep" / name.replace(" ", "-"))
        run.path.mkdir(parents=True)
        run.config.write_text(dump(config))
        run.start_attempt({})
        cases.append((run.path, config, signal_step))
    ends = run_ranks(signalled_rank, 2, str(tmp_path / "store"), cases)
    for rank, reason in ((0, "another rank requested the stop"), (1, "signal SIGTERM")):
        expected_ends = [("complete" if steps == 7 else reason, steps) for _, steps in expected.values()]
        assert ends[rank] == expected_ends
    saved = [checkpoint_folder.checkpoints(RunDir(path))[-1].samples_seen for path, *_ in cases]
    assert saved == [steps * BATCH for _, steps in expected.values()]
    traces = [[trace.name for trace in RunDir(path).traces.iterdir()] for path, *_ in cases]
    assert traces == [["1-1.json.gz"]] * len(cases), "rank 0 traced until it stopped"


def test_stage_sets_its_own_recompute_mode():
    """The mode changes even if the stage has the shapes of the previous stage and continues with its model."""
    config = configuration(Path("unused"), world=1)
    config.stages[1].compute.recompute = "block"
    trainer = Trainer.__new__(Trainer)
    trainer.config = config
    trainer.world = parallel.World(0, 1, torch.device("cpu"), None, None)
    trainer.stage_config = config
    trainer.model = trainer.allocate(config, config.stages[0])
    for stage, expected in zip(config.stages, ("no", "block"), strict=True):
        trainer.enter(stage)
        assert {block.activation_checkpointing for block in trainer.model.image.blocks} == {expected}
        assert trainer.allocate(trainer.stage_config, stage).text.blocks[0].activation_checkpointing == expected
