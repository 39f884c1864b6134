"""Numbers of a program from its files and its output, as metric lines."""

import json

import pytest
from torch.utils.tensorboard import SummaryWriter

from flip.runs.rundir import RunDir
from jobs.runtime.program_metrics import EventFiles, JsonLines, Pattern, ProgramMetrics


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    run.start_attempt({})
    return run


def lines(run, source, settings, start=0):
    """The metric lines of what ``source`` says."""
    metrics = ProgramMetrics(run, 1, source, settings, start)
    metrics.finish()
    metrics.close("complete")
    rows = map(json.loads, (run.metrics / "1.jsonl").read_text().splitlines())
    return [{key: row.get(key) for key in ("samples", "step", "loss")} for row in rows]


def test_lines_of_json_are_read_from_the_start_of_the_attempt(run, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "train/loss": 9}\n{"step": 2, "lo')  # an attempt that was killed
    source = JsonLines(path)
    with path.open("a") as file:
        file.write('{"step": 2, "train/loss": 0.5}\nno json\n{"loss": 1}\n{"step": 3, "train/loss": NaN}\n{"step": 4')
    assert lines(run, source, {"names": {"loss": "train/loss"}}) == [
        {"samples": 2, "step": 2, "loss": 0.5},
        {"samples": 3, "step": 3, "loss": None},
    ]


def test_epochs_become_positions(run):
    source = Pattern(r"epoch (?P<epoch>[\d.]+) loss (?P<loss>\S+)")
    for text in ("epoch 0.5 loss 1,000.5", "no match", "epoch 1 loss nan"):
        source.on_line(text)
    assert lines(run, source, {"per_epoch": 200}) == [
        {"samples": 100, "step": 100, "loss": 1000.5},
        {"samples": 200, "step": 200, "loss": None},
    ]


def test_samples_within_an_epoch_are_added_to_its_start(run):
    """The lines of open_clip and of many others."""
    source = Pattern(r"Epoch: (?P<epoch>\d+) \[ *(?P<in_epoch>\d+)/\d+ .*Loss: (?P<loss>\S+)")
    for text in ("Epoch: 0 [ 64/640 (10%)] Loss: 3.5 (3.5)", "Epoch: 2 [640/640 (100%)] Loss: 2.5 (2.6)"):
        source.on_line(text)
    assert lines(run, source, {"per_epoch": 640, "batch": 64}) == [
        {"samples": 64, "step": 1, "loss": 3.5},
        {"samples": 1920, "step": 30, "loss": 2.5},
    ]


def test_steps_become_samples_with_the_batch(run):
    source = Pattern(r"step (?P<step>\d+)")
    source.on_line("step 3")
    assert lines(run, source, {"batch": 128}) == [{"samples": 384, "step": 3, "loss": None}]


def test_event_files_of_tensorboard_are_read(run, tmp_path):
    with SummaryWriter(str(tmp_path / "old")) as old:
        old.add_scalar("loss", 9.0, 1)
    source = EventFiles(tmp_path)
    with SummaryWriter(str(tmp_path / "new")) as writer:
        for step in (5, 6):
            writer.add_scalar("train/loss", 1 / step, step)
            writer.add_scalar("lr", 0.1, step)
    rows = lines(run, source, {"names": {"loss": "train/loss"}})
    assert [(row["step"], round(row["loss"], 4)) for row in rows] == [(5, 0.2), (6, 0.1667)]


def test_pattern_that_matches_nothing_is_named(run):
    source = Pattern("step (?P<step>x)")
    source.on_line("step 1")
    metrics = ProgramMetrics(run, 1, source, {}, 0)
    assert metrics.why_none() == "metrics.pattern matches none of the 1 lines that rank 0 printed"
