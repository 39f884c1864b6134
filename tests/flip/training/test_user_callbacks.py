"""Tests of the classes of monitor.callbacks: they see and log, and change no bit of the training."""

import logging
import os
import re
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flip.common.shutdown import StopFlag
from flip.config.merge import dump
from flip.distributed import parallel
from flip.runs import checkpoint_folder
from flip.runs.rundir import RunDir, read_json
from flip.training import trainer as training
from flip.training.callbacks import TrainingStopped
from flip.training.trainer import Trainer
from tests.harness.common import metric_lines
from tests.harness.ranks import run_ranks
from tests.harness.training_run import BATCH, TrainingRun, configuration
from tests.synthetic import make_dataset, make_tokenizer

ROOT = Path(__file__).resolve().parents[3]
PAGES = {"CONTRIBUTING.md": "my_metric.py", "docs/monitoring.md": "geometry.py"}
"""Page with an example -> the name of its file in the tests."""
STEPS = 6

CLASSES = """
import random

import numpy as np
import torch
from torch import distributed

HOOKS = []
DRAWN = []


class Recorder:
    every = 2

    def __getattr__(self, name):
        if name not in ("start", "start_stage", "before_step", "step", "save", "evaluate", "stop", "end"):
            raise AttributeError(name)

        def record(view, *values):
            HOOKS.append((name, view.samples_seen, view.step, view.stage, *values))

        return record


class Draws:
    every = 1
    values = ("number", "rank")

    def __init__(self):
        self.drawn = self._draw()

    def _draw(self):
        return random.random() + np.random.rand() + float(torch.rand(()))

    def step(self, view):
        DRAWN.append(self._draw())
        return {"number": DRAWN[-1], "rank": view.rank}


class Reads:
    every = 1
    values = ("weights", "loss", "patches")

    def step(self, view):
        squares = sum(float(part.double().square().sum()) for _, part in view.model.named_parameters())
        assert all(part.grad is not None for _, part in view.model.named_parameters())
        return {"weights": squares * view.shards, "loss": view.loss, "patches": view.batch.patches.shape[0]}


class Pairs:  # computes the loss of CLIP again, from the features of the step
    every = 1
    values = ("loss", "rows", "alignment")

    def before_step(self, view):
        assert view.features is None
        scale = dict(view.model.named_parameters())["logit_scale"]
        self._scale = float(scale.double().clamp(0).exp())

    def step(self, view):
        image, text = (features.double() for features in view.features)
        assert len(view.batch.ids) == len(image) == len(text)
        logits = self._scale * image @ text.T
        own = torch.arange(len(logits))
        both = [torch.nn.functional.cross_entropy(part, own) for part in (logits, logits.T)]
        return {"loss": sum(both) / 2, "rows": len(image), "alignment": (image - text).square().sum(1).mean()}


class WritesFeatures:
    every = 1

    def step(self, view):
        view.features.text.mul_(0)


class WritesWeight:
    def start_stage(self, view):
        self._first = dict(view.model.named_parameters())["logit_scale"]

    every = 1

    def step(self, view):
        self._first.data.fill_(0)


class WritesGradient:
    every = 1

    def before_step(self, view):
        for _, part in view.model.named_parameters():
            if part.grad is not None:
                torch._foreach_mul_([part.grad], 2)


class WritesMoments:
    every = 1

    def step(self, view):
        for _, moments in view.optimizer.named_moments():
            torch.add(moments["exp_avg"], 1, out=moments["exp_avg"])


class WritesBatch:
    every = 1

    def step(self, view):
        view.batch.tokens[0] = 0


class Sets:
    every = 1

    def step(self, view):
        view.samples_seen = 0


class Communicates:
    every = 1

    def step(self, view):
        distributed.all_reduce(torch.ones(1))


class Fails:
    every = 1
    values = ("number",)

    def step(self, view):
        if view.rank == view.world_size - 1 and view.step == 2:
            raise ZeroDivisionError("by design")
        return {"number": 1.0}


class Exits:
    every = 3

    def step(self, view):
        raise SystemExit(3)


class Unnamed:
    every = 1
    values = ("number",)

    def step(self, view):
        return {"other": 1.0}


class NoNumber:
    every = 1
    values = ("number",)

    def step(self, view):
        return {"number": float("nan")} if view.step % 2 else None


class WrongEvery:
    every = int("0")

    def step(self, view):
        pass
"""
REFUSED = {
    "WritesWeight": "may not write to tensors", "WritesGradient": "may not write to tensors",
    "WritesMoments": "may not write to tensors", "WritesBatch": "may not write to tensors",
    "WritesFeatures": "may not write to tensors",
    "Sets": "has no setter", "Communicates": "may not communicate", "Exits": "step() at step 3: SystemExit: 3",
    "Unnamed": "other, which `values` does not name", "WrongEvery": "cannot be loaded", "Absent": "cannot be loaded",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_dataset(tmp_path_factory.mktemp("data"), samples=120, shards=2, chunk=4, classes=4)
    make_tokenizer(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The callbacks of a snapshot: those above, and the examples of the pages, called at every step."""
    folder = tmp_path_factory.mktemp("code") / "user_files"
    folder.mkdir()
    (folder / "classes.py").write_text(CLASSES)
    for page, name in PAGES.items():
        (example,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
        assert "every = 100" in example
        (folder / name).write_text(example.replace("every = 100", "every = 1"))
    return folder


def configured(data, world, *callbacks, log_every=1):
    config = configuration(data, world=world, samples=(STEPS, 2))
    config.data.workers = 0
    config.evaluate.sets = config.evaluate.sets[:1]
    config.evaluate.every = 4 * BATCH
    config.checkpoint.samples = 4 * BATCH
    config.monitor.log_every = log_every
    config.monitor.callbacks = list(callbacks)
    return config


def created(folder, name, config):
    run = RunDir(folder / "sweep" / name)
    run.path.mkdir(parents=True)
    run.config.write_text(dump(config))
    return run


def trained(run, files, attempts=1):
    """``files``: the folder ``user_files`` of a snapshot; None: the run has none."""
    with pytest.MonkeyPatch.context() as patch:
        if files:
            patch.setenv("FLIP_SNAPSHOT", str(files.parent))
        return _trained(run, attempts)


def _trained(run, attempts):
    for _ in range(attempts):
        try:
            training.train(run, run.start_attempt({}), StopFlag(), lambda *_: None)
        except TrainingStopped:
            pass
        finally:
            parallel.stop()
    return run


def killed(run, step):
    """Train in a process that is killed before a step: it saves nothing more."""
    process = get_context("spawn").Process(target=_train_until_killed, args=(run.path, step))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


def _train_until_killed(path, step):
    original_step = Trainer.train_step

    def dies(self, *args):
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original_step(self, *args)

    Trainer.train_step = dies
    trained(RunDir(path), None)


def state(run):
    """The tensors of the last checkpoint, by file and name."""
    view = TrainingRun.__new__(TrainingRun)
    view.run = run
    return view.weights()[1]


def assert_same(run, other):
    expected = state(other)
    actual = state(run)
    assert actual.keys() == expected.keys() and len(actual) > 50
    assert [key for key in actual if not torch.equal(actual[key], expected[key])] == []
    losses = [[(line["step"], line["loss"]) for line in metric_lines(each)] for each in (run, other)]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def calm(data, files, tmp_path_factory):
    """The run without callbacks, on one rank."""
    return trained(created(tmp_path_factory.mktemp("calm"), "calm", configured(data, 1)), files)


def module():
    """The loaded file of the classes."""
    import sys

    return sys.modules["flip_user_files.classes"]


@pytest.mark.long
def test_hooks_are_called_in_order_at_agreed_steps(data, files, tmp_path, calm):
    run = created(tmp_path, "recorded", configured(data, 1, "classes.py:Recorder"))
    trained(run, files)
    B = BATCH
    assert [tuple(call[:4]) for call in module().HOOKS if call[0] != "end"] == [
        ("start", 0, 0, "pretrain"), ("start_stage", 0, 0, "pretrain"),
        ("before_step", B, 1, "pretrain"), ("step", 2 * B, 2, "pretrain"),
        ("before_step", 3 * B, 3, "pretrain"), ("step", 4 * B, 4, "pretrain"),
        ("save", 4 * B, 4, "pretrain"), ("evaluate", 4 * B, 4, "pretrain"),
        ("before_step", 5 * B, 5, "pretrain"), ("step", 6 * B, 6, "pretrain"),
        ("save", 6 * B, 6, "pretrain"), ("evaluate", 6 * B, 6, "pretrain"),
        ("start_stage", 6 * B, 6, "unmasked"),
        ("before_step", 7 * B, 7, "unmasked"), ("step", 8 * B, 8, "unmasked"),
        ("save", 8 * B, 8, "unmasked"), ("stop", 8 * B, 8, "unmasked"), ("evaluate", 8 * B, 8, "unmasked"),
    ]  # fmt: skip
    assert module().HOOKS[-1] == ("end", 8 * B, 8, "unmasked", "complete", "")
    assert_same(run, calm)


@pytest.mark.long
def test_callbacks_change_no_bit_and_forbidden_ones_are_disabled(data, files, tmp_path, calm, caplog):
    names = ("Draws", "Reads", "NoNumber", *REFUSED)
    run = created(tmp_path, "guarded", configured(data, 1, *(f"classes.py:{name}" for name in names)))
    with caplog.at_level(logging.WARNING, logger="flip"):
        trained(run, files)
    assert_same(run, calm)
    drawn = module().DRAWN
    assert len(drawn) == STEPS + 2 and len(set(drawn)) == 1, "the generators have their states back after each call"
    lines = metric_lines(run)
    for line, before in zip(lines, metric_lines(calm), strict=True):
        assert line.keys() == before.keys() | {"callback"}
        values = line["callback"]
        assert values["Reads/weights"] == pytest.approx(line["param_norm"] ** 2, rel=1e-9)
        assert values["Reads/loss"] == line["loss"] and values["Reads/patches"] == BATCH
        assert values["Draws/rank"] == 0 and ("NoNumber/number" in values) == (line["step"] % 2 == 1)
    assert lines[0]["callback"]["NoNumber/number"] is None, "JSON has no NaN"
    status = read_json(run.status)
    for name, text in REFUSED.items():
        assert re.search(rf"{name} is disabled: [^;]*{re.escape(text)}", status["callbacks"]), (name, status)
        assert any(name in message and "the run goes on" in message for message in caplog.messages)
    assert status["phase"] == "complete" and not any(name in status["callbacks"] for name in names[:3])
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [point.step for point in events.Scalars("callback/Draws/rank")] == [n * BATCH for n in range(1, STEPS + 3)]


@pytest.mark.long
def test_example_logs_noise_of_moments_and_resumed_run_equals_calm_one(data, files, tmp_path, calm, monkeypatch):
    """Also with metric lines at every fourth step: a line has the mean of the calls since the last one."""
    config = configured(data, 1, "my_metric.py:GradNoise", "classes.py:Draws", "classes.py:Exits", log_every=1)
    run = created(tmp_path, "resumed", config)
    step = Trainer.train_step

    def interrupted(self, *args):
        if self.attempt == 1 and self.step == 3:
            self.flag.set("signal SIGTERM")
        return step(self, *args)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    trained(run, files)
    assert "Exits is disabled" in read_json(run.status)["callbacks"] and not run.result.exists()
    trained(run, files)
    assert run.newest_attempt() == 2 and "Exits is disabled" in read_json(run.status)["callbacks"], "it tries again"
    expected = state(calm)
    actual = state(run)
    assert [key for key in actual if not torch.equal(actual[key], expected[key])] == []
    assert metric_lines(run)[-1]["callback"]["GradNoise/noise"] == pytest.approx(noise(state(run)), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("accumulate", [1, 2])
def test_features_are_those_of_the_loss_and_change_no_bit(data, files, tmp_path, accumulate):
    runs = {}
    for name, entries in {"plain": [], "seen": ["classes.py:Pairs", "geometry.py:Geometry"]}.items():
        config = configured(data, 1, *entries)
        config.compute.accumulate = accumulate
        runs[name] = trained(created(tmp_path, name, config), files)
    assert_same(runs["seen"], runs["plain"])
    lines = metric_lines(runs["seen"])
    assert len(lines) == STEPS + 2
    for line in lines:
        values = line["callback"]
        assert values["Pairs/loss"] == pytest.approx(line["loss"], rel=1e-5) and values["Pairs/rows"] == BATCH
        assert values["Geometry/alignment"] == pytest.approx(values["Pairs/alignment"], rel=1e-5)
        assert -4 <= values["Geometry/image_uniformity"] <= 0


def noise(tensors):
    """The noise of the example, from the moments of a checkpoint."""
    square = variance = 0.0
    for (file, name), mean in tensors.items():
        if name.startswith("optim.exp_avg."):
            both = tensors[file, name.replace("optim.exp_avg.", "optim.exp_avg_sq.")].double()
            square += float(mean.double().square().sum())
            variance += float((both - mean.double().square()).sum())
    return variance / square


@pytest.mark.long
def test_values_of_calls_between_metric_lines_are_averaged(data, files, tmp_path):
    config = configured(data, 1, "classes.py:Fails", "classes.py:Reads", log_every=4)
    lines = metric_lines(trained(created(tmp_path, "rare", config), files))
    assert [line["step"] for line in lines] == [4, 6, 8]
    assert all("Fails/number" not in line["callback"] for line in lines), "it failed in step 2, before the first line"
    (calls,) = {line["callback"]["Reads/patches"] for line in lines}
    assert calls == BATCH


def rank_main(rank, store, cases, files):
    """Trains as rank ``rank`` of two. Reports the disabled classes of each run."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", FLIP_STORE=store, FLIP_SNAPSHOT=str(files.parent)
    )
    ends = []
    world = parallel.start(cases[0][1].compute)
    for path, config in cases:
        from flip.common.shutdown import Watchdog

        trainer = Trainer(RunDir(path), 1, StopFlag(), config, world, Watchdog(0, lambda *_: None))
        trainer.run_stages()
        trainer.close("complete", "")
        (users,) = [each for each in trainer.callbacks.members if hasattr(each, "disabled")]
        ends.append(users.disabled)
    parallel.stop()
    return ends


@pytest.mark.long
def test_two_ranks_average_values_and_agree_on_failure_of_one(data, files, tmp_path):
    """A class that raises on rank 1 alone stops being called on both, and the weights are those without any class."""
    callbacks = ["my_metric.py:GradNoise", *(f"classes.py:{name}" for name in ("Draws", "Reads", "Fails"))]
    callbacks.append("geometry.py:Geometry")
    cases = []
    for name, entries in {"calm": [], "called": callbacks}.items():
        config = configured(data, 2, *entries, log_every=2)
        run = created(tmp_path, name, config)
        run.start_attempt({})
        cases.append((run.path, config))
    ends = run_ranks(rank_main, 2, str(tmp_path / "store"), cases, files)
    text = "Fails is disabled: step() at step 2: ZeroDivisionError: by design (rank 1)"
    assert ends[0] == ends[1] == [[], [text]]
    calm, called = (RunDir(path) for path, _ in cases)
    assert_same(called, calm)
    assert read_json(called.status)["callbacks"] == text
    lines = metric_lines(called)
    for line in lines:
        assert line["callback"]["Draws/rank"] == 0.5 and line["callback"]["Reads/patches"] == BATCH / 2
        assert "Fails/number" not in line["callback"]
    last = lines[-1]["callback"]
    assert last["GradNoise/noise"] > 0 and 0 < last["Geometry/alignment"] < 4
    every = metric_lines(called)[-1]
    assert last["Reads/weights"] == pytest.approx(every["param_norm"] ** 2, rel=0.2), "mean of two steps"
    assert checkpoint_folder.checkpoints(called)[-1].samples_seen == (STEPS + 2) * BATCH
